"""Runs whose completions become shorter: one note, the summary and the report; also resumed."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from paint_engine.evaluation import answers
from paint_engine.evaluation.store import EvalSample, read_evaluations
from paint_engine.files import read_jsonl
from paint_engine.monitor import ShorteningWatch, shortening
from paint_engine.training.summary import (
    evaluation_metrics,
    evaluation_row,
    evaluation_shortenings,
)

Main = Callable[[Sequence[str]], int]
# By step, from 1: shorter at step 2, as before at step 4, and shorter again at step 5.
LENGTHS = (100, 70, 70, 100, 60, 60)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[tuple[int, bool]]]:
    """Gives the rollouts of each step their length of LENGTHS, compares each step with the first;
    the rollouts' own lengths, by step."""
    original, seen = ShorteningWatch.add, {}

    def add(self: ShorteningWatch, step: int, completions: Iterable[tuple[int, bool]]) -> None:
        seen[step] = list(completions)
        original(self, step, [(LENGTHS[step - 1], False)] * len(seen[step]))

    monkeypatch.setattr(ShorteningWatch, "add", add)
    monkeypatch.setattr(shortening, "WINDOW", 1)
    monkeypatch.setattr(shortening, "MIN_COMPARED", 1)
    return seen


def notes(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if "shorter than" in line]


def test_rollouts_that_become_shorter_are_noted_once(
    command: list[str],
    run_main: Main,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    measured: dict[int, list[tuple[int, bool]]],
) -> None:
    arguments = [*command, "--eval.enabled", "false"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run_main([*arguments, "--run.dir", str(whole), "--train.num_steps", "6"]) == 0
    printed = notes(capsys.readouterr().out)
    assert [line.split(" are ")[0] for line in printed] == [
        "note: the rollouts of steps 2 to 2",
        "note: the rollouts of steps 5 to 5",
    ]
    assert (
        "40% shorter than those of steps 1 to 1: the mean is 60 tokens and was 100;" in printed[1]
    )
    for metrics in read_jsonl(whole / "metrics.jsonl"):
        own = measured[metrics["step"]]
        assert sum(length for length, _ in own) / 3 == pytest.approx(metrics["completion_length"])
        assert sum(was_cut for _, was_cut in own) / 3 == pytest.approx(metrics["truncation_rate"])
    summary = json.loads((whole / "summary.json").read_text())
    assert [entry["step"] for entry in summary["shortenings"]] == [2, 5]
    page = (whole / "report.html").read_text()
    for entry, line in zip(summary["shortenings"], printed, strict=True):
        assert f"note: {entry['note']}" == line
        assert f"<li>{entry['note']}.</li>".replace("'", "&#39;") in page

    assert run_main([*arguments, "--run.dir", str(cut), "--train.num_steps", "3"]) == 0
    assert len(notes(capsys.readouterr().out)) == 1
    assert run_main(["--resume", str(cut), "--train.num_steps", "6"]) == 0
    assert len(notes(capsys.readouterr().out)) == 1
    resumed = json.loads((cut / "summary.json").read_text())
    assert resumed["shortenings"] == summary["shortenings"]


def test_reference_solutions_are_no_rollouts(
    command: list[str],
    run_main: Main,
    capsys: pytest.CaptureFixture[str],
    measured: dict[int, list[tuple[int, bool]]],
) -> None:
    arguments = [*command, "--objective.name", "sft", "--eval.enabled", "false"]
    assert run_main([*arguments, "--train.num_steps", "2"]) == 0
    assert measured == {} and notes(capsys.readouterr().out) == []


def test_evaluations_with_shorter_answers_are_noted_once(
    command: list[str],
    run_main: Main,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Six answers each: of 100 tokens before training, of 60 after 2 steps and of 50 after 4."""
    original, judged = answers._judged, []

    def shortened(*arguments) -> EvalSample:
        length = (100, 60, 50)[len(judged) // 6]
        judged.append(replace(original(*arguments), num_tokens=length, truncated=False))
        return judged[-1]

    monkeypatch.setattr(answers, "_judged", shortened)
    monkeypatch.setattr(shortening, "MIN_COMPARED", 6)
    assert run_main([*command, "--eval.every", "2"]) == 0
    (printed,) = notes(capsys.readouterr().out)
    assert printed.startswith(
        "note: the answers after 2 steps are 40% shorter than the base's: the mean is 60 tokens "
        "and was 100;"
    )
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert [(s["step"], s["before"], s["after"]) for s in summary["shortenings"]] == [
        (2, 100.0, 60.0),
        (4, 100.0, 50.0),
    ]
    assert [row["mean_length"] for row in summary["evaluations"]] == [100.0, 60.0, 50.0]
    page = (run / "report.html").read_text()
    assert "the answers after 4 steps are 50% shorter" in page
    assert "Accuracy by length budget" in page
    # A finished evaluation is not noted again.
    assert run_main(["--resume", str(run)]) == 0
    assert notes(capsys.readouterr().out) == []


def test_the_numbers_of_an_evaluation_by_hand(
    command: list[str], run_main: Main, tmp_path: Path
) -> None:
    """Three problems with two answers each; the limit is 6 tokens."""
    assert run_main([*command, "--train.num_steps", "1"]) == 0
    run = tmp_path / "run"
    found = read_evaluations(run)[0]["test"]
    lengths, correct = (1, 6, 3, 2, 6, 6), (True, False, True, True, False, True)
    planted = [
        replace(sample, num_tokens=length, correct=is_right, truncated=length == 6)
        for sample, length, is_right in zip(found.samples, lengths, correct, strict=True)
    ]
    assert evaluation_row(3, {"test": replace(found, samples=planted)}) == {
        "step": 3,
        "avg_at_k": 4 / 6,
        "pass_at_k": {"1": pytest.approx(4 / 6), "2": 1.0},
        "accuracy_within": {"1": 1 / 6, "3": 3 / 6, "6": 4 / 6},
        "mean_length": 4.0,
        "mean_correct_length": 3.0,
        "median_correct_length": 2.5,
        "tokens_per_correct": 6.0,
        "truncation_rate": 0.5,
    }
    assert evaluation_metrics(3, {"test": replace(found, samples=planted)}) == {
        "step": 3,
        "eval_avg_at_k": 4 / 6,
        "eval_pass_at_1": pytest.approx(4 / 6),
        "eval_pass_at_2": 1.0,
        "eval_accuracy_within_1": 1 / 6,
        "eval_accuracy_within_3": 3 / 6,
        "eval_accuracy_within_6": 4 / 6,
        "eval_mean_length": 4.0,
        "eval_mean_correct_length": 3.0,
        "eval_median_correct_length": 2.5,
        "eval_tokens_per_correct": 6.0,
        "eval_truncation_rate": 0.5,
    }
    wrong = [replace(sample, correct=False) for sample in planted]
    row = evaluation_row(0, {"test": replace(found, samples=wrong)})
    assert (row["mean_length"], row["accuracy_within"]) == (4.0, {"1": 0.0, "3": 0.0, "6": 0.0})
    assert row["mean_correct_length"] is row["median_correct_length"] is None
    assert row["tokens_per_correct"] is None
    metrics = evaluation_metrics(0, {"test": replace(found, samples=wrong)})
    assert metrics.keys() >= {"eval_mean_length", "eval_accuracy_within_6"}
    assert not metrics.keys() & {"eval_mean_correct_length", "eval_tokens_per_correct"}
    # Six answers are too few to tell.
    assert evaluation_shortenings({0: {"test": found}, 1: {"test": found}}) == []
    assert evaluation_shortenings({1: {"test": found}}) == []
    summary = json.loads((run / "summary.json").read_text())
    assert summary["evaluations"][0] == evaluation_row(0, {"test": found})
