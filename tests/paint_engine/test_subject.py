"""What two flags name: the directory of an evaluation says it, an adapter on another base is told
of, and each mistake gets the advice that helps."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from peft import PeftModel

from paint_engine import evaluate
from paint_engine.checkpoint_files import list_checkpoints
from paint_engine.config_sections import ModelSection
from paint_engine.subject import (
    Subject,
    check_adapter,
    default_directory,
    find_adapter,
    find_subject,
    other_base,
)


@pytest.fixture
def adapter(lora_model: PeftModel, model_dir: Path, tmp_path: Path) -> Path:
    """In peft's format, of `model_dir` by its own word."""
    directory = tmp_path / "mine"
    lora_model.save_pretrained(str(directory), save_embedding_layers=False)
    config = json.loads((directory / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model_dir)
    return directory


@pytest.fixture
def run_dir(adapter: Path, model_dir: Path, tmp_path: Path) -> Path:
    """What a training leaves, as far as it is looked at before the files are read."""
    directory = tmp_path / "paint"
    for step in (4, 6):
        shutil.copytree(adapter, directory / "checkpoints" / f"step-{step}")
    (directory / "config.toml").write_text(
        f"[model]\nname_or_path = {json.dumps(str(model_dir))}\n"
    )
    return directory


def named(subject: Subject) -> str:
    directory = default_directory(subject, {"seed": 0})
    assert directory.parent == Path("evaluations")
    return directory.name.rpartition("-")[0]


def test_a_directory_is_named_after_what_is_evaluated(
    adapter: Path, run_dir: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, step = ModelSection(name_or_path="tiny"), run_dir / "checkpoints" / "step-6"
    assert named(Subject(base)) == "tiny"
    assert named(Subject(ModelSection(name_or_path="Qwen/Qwen3-8B"))) == "Qwen3-8B"
    assert named(Subject(ModelSection(name_or_path=f"{model_dir}/"))) == model_dir.name
    assert named(Subject(base, adapter=adapter)) == "mine"
    assert named(Subject(base, adapter=step)) == "paint-step-6"
    assert named(Subject(base, checkpoint=step)) == "paint-step-6"
    (run_dir / "checkpoints" / "best").symlink_to("step-4", target_is_directory=True)
    assert named(Subject(base, adapter=run_dir / "checkpoints" / "best")) == "paint-step-4"
    monkeypatch.chdir(run_dir)
    assert named(Subject(base, adapter=Path("checkpoints/step-6"))) == "paint-step-6"
    assert named(Subject(ModelSection(name_or_path="."))) == "paint"


def test_the_digest_is_of_what_decides() -> None:
    subject = Subject(ModelSection(name_or_path="tiny"))
    first = default_directory(subject, {"seed": 0, "top_p": 1.0})
    assert default_directory(subject, {"top_p": 1.0, "seed": 0}) == first
    assert default_directory(subject, {"seed": 1, "top_p": 1.0}) != first


@pytest.mark.parametrize(
    ("suffix", "message"),
    [
        (":42", "has no step-42; it has step-4, step-6; give one of these, last"),
        (":step-42", "has no step-42; it has step-4, step-6; give one of these, last"),
        (":foo", "has no foo; it has step-4, step-6; give one of these, last"),
        (":best", "has no best; it has step-4, step-6; give one of these, last"),
    ],
)
def test_a_step_that_a_run_has_not(run_dir: Path, suffix: str, message: str) -> None:
    with pytest.raises(ValueError, match="has no") as refused:
        find_adapter(f"{run_dir}{suffix}")
    assert str(refused.value) == f"--adapter {run_dir}{suffix}: {run_dir} {message}"


def test_the_best_is_offered_where_there_is_one(run_dir: Path) -> None:
    (run_dir / "checkpoints" / "best").symlink_to("step-4", target_is_directory=True)
    with pytest.raises(ValueError, match="give one of these, best or last"):
        find_adapter(f"{run_dir}:42")


def test_what_is_no_adapter(adapter: Path, model_dir: Path, tmp_path: Path) -> None:
    cases = {
        str(model_dir): f"is a whole model, and no adapter; give it as --model {model_dir}",
        f"{model_dir}:best": f"is a whole model, and no adapter; give it as --model {model_dir}",
        f"{adapter}:step-4": "is one adapter, and no run directory with several; give it without",
        f"{adapter}:4": "is one adapter, and no run directory with several; give it without",
        str(tmp_path): "holds none; needs an adapter",
        f"{tmp_path / 'nowhere'}:4": "is no directory; needs an adapter",
    }
    for text, message in cases.items():
        with pytest.raises(ValueError, match="--adapter") as refused:
            find_adapter(text)
        assert str(refused.value).startswith(f"--adapter {text}: ")
        assert message in str(refused.value)


def test_the_base_that_an_adapter_was_trained_on(
    adapter: Path, run_dir: Path, model_dir: Path, tmp_path: Path
) -> None:
    def other(path: Path, model: str | None) -> str | None:
        return other_base(find_subject(model, str(path), "auto", trust_remote_code=False))

    step = run_dir / "checkpoints" / "step-6"
    config = json.loads((step / "adapter_config.json").read_text())
    for path in (adapter, step):
        assert other(path, None) is None
        assert other(path, str(model_dir)) is None
        assert other(path, os.path.relpath(model_dir)) is None
        assert other(path, "tiny") == str(model_dir)
    # A run's word goes before its adapter's.
    (step / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "elsewhere"})
    )
    assert other(step, str(model_dir)) is None
    (adapter / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": None})
    )
    assert other(adapter, "tiny") is None
    with pytest.raises(ValueError, match="does not say which model it was trained from"):
        other(adapter, None)


def test_an_adapter_on_another_base_gets_a_note_and_no_warning_of_peft(
    adapter: Path,
    model_dir: Path,
    tmp_path: Path,
    write_rows: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    moved = shutil.copytree(model_dir, tmp_path / "moved")
    # Warnings are errors here.
    check_adapter(find_subject(str(moved), str(adapter), "auto", trust_remote_code=False))
    rows = write_rows(tmp_path / "rows.jsonl", 2)
    for model, notes in ((moved, 1), (model_dir, 0)):
        evaluate.main(
            [
                *("--model", str(model), "--adapter", str(adapter), "--benchmarks", str(rows)),
                *("--num-samples", "1", "--max-new-tokens", "4", "--engine", "builtin"),
                *("--device", "cpu", "--output", str(tmp_path / f"out-{notes}")),
            ]
        )
        printed = capsys.readouterr()
        note = f"note: the adapter {adapter} was trained on {model_dir}, and is put on {model} here"
        assert printed.out.count(note) == notes
        assert "was renamed" not in printed.out + printed.err


def test_without_output_a_run_s_evaluation_is_filed_under_its_name(
    command: list[str],
    run_main: Callable[[Sequence[str]], int],
    tmp_path: Path,
    write_rows: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert run_main(command) == 0
    monkeypatch.chdir(tmp_path)
    rows = write_rows(tmp_path / "rows.jsonl", 2)
    last = list_checkpoints(tmp_path / "run")[-1].name
    arguments = [
        *("--adapter", "run", "--benchmarks", str(rows), "--num-samples", "1", "--device", "cpu"),
        *("--max-new-tokens", "4", "--engine", "builtin"),
    ]
    evaluate.main(arguments)
    (directory,) = (tmp_path / "evaluations").iterdir()
    assert directory.name.rpartition("-")[0] == f"run-{last}"
