"""An evaluation's lock on its directory, and checkpoints that change while it reads them."""

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from exit_codes import exit_code
from peft import PeftModel
from safetensors.torch import load_file, save_file

from paint_engine import evaluate
from paint_engine.evaluation import run
from paint_engine.evaluation.store import SampleFiles
from paint_engine.files import DirectoryLock, lock

Change = Callable[[Path], object]


main = partial(exit_code, evaluate.main)


@pytest.fixture
def arguments(model_dir: Path, tmp_path: Path, write_rows: Callable[..., Path]) -> tuple:
    """An evaluation of seconds."""
    rows = write_rows(tmp_path / "rows.jsonl", 3)
    return (
        *("--model", model_dir, "--benchmarks", rows, "--num-samples", 2),
        *("--max-new-tokens", 6, "--engine", "builtin", "--device", "cpu"),
        *("--output", tmp_path / "out"),
    )


def test_one_command_at_a_time_in_a_directory(
    arguments: tuple,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(lock, "_PATIENCE_S", 0.0)
    with DirectoryLock(tmp_path / "out", "it", "go"), monkeypatch.context() as patch:
        patch.setattr(run, "build_engine", lambda *_, **__: pytest.fail("loaded the model"))
        (tmp_path / "link").symlink_to("out")
        for place in ("out", "link"):
            assert main(*arguments, "--output", tmp_path / place) == 2
            printed = capsys.readouterr().out
            said = f"error: --output {tmp_path / place}: is in use by process {os.getpid()} on "
            assert said in printed
            assert "wait for it, stop it, or give another directory with --output" in printed
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    assert main(*arguments) == 0
    assert not [path for path in (tmp_path / "out").iterdir() if lock.is_lock_file(path)]


def test_an_evaluation_whose_lock_was_taken_writes_nothing_more(
    arguments: tuple,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, append = tmp_path / "out", SampleFiles.append

    def lose_and_append(files: SampleFiles, group: Any) -> None:
        shutil.copy(out / ".lock-1", out / ".lock-2")
        append(files, group)

    with monkeypatch.context() as patch:
        patch.setattr(SampleFiles, "append", lose_and_append)
        assert main(*arguments) == 1
    printed = capsys.readouterr().out
    assert f"error: --output {out}: was taken by process {os.getpid()} on " in printed
    assert (out / "rows.rank-0.jsonl").read_bytes().count(b"\n") == 1
    assert not (out / "results.json").exists()
    # The other one was a copy.
    assert main(*arguments) == 0


@pytest.fixture
def adapter(lora_model: PeftModel, tmp_path: Path) -> Path:
    lora_model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    return tmp_path / "adapter"


def train_again(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shutil.rmtree, "was removed while it was read: its run keeps the newest checkpoints"),
        (train_again, "has changed while this command loaded it"),
    ],
    ids=["removed", "replaced"],
)
def test_weights_that_change_while_they_are_loaded_are_not_evaluated(
    change: Change,
    message: str,
    arguments: tuple,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    build_engine = run.build_engine

    def change_and_build(*args: Any, **kwargs: Any) -> Any:
        change(adapter)
        return build_engine(*args, **kwargs)

    monkeypatch.setattr(run, "build_engine", change_and_build)
    assert main(*arguments, "--adapter", adapter) == 2
    assert f"error: {adapter} {message}" in capsys.readouterr().out
    assert not [*(tmp_path / "out").glob("*.json*")]
