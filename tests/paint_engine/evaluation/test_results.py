"""An evaluation's numbers against hand-computed ones, and what is recorded of who sampled them."""

import importlib.metadata
import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from paint_engine import evaluate
from paint_engine.config.sections import EvalSection, PromptsSection
from paint_engine.evaluation.results import (
    add_versions,
    measures,
    read_versions,
    results_table,
    summarise_benchmarks,
)
from paint_engine.evaluation.store import (
    EvalSample,
    Evaluation,
    Header,
    SampleFiles,
    evaluation_settings,
)
from paint_engine.files import read_jsonl
from paint_engine.files.terminal import Terminal

LATE = "the comparison took longer than 5 s"


def sample(
    problem: str, index: int, num_tokens: int, answer: str | None, **rest: Any
) -> EvalSample:
    fields = {"correct": False, "truncated": False, "error": None} | rest
    return EvalSample(problem, index, "", num_tokens, answer, **fields)


# In "a" half of the answers are correct, three have a box, and none was cut.
A = [
    sample("a", 0, 10, "7", correct=True),
    sample("a", 1, 20, "7", correct=True),
    sample("a", 2, 30, "8"),
    sample("a", 3, 40, None),
]
# In "b" one is, all have a box, one was cut, and three were not checked, two of which vote as one.
B = [
    sample("b", 0, 100, "7", correct=True),
    sample("b", 1, 200, "8", error=LATE),
    sample("b", 2, 300, "8", error=LATE),
    sample("b", 3, 400, "9", error=LATE, truncated=True),
]
# Another benchmark, with one problem, three of whose answers were cut without one.
C = [sample("c", j, 1000, None, truncated=True) for j in range(3)] + [sample("c", 3, 2000, "3")]


def evaluation(name: str, samples: list[EvalSample], seconds: float) -> Evaluation:
    problems = dict.fromkeys((s.problem_id for s in samples), "mark")
    settings = evaluation_settings(EvalSection(num_samples=4), 0, PromptsSection(instruction="Go."))
    return Evaluation(Header(name, settings, {}, problems), seconds, samples)


def test_measures_by_hand() -> None:
    found = {name: values.tolist() for name, values in measures([*A, *B]).items()}
    assert found == {
        "avg@4": [0.5, 0.25],
        "pass@1": [0.5, 0.25],
        # Of 6 pairs one holds no correct answer of "a", and three none of "b".
        "pass@2": pytest.approx([5 / 6, 1 / 2]),
        "pass@4": [1.0, 1.0],
        "maj@4": [1.0, 0.0],
        "format_rate": [0.75, 1.0],
        "truncation_rate": [0.0, 0.25],
    }


def test_summaries_by_hand() -> None:
    found = summarise_benchmarks([evaluation("ab", [*A, *B], 1.5), evaluation("c", C, 2.5)])
    ab, c = found["benchmarks"]["ab"], found["benchmarks"]["c"]
    counts = ("num_problems", "num_samples", "checker_errors", "seconds")
    assert [ab[key] for key in counts] == [2, 4, 3, 1.5]
    assert [c[key] for key in counts] == [1, 4, 0, 2.5]
    expected = {
        "avg@4": (0.375, 0.0),
        "pass@1": (0.375, 0.0),
        "pass@2": (2 / 3, 0.0),
        "pass@4": (1.0, 0.0),
        "maj@4": (0.5, 0.0),
        "format_rate": (0.875, 0.25),
        "truncation_rate": (0.125, 0.75),
        # No answer of "c" is correct. The limit is the paper's; all answers of "ab" are shorter.
        "accuracy_within_4864": (0.375, 0.0),
        "accuracy_within_9728": (0.375, 0.0),
        "accuracy_within_19456": (0.375, 0.0),
        "accuracy_within_38912": (0.375, 0.0),
        "mean_length": (137.5, 1250.0),
    }
    # The correct ones have 10, 20 and 100 tokens, and all together 1,100.
    of_correct = {
        "mean_correct_length": 130 / 3,
        "median_correct_length": 20.0,
        "tokens_per_correct": 1100 / 3,
    }
    assert set(found["macro"]) == {*expected, *of_correct} == set(ab) - set(counts)
    undefined = {"value": None, "ci95": None}
    for key, value in of_correct.items():
        assert ab[key]["value"] == pytest.approx(value), key
        assert c[key] == found["macro"][key] == undefined, key
    for key, (first, second) in expected.items():
        assert ab[key]["value"] == pytest.approx(first), key
        assert c[key]["value"] == pytest.approx(second), key
        assert found["macro"][key]["value"] == pytest.approx((first + second) / 2), key
    # Both resampled problems are the one or the other in one draw of four.
    assert ab["mean_length"]["ci95"] == [25.0, 250.0]
    assert c["mean_length"]["ci95"] == [1250.0, 1250.0]


def test_the_table_shows_lengths_and_what_is_not_defined() -> None:
    found = summarise_benchmarks([evaluation("ab", [*A, *B], 1.5), evaluation("c", C, 2.5)])
    printed = io.StringIO()
    Terminal(width=120, file=printed).print(results_table(found))
    rows = {
        cells[0]: cells[1:]
        for line in printed.getvalue().splitlines()
        if (cells := [cell.strip() for cell in line.strip("│").split("│")])[1:]
    }
    assert rows["correct within 4,864 tokens"][:2] == ["37.5 [25.0, 50.0]", "0.0 [0.0, 0.0]"]
    assert rows["tokens, mean"][:2] == ["138 [25, 250]", "1,250 [1,250, 1,250]"]
    assert rows["tokens if correct, mean"] == ["43 [15, 100]", "-", "-"]
    assert rows["tokens if correct, median"] == ["20 [15, 100]", "-", "-"]
    assert rows["tokens per correct answer"] == ["367 [50, 1,000]", "-", "-"]


def test_versions_are_listed_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_versions(tmp_path) == []
    for command, num_processes in (("one", 1), ("one", 1), ("two", 1), ("two", 8), ("one", 1)):
        monkeypatch.setattr(sys, "argv", [command])
        add_versions(tmp_path, num_processes)
    found = [(entry["command"], entry["world_size"]) for entry in read_versions(tmp_path)]
    assert found == [(["one"], 1), (["two"], 1), (["two"], 8)]
    assert [path.name for path in tmp_path.iterdir()] == ["versions.json"]


def test_what_sampled_is_recorded_and_what_displays_is_not(
    model_dir: Path,
    tmp_path: Path,
    write_rows: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also of a command that was cut short; here under a name that reads as a pattern."""
    rows, out = write_rows(tmp_path / "rows[24].jsonl", 3), tmp_path / "out"

    def recorded(command: str, benchmarks: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", [command])
        evaluate.main(
            [
                *("--model", str(model_dir), "--benchmarks", benchmarks, "--num-samples", "2"),
                *("--max-new-tokens", "6", "--max-sequences", "2", "--engine", "builtin"),
                *("--device", "cpu", "--output", str(out)),
            ]
        )
        versions = json.loads((out / "results.json").read_text())["versions"]
        assert versions == json.loads((out / "versions.json").read_text())
        assert {entry["torch"] for entry in versions} == {importlib.metadata.version("torch")}
        return [entry["command"][0] for entry in versions]

    original = SampleFiles.append

    def interrupted(self: SampleFiles, group: Sequence[EvalSample]) -> None:
        original(self, group)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SampleFiles, "append", interrupted)
        with pytest.raises(SystemExit) as stop:
            recorded("cut", str(rows))
    assert stop.value.code == 130
    assert not (out / "results.json").exists()
    num_kept = len(read_jsonl(out / "rows[24].rank-0.jsonl")) - 1
    assert 1 <= num_kept < 6
    capsys.readouterr()
    assert recorded("finish", str(rows)) == ["cut", "finish"]
    assert f"rows[24] ({6 - num_kept} left for this process)" in capsys.readouterr().out
    assert not list(out.glob("*rank*"))
    assert recorded("show", str(rows)) == ["cut", "finish"]
    assert "rows[24]: complete already, nothing was sampled" in capsys.readouterr().out
    assert recorded("more", f"{rows},more={rows}") == ["cut", "finish", "more"]
