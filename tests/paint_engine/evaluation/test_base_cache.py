"""The base is evaluated once: runs and commands of the same base, data and sampling reuse it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from exit_codes import exit_code

from paint_engine import evaluate, train
from paint_engine.evaluation import base_cache
from paint_engine.evaluation import run as evaluation_run
from paint_engine.evaluation.base_cache import base_cache_of, cache_header, find_base, keep_base
from paint_engine.evaluation.store import (
    EvalSample,
    Evaluation,
    Header,
    read_evaluation,
    read_evaluations,
)
from paint_engine.files import BadFile
from paint_engine.training import evaluations as run_eval

SETTINGS: dict[str, Any] = {"num_samples": 1, "max_new_tokens": 6, "seed": 0, "temperature": 1.0}
HEADER = Header("a", SETTINGS, {"model": "m", "weights": "0f"}, {"a:1": "77"}, step=0)
SAMPLE = EvalSample("a:1", 0, "It is 3.", 5, "3", True, False, None)


def drawn(patch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of answers that are sampled from now on."""
    found: list[int] = []

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def counts(*arguments: Any, **options: Any) -> Any:
            found.append(len(arguments[4]))
            return original(*arguments, **options)

        return counts

    for module in (run_eval, evaluation_run):
        patch.setattr(module, "evaluate", counted(module.evaluate))
    return found


def test_an_entry_is_found_by_what_its_answers_depend_on_and_by_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = cache_header(HEADER)
    assert entry is not None and find_base(tmp_path / "none", entry) is None
    file = keep_base(tmp_path, entry, Evaluation(HEADER, 2.5, [SAMPLE]))
    # Another process that made the same one at the same time.
    assert keep_base(tmp_path, entry, Evaluation(HEADER, 3.5, [SAMPLE])) == file
    found = find_base(tmp_path, entry)
    assert found == (file, Evaluation(entry, 3.5, [SAMPLE]))
    changes: list[dict[str, Any]] = [
        {"benchmark": "b"},
        {"settings": SETTINGS | {"temperature": 0.6}},
        {"settings": SETTINGS | {"instruction": "Think."}},
        {"settings": SETTINGS | {"reward_function": "first_box"}},
        {"subject": {"model": "m", "weights": "1f"}},
        {"subject": {"model": "m", "weights": "0f", "engine": "vllm"}},
        {"problems": {"a:1": "78"}},
    ]
    for change in changes:
        other = cache_header(replace(HEADER, **change))
        assert other is not None and find_base(tmp_path, other) is None, change
    monkeypatch.setattr(base_cache, "package_versions", lambda: {"math-verify": "0.0"})
    newer = cache_header(HEADER)
    assert newer is not None and find_base(tmp_path, newer) is None


def test_a_function_of_the_user_s_is_not_trusted_to_stay_the_same() -> None:
    own = replace(HEADER, settings=SETTINGS | {"reward_function": "mine:judge"})
    assert cache_header(own) is None


def test_the_directory_is_beside_the_run_another_one_or_none(tmp_path: Path) -> None:
    run = Path("runs/a")
    assert base_cache_of("auto", run) == Path("runs/base-evaluations")
    assert base_cache_of("auto", Path(".")) == Path.cwd().parent / "base-evaluations"
    assert base_cache_of("/shared/bases", run) == Path("/shared/bases")
    assert base_cache_of(None, run) is None
    (tmp_path / "base-evaluations").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadFile, match=r"is a link to .*elsewhere'; .*--eval\.base_cache"):
        base_cache_of("auto", tmp_path / "run")


def test_later_runs_and_commands_reuse_the_first_run_s_evaluation(
    command: list[str],
    run_main: Callable[[Sequence[str]], int],
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    numbers, cache = drawn(monkeypatch), tmp_path / "base-evaluations"
    training = [*command, "--train.num_steps", "1", "--rollout.engine", "builtin"]
    training += [
        "--eval.base_cache",
        "auto",
        "--eval.sampling_seed",
        "5",
        "--eval.num_problems",
        "none",
    ]
    assert run_main([*training, "--run.dir", str(tmp_path / "first")]) == 0
    assert numbers == [6, 6] and len(list(cache.glob("test-*.json"))) == 1
    (file,) = cache.glob("test-*.json")
    capsys.readouterr()
    numbers.clear()
    # Another seed of training, the same seed of answers.
    again = [*training, "--run.dir", str(tmp_path / "second"), "--train.seed", "1"]
    assert run_main(again) == 0
    assert numbers == [6]
    assert f"test: the base's evaluation is reused, from {file}" in flat(capsys.readouterr().out)
    first, second = (read_evaluations(tmp_path / name)[0]["test"] for name in ("first", "second"))
    assert first.samples == second.samples and second.seconds == 0.0
    summary = json.loads((tmp_path / "second" / "summary.json").read_text())
    assert summary["evaluations"][0]["step"] == 0
    numbers.clear()
    cold = [*training, "--run.dir", str(tmp_path / "third"), "--eval.temperature", "0.7"]
    assert run_main(cold) == 0
    assert numbers == [6, 6] and len(list(cache.glob("test-*.json"))) == 2
    numbers.clear()
    main = partial(exit_code, evaluate.main)
    flags = ("--benchmarks", tmp_path / "test.jsonl", "--num-samples", 2, "--max-new-tokens", 6)
    flags += ("--engine", "builtin", "--device", "cpu", "--seed", 5, "--model", model_dir)
    # The tiny preset's.
    flags += ("--thinking", "false")
    out = ("--output", tmp_path / "out")
    assert main(*flags, *out, "--base-cache", cache) == 0
    assert numbers == [] and "reused, from" in capsys.readouterr().out
    assert read_evaluation(tmp_path / "out" / "test.json").samples == first.samples
    assert main(*flags, "--output", tmp_path / "own") == 0
    assert numbers == [6]


def flat(text: str) -> str:
    """The text without the console's line breaks."""
    return " ".join(text.split())


def test_a_place_that_cannot_be_written_is_a_note_and_a_link_is_refused(
    command: list[str],
    run_main: Callable[[Sequence[str]], int],
    model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    training = [*command, "--train.num_steps", "1", "--rollout.engine", "builtin"]
    (tmp_path / "file").touch()
    place = ["--eval.base_cache", str(tmp_path / "file" / "below")]
    assert run_main([*training, *place]) == 0
    note = "note: the base's evaluation is not kept for other runs"
    assert note in flat(capsys.readouterr().out)
    flags = ("--benchmarks", tmp_path / "test.jsonl", "--num-samples", 1, "--max-new-tokens", 6)
    flags += ("--engine", "builtin", "--device", "cpu", "--model", model_dir)
    flags += ("--base-cache", tmp_path / "file" / "below", "--output", tmp_path / "out")
    assert exit_code(evaluate.main, *flags) == 0
    printed = capsys.readouterr()
    assert f"{note}: " in flat(printed.out + printed.err)
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "test.json").symlink_to(tmp_path / "elsewhere.json")
    other = ["--run.dir", str(tmp_path / "other"), "--eval.base_cache", str(cache)]
    assert exit_code(train.main, *training, *other) == 1
    printed = flat(capsys.readouterr().out)
    assert "test.json is a symbolic link to" in printed
