"""Two evaluations side by side: planted differences are found, unlike things are refused."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paint_engine.config.sections import EvalSection, PromptsSection
from paint_engine.distributed import World
from paint_engine.evaluation import compare
from paint_engine.evaluation.accuracy import paired_bootstrap
from paint_engine.evaluation.compare import check_pairs, read_run
from paint_engine.evaluation.flags import parse_comparison
from paint_engine.evaluation.store import (
    EvalSample,
    Header,
    SampleFiles,
    evaluation_settings,
    fingerprints,
)
from paint_engine.files.terminal import Terminal
from paint_engine.types import Problem

WORLD = World(0, 1, 0, torch.device("cpu"))
NUM_SAMPLES = 4
PROBLEMS = [Problem(f"p:{i}", f"What is {i}?", "", str(i)) for i in range(40)]
HEADER = Header(
    "bench",
    evaluation_settings(EvalSection(num_samples=NUM_SAMPLES), 0, PromptsSection(instruction="Go.")),
    {"model": "m"},
    fingerprints(PROBLEMS),
)


def write(
    directory: Path,
    correct: np.ndarray,
    header: Header = HEADER,
    name: str | None = None,
    lengths: np.ndarray | None = None,
) -> None:
    """A complete evaluation with these verdicts, (problems, samples) booleans, and as many lengths
    in tokens, or 5 everywhere."""
    lengths = np.full(correct.shape, 5) if lengths is None else lengths
    files = SampleFiles(directory, name or header.benchmark, header, WORLD, replace=False)
    for problem, row, tokens in zip(header.problems, correct, lengths, strict=True):
        for j, verdict in enumerate(row):
            length, is_correct = int(tokens[j]), bool(verdict)
            files.append([EvalSample(problem, j, "", length, "3", is_correct, False, None)])
    files.finish(1.0)


def counts(*numbers: int) -> np.ndarray:
    """So many correct samples in each problem, and in all later ones the last."""
    rows = [*numbers, *[numbers[-1]] * (len(PROBLEMS) - len(numbers))]
    return np.array([[j < number for j in range(NUM_SAMPLES)] for number in rows])


Run = Callable[..., tuple[dict[str, Any], str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def main(*names: str) -> tuple[dict[str, Any], str]:
        printed = io.StringIO()
        file = tmp_path / "new" / "directory" / "o.json"
        arguments = [*(str(tmp_path / name) for name in names), "--json", str(file)]
        compare.run_comparison(parse_comparison(arguments), Terminal(width=120, file=printed))
        return json.loads(file.read_text()), printed.getvalue()

    return main


def test_a_planted_difference_is_found_with_its_gained_and_lost_problems(
    tmp_path: Path, run: Run
) -> None:
    """Problems 0 to 9 go from 1 to 3 of 4 samples, problem 10 from 4 to 2, the others stay."""
    write(tmp_path / "a", counts(*[1] * 10, 4, 2))
    write(tmp_path / "b", counts(*[3] * 10, 2, 2), replace(HEADER, subject={"model": "n"}))
    found, printed = run("a", "b")
    (other,) = found["others"]
    bench = other["benchmarks"]["bench"]
    planted = (10 * 0.5 - 0.5) / 40
    assert bench["difference"] == pytest.approx(planted)
    assert bench["after"] - bench["before"] == pytest.approx(planted)
    # The standard error of a mean of 40 values of which ten are 0.5 and one is -0.5.
    values = np.array([0.5] * 10 + [-0.5] + [0.0] * 29)
    half = 1.96 * values.std() / 40**0.5
    assert bench["ci95"] == pytest.approx([planted - half, planted + half], abs=0.15 * half)
    assert bench["gained"] == [f"p:{i}" for i in range(10)]
    # Two of four are no majority.
    assert bench["lost"] == ["p:10"]
    assert other["macro"]["difference"] == pytest.approx(planted)
    assert "bench, lost: p:10" in printed
    assert "+11.2" in printed or "+11.3" in printed


def test_lengths_are_compared_within_each_problem(tmp_path: Path, run: Run) -> None:
    """Two problems, paired across names and order: 800 tokens become 700, and 6,000 become 5,000
    and 4,000."""
    problems = PROBLEMS[:2]
    renamed = [replace(problems[i], problem_id=f"other[{i}]") for i in (1, 0)]
    before, after = (
        replace(HEADER, settings=HEADER.settings | {"num_samples": 2}, problems=fingerprints(of))
        for of in (problems, renamed)
    )
    right = np.array([[True, False], [True, True]])
    write(tmp_path / "a", right, before, lengths=np.array([[800, 800], [6000, 6000]]))
    write(tmp_path / "b", right[::-1], after, lengths=np.array([[5000, 4000], [700, 700]]))
    found, printed = run("a", "b")
    changes = found["others"][0]["benchmarks"]["bench"]["lengths"]
    assert {key: (c["before"], c["after"], c["difference"]) for key, c in changes.items()} == {
        # The answer of 4,000 tokens.
        "accuracy_within_4864": (0.25, 0.5, 0.25),
        **{f"accuracy_within_{n}": (0.75, 0.75, 0.0) for n in (9728, 19456, 38912)},
        "mean_length": (3400.0, 2600.0, -800.0),
        "mean_correct_length": pytest.approx((12800 / 3, 9700 / 3, -3100 / 3)),
        "median_correct_length": (6000.0, 4000.0, -2000.0),
        "tokens_per_correct": pytest.approx((13600 / 3, 10400 / 3, -3200 / 3)),
    }
    # Both resampled problems are the one or the other in one draw of four.
    assert changes["mean_length"]["ci95"] == [-1500.0, -100.0]
    assert changes["accuracy_within_4864"]["ci95"] == [0.0, 0.5]
    assert changes["tokens_per_correct"]["ci95"] == [-1500.0, -200.0]
    rows = {
        cells[0]: cells[1:]
        for line in printed.splitlines()
        if (cells := [cell.strip() for cell in line.strip("│").split("│")])[1:]
    }
    within = ["25.0", "50.0", "+25.0", "+0.0 to +50.0"]
    assert rows["correct within 4,864 tokens"] == within
    assert rows["tokens, mean"] == ["3,400", "2,600", "-800", "-1,500 to -100"]


def test_answers_that_are_a_quarter_shorter_are_noted(tmp_path: Path, run: Run) -> None:
    for name, length in (("a", 100), ("b", 75), ("c", 76)):
        write(tmp_path / name, counts(2), lengths=np.full((40, NUM_SAMPLES), length))
    found, printed = run("a", "b", "c")
    (line,) = (line for line in printed.splitlines() if line.startswith("note:"))
    what = f"bench: the answers of {tmp_path / 'b'} are 25% shorter than those of {tmp_path / 'a'}"
    assert line.startswith(f"note: {what}: the mean is 75 tokens and was 100; ")
    notes = [other["shortenings"] for other in found["others"]]
    assert notes == [[line.removeprefix("note: ")], []]


def test_lengths_of_correct_answers_where_there_are_none(tmp_path: Path, run: Run) -> None:
    write(tmp_path / "a", counts(0))
    write(tmp_path / "b", counts(2))
    found, printed = run("a", "b")
    changes = found["others"][0]["benchmarks"]["bench"]["lengths"]
    undefined = {"before": None, "after": 5.0, "difference": None, "ci95": None}
    assert changes["median_correct_length"] == changes["mean_correct_length"] == undefined
    assert changes["tokens_per_correct"] == undefined | {"after": 10.0}
    (row,) = (line for line in printed.splitlines() if "tokens per correct answer" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")][1:] == ["-", "10", "-", "-"]


def test_problems_are_paired_by_what_they_ask_and_not_by_their_place(
    tmp_path: Path, run: Run
) -> None:
    """One data set by id and by file: other names, and here another order, of the same problems."""
    order = np.random.default_rng(0).permutation(40)
    renamed = [replace(PROBLEMS[i], problem_id=f"other[{i}]") for i in order]
    correct = np.random.default_rng(1).random((40, NUM_SAMPLES)) < 0.5
    write(tmp_path / "a", correct)
    write(tmp_path / "b", correct[order], replace(HEADER, problems=fingerprints(renamed)))
    found, _ = run("a", "b")
    bench = found["others"][0]["benchmarks"]["bench"]
    assert (bench["difference"], bench["ci95"]) == (0.0, [0.0, 0.0])
    assert bench["gained"] == bench["lost"] == []


def test_the_interval_is_the_one_of_a_run_s_summary(tmp_path: Path, run: Run) -> None:
    """The same problems resampled by the same draws; with few of them the order shows."""
    rng = np.random.default_rng(2)
    first, second = rng.random((2, 40, NUM_SAMPLES)) < 0.5
    write(tmp_path / "a", first)
    write(tmp_path / "b", second)
    found, _ = run("a", "b")
    expected = paired_bootstrap((first, second))
    bench = found["others"][0]["benchmarks"]["bench"]
    assert bench["difference"] == expected.value
    assert bench["ci95"] == [expected.low, expected.high]


def test_macro_and_several_runs(tmp_path: Path, run: Run) -> None:
    second = replace(HEADER, benchmark="other", problems=fingerprints(PROBLEMS[:5]))
    for name, number in (("a", 1), ("b", 2), ("c", 4)):
        write(tmp_path / name, counts(number))
        write(tmp_path / name, counts(1 if name == "a" else 3)[:5], second)
    found, printed = run("a", "b", "c")
    assert [other["macro"]["difference"] for other in found["others"]] == pytest.approx(
        [(0.25 + 0.5) / 2, (0.75 + 0.5) / 2]
    )
    assert printed.count("│ macro") == 2


def test_what_differs_beside_the_weights_is_noted(tmp_path: Path, run: Run) -> None:
    subject = {"model": "m", "engine": "vllm", "dtype": "bfloat16"}
    asked = replace(HEADER, subject=subject)
    others = {
        "same": asked,
        "seed": replace(asked, settings=HEADER.settings | {"seed": 1}),
        "engine": replace(asked, subject=subject | {"engine": "builtin", "dtype": "float32"}),
        "trained": replace(HEADER, subject={"weights": "w"}, step=3),
    }
    write(tmp_path / "a", counts(1), asked)
    write(tmp_path / "a", counts(1), replace(asked, benchmark="more"))
    for name, header in others.items():
        write(tmp_path / name, counts(3), header)
        write(tmp_path / name, counts(3), replace(header, benchmark="more"))
    found, printed = run("a", *others)
    noted = [line for line in printed.splitlines() if line.startswith("note:")]
    first = tmp_path / "a"
    assert noted == [
        f"note: {first} and {tmp_path / 'seed'} differ in seed (0 and 1) on bench, more: the "
        "problems are paired, the random numbers are not",
        f"note: {first} and {tmp_path / 'engine'} differ in dtype (bfloat16 and float32) on bench, "
        "more: this alone changes some answers",
        f"note: {first} and {tmp_path / 'engine'} differ in engine (vllm and builtin) on bench, "
        "more: this alone changes some answers",
    ]
    assert [other["macro"]["difference"] for other in found["others"]] == [0.5] * 4
    recorded = [
        f"note: {first} and {other['run']} {note}"
        for other in found["others"]
        for note in other["notes"]
    ]
    assert recorded == noted


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (
            replace(HEADER, settings=HEADER.settings | {"temperature": 0.6}),
            r"differ in temperature \(1\.0 and 0\.6\)",
        ),
        (replace(HEADER, problems=fingerprints(PROBLEMS[1:])), r"different problems \(40 and 39\)"),
        (replace(HEADER, benchmark="more"), "needs the same benchmarks in both"),
    ],
)
def test_unlike_evaluations_are_refused(tmp_path: Path, header: Header, message: str) -> None:
    write(tmp_path / "a", counts(2))
    write(tmp_path / "b", counts(2)[: len(header.problems)], header)
    with pytest.raises(ValueError, match=message):
        check_pairs("a", "b", read_run(str(tmp_path / "a")), read_run(str(tmp_path / "b")))


def test_the_evaluations_of_a_training_run(tmp_path: Path) -> None:
    for step, number in ((0, 1), (20, 3), (40, 2)):
        header = replace(HEADER, step=step)
        write(tmp_path / "evaluations", counts(number), header, f"step-{step}")

    def chosen(text: str) -> int | None:
        return read_run(f"{tmp_path}{text}")["bench"].header.step

    steps = [chosen(text) for text in ("", ":last", ":best", ":0", ":step-20")]
    assert steps == [40, 40, 20, 0, 20]
    for text in (":10", ":first"):
        with pytest.raises(ValueError, match="evaluated steps: 0, 20, 40"):
            chosen(text)


@pytest.mark.parametrize("has_directory", [False, True])
def test_a_training_run_without_evaluations(tmp_path: Path, has_directory: bool) -> None:
    """Where --eval.enabled was false, or a kill came before the first one was complete."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.toml").write_text("")
    if has_directory:
        SampleFiles(run_dir / "evaluations", "step-0", HEADER, WORLD, replace=False).close()
    for text in (str(run_dir), f"{run_dir}:best"):
        with pytest.raises(ValueError, match="has no complete evaluation") as refused:
            read_run(text)
        message = str(refused.value)
        assert message.startswith(f"{text}: this training run")
        assert f"python -m paint_engine.evaluate --adapter {run_dir} --benchmarks" in message
    # One that was made since, beside it.
    write(run_dir / "made", counts(2))
    assert set(read_run(str(run_dir / "made"))) == {"bench"}


def test_directories_without_a_complete_evaluation(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such directory"):
        read_run(str(tmp_path / "none"))
    files = SampleFiles(tmp_path, "bench", HEADER, WORLD, replace=False)
    files.close()
    with pytest.raises(ValueError, match="holds no complete evaluation") as refused:
        read_run(str(tmp_path))
    assert str(refused.value).count(str(tmp_path)) == 1
    write(tmp_path / "whole", counts(2))
    with pytest.raises(ValueError, match="not a training run with several; leave out :best"):
        read_run(f"{tmp_path / 'whole'}:best")
