"""What two flags name: the directory of an evaluation says it, an adapter on another base is told
of, and each mistake gets the advice that helps."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from peft import PeftModel
from safetensors.torch import load_file, save_file

from paint_engine import evaluate
from paint_engine.checkpoint.directory import list_checkpoints
from paint_engine.config.sections import INSTRUCTION, ModelSection, PromptsSection
from paint_engine.evaluation.plan import mismatches
from paint_engine.evaluation.target import (
    _PIECE_BYTES,
    Target,
    check_target,
    default_directory,
    find_adapter,
    find_target,
    mismatched_base,
)


@pytest.fixture
def adapter(lora_model: PeftModel, model_dir: Path, tmp_path: Path) -> Path:
    """In peft's format, trained on `model_dir` according to its configuration."""
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


def named(target: Target) -> str:
    directory = default_directory(target, {"seed": 0})
    assert directory.parent == Path("evaluations")
    return directory.name.rpartition("-")[0]


def test_a_directory_is_named_after_what_is_evaluated(
    adapter: Path, run_dir: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, step = ModelSection(name_or_path="tiny"), run_dir / "checkpoints" / "step-6"
    assert named(Target(base)) == "tiny"
    assert named(Target(ModelSection(name_or_path="Qwen/Qwen3-8B"))) == "Qwen3-8B"
    assert named(Target(ModelSection(name_or_path=f"{model_dir}/"))) == model_dir.name
    assert named(Target(base, adapter=adapter)) == "mine"
    assert named(Target(base, adapter=step)) == "paint-step-6"
    assert named(Target(base, checkpoint=step)) == "paint-step-6"
    (run_dir / "checkpoints" / "best").symlink_to("step-4", target_is_directory=True)
    assert named(Target(base, adapter=run_dir / "checkpoints" / "best")) == "paint-step-4"
    monkeypatch.chdir(run_dir)
    assert named(Target(base, adapter=Path("checkpoints/step-6"))) == "paint-step-6"
    assert named(Target(ModelSection(name_or_path="."))) == "paint"


def identity(
    model: object, adapter: Path | None = None, *, trusted: bool = False
) -> dict[str, Any]:
    given = None if adapter is None else str(adapter)
    target = find_target(str(model), given, "auto", trust_remote_code=trusted)
    return target.identity("builtin", torch.float32)


def differing(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    return sorted(k for k in first.keys() | second.keys() if first.get(k) != second.get(k))


def test_one_number_of_any_tensor_is_seen_at_its_start_middle_and_end(
    model_dir: Path, tmp_path: Path
) -> None:
    """And that no more is read of a tensor than that: elsewhere it is not seen."""
    model = shutil.copytree(model_dir, tmp_path / "model")
    file = model / "model.safetensors"
    before, weights = identity(model), load_file(file)
    assert len(weights) > 20
    seen = {before["weights"]}
    for name, tensor in weights.items():
        for place in (0, tensor.numel() // 2, -1):
            changed = tensor.clone()
            changed.view(-1)[place] += 1
            save_file(weights | {name: changed}, file, metadata={"format": "pt"})
            after = identity(model)
            assert differing(before, after) == ["weights"]
            seen.add(after["weights"])
    assert len(seen) == 1 + 3 * len(weights)
    largest = max(weights, key=lambda name: weights[name].numel())
    changed = weights[largest].clone()
    assert changed.numel() * changed.element_size() > 4 * _PIECE_BYTES
    changed.view(-1)[changed.numel() // 4] += 1
    save_file(weights | {largest: changed}, file, metadata={"format": "pt"})
    assert identity(model) == before
    save_file(weights, file, metadata={"format": "pt", "more": "x"})
    assert differing(before, identity(model)) == ["weights"]


def test_the_small_files_are_named(adapter: Path, model_dir: Path, tmp_path: Path) -> None:
    model = shutil.copytree(model_dir, tmp_path / "model")
    before = identity(model, adapter)
    names = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    names |= {"adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"}
    assert before.keys() == names | {"model", "commit", "weights", "dtype", "engine"}
    assert before["commit"] is None
    for name in names:
        file = (adapter if name.startswith("adapter") else model) / name
        content = file.read_bytes()
        file.write_bytes(content + b"\n")
        assert differing(before, identity(model, adapter)) == [name]
        file.write_bytes(content)
    (model / "generation_config.json").unlink()
    assert differing(before, identity(model, adapter)) == ["generation_config.json"]
    more = ["added_tokens.json", "merges.txt", "special_tokens_map.json", "vocab.json"]
    for name in more:
        (model / name).write_text("a b")
    names = sorted(["generation_config.json", *more])
    assert differing(before, identity(model, adapter)) == names


def test_code_counts_where_it_is_run(model_dir: Path, tmp_path: Path) -> None:
    model = shutil.copytree(model_dir, tmp_path / "model")
    before = [identity(model, trusted=trusted) for trusted in (False, True)]
    assert before[0] == before[1]
    (model / "modeling_mine.py").write_text("a = 1")
    assert identity(model) == before[0]
    first = identity(model, trusted=True)
    assert differing(before[1], first) == ["modeling_mine.py"]
    (model / "modeling_mine.py").write_text("a = 2")
    assert differing(first, identity(model, trusted=True)) == ["modeling_mine.py"]


@pytest.mark.parametrize("damage", [b"", b"no", b"\xff" * 5000, None])
def test_damaged_weights_are_named(model_dir: Path, tmp_path: Path, damage: bytes | None) -> None:
    model = shutil.copytree(model_dir, tmp_path / "model")
    file = model / "model.safetensors"
    # A download that was cut short.
    file.write_bytes(file.read_bytes()[:-100] if damage is None else damage)
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read \(.+\); save or"):
        identity(model)


def test_weights_that_are_not_there_are_named(model_dir: Path, tmp_path: Path) -> None:
    """Of several files: a link to nowhere, and a directory of that name."""
    model = shutil.copytree(model_dir, tmp_path / "model")
    link = model / "more.safetensors"
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"more\.safetensors cannot be read \(.+\); save or"):
        identity(model)
    link.unlink()
    link.mkdir()
    with pytest.raises(ValueError, match=r"more\.safetensors cannot be read \(.+\); save or"):
        identity(model)


def test_another_commit_of_a_model_of_the_hub_is_another_model(
    model_dir: Path,
    tmp_path: Path,
    write_rows: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As someone pushes to it, and the cache is brought up to date."""
    cache, commits = tmp_path / "models--someone--model", ("a" * 40, "b" * 40)
    for commit in commits:
        shutil.copytree(model_dir, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    arguments = [
        *("--model", "someone/model", "--benchmarks", str(write_rows(tmp_path / "rows.jsonl", 2))),
        *("--num-samples", "1", "--max-new-tokens", "4", "--engine", "builtin"),
        *("--device", "cpu", "--output", str(tmp_path / "out")),
    ]
    (cache / "refs" / "main").write_text(commits[0])
    evaluate.main(arguments)
    header = json.loads((tmp_path / "out" / "rows.json").read_text())
    assert header["subject"]["model"] == "someone/model"
    assert header["subject"]["commit"] == commits[0]
    (cache / "refs" / "main").write_text(commits[1])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        evaluate.main(arguments)
    printed = capsys.readouterr().out
    assert f"with commit '{commits[0]}' and not '{commits[1]}'; needs" in printed
    assert identity("someone/unknown")["commit"] is None


def test_ranks_with_other_commits_in_their_caches_are_refused(
    model_dir: Path,
    tmp_path: Path,
    write_rows: Callable[..., Path],
    torchrun: Callable[..., subprocess.Popen[str]],
    printed_by: Callable[[subprocess.Popen[str], float], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on two nodes of which one has fetched the model before it was pushed to."""
    for rank, commit in enumerate(("a" * 40, "b" * 40)):
        cache = tmp_path / str(rank) / "models--someone--model"
        shutil.copytree(model_dir, cache / "snapshots" / commit)
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text(commit)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = write_rows(tmp_path / "rows.jsonl", 2)
    command = [
        *(sys.executable, "-m", "paint_engine.evaluate", "--model", "someone/model"),
        *("--benchmarks", str(rows), "--num-samples", "1", "--max-new-tokens", "4"),
        *("--engine", "builtin", "--device", "cpu", "--output", str(tmp_path / "out")),
    ]
    shell = f"export HF_HUB_CACHE={shlex.quote(str(tmp_path))}/$RANK; exec {shlex.join(command)}"
    process = torchrun(2, "--no-python", "bash", "-c", shell)
    printed = printed_by(process, 600)
    assert process.returncode != 0
    message = f"the first one, which has commit '{'a' * 40}' and not '{'b' * 40}'; needs the same"
    assert message in printed, printed[-3000:]
    assert not (tmp_path / "out").exists()


def test_the_digest_is_of_what_decides() -> None:
    target = Target(ModelSection(name_or_path="tiny"))
    first = default_directory(target, {"seed": 0, "top_p": 1.0})
    assert default_directory(target, {"top_p": 1.0, "seed": 0}) == first
    assert default_directory(target, {"seed": 1, "top_p": 1.0}) != first


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
        str(model_dir): f"is a whole model, not an adapter; give it as --model {model_dir}",
        f"{model_dir}:best": f"is a whole model, not an adapter; give it as --model {model_dir}",
        f"{adapter}:step-4": "is one adapter, not a run directory with several; give it without",
        f"{adapter}:4": "is one adapter, not a run directory with several; give it without",
        str(tmp_path): "holds no adapter; needs an adapter",
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
        return mismatched_base(find_target(model, str(path), "auto", trust_remote_code=False))

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


def test_a_run_that_was_trained_on_another_message_gets_a_note(
    run_dir: Path, adapter: Path, model_dir: Path
) -> None:
    def notes(prompts: dict[str, str], *, path: Path = run_dir / "checkpoints/step-6") -> list[str]:
        target = find_target(str(model_dir), str(path), "auto", trust_remote_code=False)
        return mismatches(target, PromptsSection.model_validate(prompts))

    asked = {"student_template": "Q {problem} {instruction}", "instruction": "It's."}
    template = "--student-template 'Q {problem} {instruction}'"
    instruction = "--instruction 'It'\"'\"'s.'"
    config = run_dir / "config.toml"
    plain = config.read_text() + "[prompts]\n"
    # A run of the defaults, asked otherwise.
    (note,) = notes({"instruction": "Go."})
    assert note.startswith(
        f"{run_dir}/checkpoints/step-6 was trained with another student prompt than"
    )
    assert f"give --instruction {shlex.quote(INSTRUCTION)}" in note
    assert notes({}) == notes(asked, path=adapter) == []
    config.write_text(plain + f"student_template = '{asked['student_template']}'\n")
    assert notes({})[0].endswith(f"give {template}")
    config.write_text(config.read_text() + f"instruction = {json.dumps(asked['instruction'])}\n")
    assert notes({})[0].endswith(f"give {template} {instruction}")
    assert notes(asked | {"instruction": "Go."})[0].endswith(f"give {instruction}")
    assert notes(asked) == notes({"student_template": "Q {problem} It's."}) == []
    # An instruction that only the teacher has read, and that the evaluation would refuse.
    config.write_text(plain + "student_template = 'Q {problem}'\ninstruction = 'Go.'\n")
    assert notes({})[0].endswith("give --student-template 'Q {problem}'")
    assert notes({"student_template": "Q {problem}"}) == []


def test_an_adapter_on_a_mismatched_base_gets_a_note_and_no_warning_of_peft(
    adapter: Path,
    model_dir: Path,
    tmp_path: Path,
    write_rows: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    moved = shutil.copytree(model_dir, tmp_path / "moved")
    # Warnings are errors here.
    target = find_target(str(moved), str(adapter), "auto", trust_remote_code=False)
    check_target(target, "vllm")
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
        note = f"the adapter {adapter} was trained on {model_dir}, and --model puts it on {model};"
        assert printed.out.count(f"note: {note}") == notes
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
