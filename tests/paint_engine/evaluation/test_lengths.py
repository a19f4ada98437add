"""Accuracy by length budget and the lengths of correct answers, against hand-computed numbers."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from paint_engine.distributed import World
from paint_engine.evaluation import lengths as module
from paint_engine.evaluation.lengths import (
    Answers,
    answers_of,
    length_budgets,
    length_estimates,
    length_statistics,
)
from paint_engine.evaluation.store import EvalSample, Header, SampleFiles, read_evaluation
from paint_engine.files import BadFile

# Two correct answers of 10 and 20 tokens, and one of 100.
ANSWERS = Answers(
    np.array([[True, True, False, False], [True, False, False, False]]),
    np.array([[10, 20, 30, 40], [100, 200, 300, 400]]),
)
UNSOLVED = Answers(np.zeros((2, 4), dtype=bool), ANSWERS.lengths)


def test_budgets_are_parts_of_the_limit() -> None:
    assert length_budgets(38912) == [4864, 9728, 19456, 38912]
    assert length_budgets(225) == [28, 56, 112, 225]
    # No budget of 0 tokens, and none twice.
    assert [length_budgets(limit) for limit in (6, 2, 1)] == [[1, 3, 6], [1, 2], [1]]


def test_statistics_by_hand() -> None:
    found = length_statistics(ANSWERS, [9, 10, 50, 400])
    assert {key: values.tolist() for key, values in found.items()} == {
        "accuracy_within_9": [0.0],
        # An answer as long as the budget is not cut by it.
        "accuracy_within_10": [1 / 8],
        "accuracy_within_50": [2 / 8],
        "accuracy_within_400": [3 / 8],
        "mean_length": [1100 / 8],
        "mean_correct_length": [pytest.approx(130 / 3)],
        "median_correct_length": [20.0],
        "tokens_per_correct": [pytest.approx(1100 / 3)],
    }


def test_problems_that_are_drawn_again_count_again() -> None:
    counts = np.array([[2, 0], [0, 2], [1, 1]])
    found = length_statistics(ANSWERS, [50], counts)
    assert {key: values.tolist() for key, values in found.items()} == {
        "accuracy_within_50": [0.5, 0.0, 0.25],
        "mean_length": [25.0, 250.0, 137.5],
        "mean_correct_length": [15.0, 100.0, pytest.approx(130 / 3)],
        # Of 10, 10, 20 and 20 the mean of the middle two.
        "median_correct_length": [15.0, 100.0, 20.0],
        "tokens_per_correct": [50.0, 1000.0, pytest.approx(1100 / 3)],
    }


def test_medians_of_resamples_are_those_of_the_answers_written_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the number of resamples that are in memory at once. Nobody solves the first problem,
    and some resamples draw no other."""
    rng = np.random.default_rng(0)
    answers = Answers(rng.random((6, 5)) < 0.3, rng.integers(1, 30, size=(6, 5)))
    answers.correct[0] = False
    counts = rng.integers(3, size=(40, 6)) * rng.integers(2, size=(40, 6))
    counts[:, 0] = 1
    counts[:3, 1:] = 0
    expected = []
    for row in counts:
        drawn = [
            length
            for problem, times in enumerate(row)
            for length in np.repeat(answers.lengths[problem][answers.correct[problem]], times)
        ]
        expected.append(np.median(drawn) if drawn else math.nan)
    assert 3 <= np.isnan(expected).sum() < 20
    for max_entries in (1, 25, 1 << 22):
        monkeypatch.setattr(module, "_MAX_ENTRIES", max_entries)
        found = length_statistics(answers, [], counts)["median_correct_length"]
        np.testing.assert_array_equal(found, expected)


def test_intervals_and_differences_by_hand() -> None:
    """Of two problems, both resampled ones are the one or the other in one draw of four."""
    found = length_estimates([ANSWERS], [50])
    bounds = {key: (e.value, e.low, e.high) for key, e in found.items()}
    assert bounds == {
        "accuracy_within_50": (0.25, 0.0, 0.5),
        "mean_length": (137.5, 25.0, 250.0),
        "mean_correct_length": (pytest.approx(130 / 3), 15.0, 100.0),
        "median_correct_length": (20.0, 15.0, 100.0),
        "tokens_per_correct": (pytest.approx(1100 / 3), 50.0, 1000.0),
    }
    shorter = Answers(ANSWERS.correct, ANSWERS.lengths // 2)
    changes = length_estimates([shorter], [50], [ANSWERS])
    bounds = {key: (e.value, e.low, e.high) for key, e in changes.items()}
    assert bounds == {
        # The third correct answer, of 50 tokens, now fits.
        "accuracy_within_50": (pytest.approx(1 / 8), 0.0, 0.25),
        "mean_length": (-68.75, -125.0, -12.5),
        "mean_correct_length": (pytest.approx(-65 / 3), -50.0, -7.5),
        "median_correct_length": (-10.0, -50.0, -7.5),
        "tokens_per_correct": (pytest.approx(-550 / 3), -500.0, -25.0),
    }


def test_the_mean_of_several_benchmarks_counts_each_once() -> None:
    three = Answers(np.array([[True], [False], [False]]), np.array([[7], [7], [7]]))
    found = length_estimates([ANSWERS, three], [50])
    assert found["accuracy_within_50"].value == pytest.approx((1 / 4 + 1 / 3) / 2)
    assert found["mean_length"].value == pytest.approx((137.5 + 7) / 2)
    assert found["tokens_per_correct"].value == pytest.approx((1100 / 3 + 21) / 2)


def test_without_correct_answers_their_lengths_are_not_defined() -> None:
    found = length_estimates([UNSOLVED], [50])
    assert found["accuracy_within_50"].ci95 == [0.0, 0.0]
    assert (found["mean_length"].known, found["mean_length"].ci95) == (137.5, [25.0, 250.0])
    for key in ("mean_correct_length", "median_correct_length", "tokens_per_correct"):
        assert (found[key].known, found[key].ci95) == (None, None), key
        # Neither are differences to them.
        assert length_estimates([ANSWERS], [50], [UNSOLVED])[key].known is None
        assert length_estimates([ANSWERS, UNSOLVED], [50])[key].known is None


def test_too_few_solved_problems_have_no_interval() -> None:
    """A resample of ten problems misses the solved one in 35 of 100 cases, three solved ones in 3,
    and five in 0.1."""
    for num_solved, is_known in ((1, False), (3, False), (5, True)):
        correct = np.arange(10)[:, None] < num_solved
        found = length_estimates([Answers(correct, np.full((10, 1), 8))], [])
        assert found["mean_correct_length"].value == 8.0
        assert (found["mean_correct_length"].ci95 == [8.0, 8.0]) is is_known
        assert (found["tokens_per_correct"].ci95 is not None) is is_known


def test_answers_are_in_rows() -> None:
    rows = [
        [EvalSample("a", 0, "", 3, None, True, False, None)],
        [EvalSample("b", 0, "", 5, None, False, True, None)],
    ]
    found = answers_of(rows)
    assert (found.correct.tolist(), found.lengths.tolist()) == ([[True], [False]], [[3], [5]])


@pytest.mark.parametrize("num_tokens", [-1, 10**9 + 1, 10**400])
def test_impossible_lengths_are_refused(tmp_path: Path, num_tokens: int) -> None:
    settings = {"num_samples": 1, "max_new_tokens": 8, "seed": 0}
    header = Header("b", settings, {}, {"p": "mark"})
    world = World(0, 1, 0, torch.device("cpu"))
    files = SampleFiles(tmp_path, "b", header, world, replace=False)
    files.append([EvalSample("p", 0, "", 5, None, True, False, None)])
    files.finish(1.0)
    assert len(read_evaluation(tmp_path / "b.json").samples) == 1
    row = json.loads((tmp_path / "b.jsonl").read_text()) | {"num_tokens": num_tokens}
    (tmp_path / "b.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(BadFile, match=r"b\.jsonl:1: num_tokens: got .*; needs 0 to 1,000,000,000;"):
        read_evaluation(tmp_path / "b.json")
