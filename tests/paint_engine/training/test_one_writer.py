"""A run's lock on its directory: other starts are refused before they read anything, and a run that
has lost its lock stops before it writes again."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from paint_engine.config.command_line import load_config
from paint_engine.distributed import World
from paint_engine.evaluation.store import SampleFiles
from paint_engine.files import DirectoryLock, lock, read_jsonl
from paint_engine.training import build, loop
from paint_engine.training.parts import models

Main = Callable[[Sequence[str]], int]
WORLD = World(0, 1, 0, torch.device("cpu"))


def content(directory: Path) -> dict[str, bytes]:
    """All files but the first lock."""
    files = [p for p in sorted(directory.rglob("*")) if p.is_file() and p.name != ".lock-1"]
    return {str(path): path.read_bytes() for path in files}


def test_while_a_run_lives_its_directory_is_left_alone(
    command: list[str],
    run_main: Main,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(lock, "_PATIENCE_S", 0.0)
    run, run_dir = build.build_run(load_config(command), WORLD), tmp_path / "run"
    before = content(run_dir)
    (tmp_path / "link").symlink_to(run_dir)
    with monkeypatch.context() as patch:
        patch.setattr(models, "load_base", lambda *_, **__: pytest.fail("loaded the model"))
        for argv in (
            command,
            [*command, "--run.overwrite", "true"],
            [*command, "--run.auto_resume", "true"],
            [*command, "--run.dir", str(tmp_path / "link"), "--run.overwrite", "true"],
            ["--resume", str(run_dir)],
        ):
            capsys.readouterr()
            assert run_main(argv) == 2
            printed = capsys.readouterr().out
            assert printed.startswith("error: run directory ")
            assert f" is in use by process {os.getpid()} on " in printed
            assert "wait for it, stop it, or choose another with --run.dir" in printed
            assert content(run_dir) == before
    # Nothing is written for it.
    assert run_main(["--resume", str(run_dir), "--dry-run"]) == 0
    del run
    assert run_main([*command, "--run.overwrite", "true", "--train.num_steps", "1"]) == 0
    assert not [path for path in run_dir.iterdir() if lock.is_lock_file(path)]


@pytest.mark.parametrize("place", ["step", "evaluation"])
def test_a_run_whose_lock_was_taken_writes_nothing_more(
    place: str,
    command: list[str],
    run_main: Main,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As after a suspension, on a file system without locks."""
    run_dir, states = tmp_path / "run", []

    def taken() -> None:
        record = (run_dir / ".lock-1").read_text()
        (run_dir / ".lock-2").write_text(record.replace('"host": "', '"host": "other-'))
        states.append(content(run_dir))

    train_step, append = loop.train_step, SampleFiles.append

    def step_and_lose(run: Any, step: int) -> Any:
        result = train_step(run, step)
        if step == 2:
            taken()
        return result

    def lose_and_append(files: SampleFiles, group: Any) -> None:
        taken()
        append(files, group)

    if place == "step":
        monkeypatch.setattr(loop, "train_step", step_and_lose)
    else:
        monkeypatch.setattr(SampleFiles, "append", lose_and_append)
    assert run_main(command) == 1
    printed = capsys.readouterr().out
    assert f"error: run directory {run_dir} was taken by process {os.getpid()} on other-" in printed
    assert "writes nothing more there" in printed
    assert content(run_dir) == states[0]
    assert len(read_jsonl(run_dir / "metrics.jsonl")) == (3 if place == "step" else 0)


def test_every_rank_ends_where_the_main_one_is_refused(
    command: list[str],
    tmp_path: Path,
    torchrun: Callable[..., Any],
    printed_by: Callable[[Any, float], str],
) -> None:
    with DirectoryLock(tmp_path / "run", "it", "go"):
        process = torchrun(2, "-m", "paint_engine.train", *command)
        printed = printed_by(process, 300)
    assert process.returncode == 1
    said = f"error: run directory {tmp_path / 'run'} is in use by process {os.getpid()} on "
    # The other rank's message has its number.
    assert printed.count(said) == 2 and f"rank 1: {said}" in printed
    assert not (tmp_path / "run").exists()
