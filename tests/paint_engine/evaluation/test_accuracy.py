"""The numbers of an evaluation: by hand, by brute force, and the bootstrap's coverage."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paint_engine.evaluation.accuracy import (
    MAX_FAILURES,
    answer_classes,
    avg_at_k,
    bootstrap,
    correct_matrix,
    majority,
    paired_bootstrap,
    pass_at_k,
    pass_at_k_by_problem,
    pass_ks,
)
from paint_engine.evaluation.store import EvalSample
from paint_engine.rewards.checker import check_answer, equal_answers


def _sample(problem: str, index: int, correct: bool) -> EvalSample:
    return EvalSample(problem, index, "text", 5, "3", correct, False, None)


def _voters(gold: str, answers: list[str | None]) -> list[EvalSample]:
    """One sample a boxed answer, None for one without, each judged by the real checker."""
    found = []
    for index, answer in enumerate(answers):
        verdict = check_answer(gold, "no box" if answer is None else f"\\boxed{{{answer}}}")
        found.append(
            EvalSample("p", index, "", 5, verdict.extracted, verdict.correct, False, verdict.error)
        )
    return found


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.integers(1, 5), st.integers(1, 4), st.randoms(use_true_random=False))
def test_the_matrix_has_problems_as_rows_and_samples_by_index(num_problems, k, rng) -> None:
    truth = np.array([[rng.random() < 0.5 for _ in range(k)] for _ in range(num_problems)])
    samples = [
        _sample(f"p:{i}", j, bool(truth[i, j])) for i in range(num_problems) for j in range(k)
    ]
    assert np.array_equal(correct_matrix(samples), truth)
    rng.shuffle(samples)
    order = list(dict.fromkeys(s.problem_id for s in samples))
    shuffled = correct_matrix(samples)
    assert shuffled.dtype == bool
    for row, name in enumerate(order):
        assert np.array_equal(shuffled[row], truth[int(name[2:])])


def test_avg_and_pass_at_k_by_hand() -> None:
    correct = np.array([[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=bool)
    assert avg_at_k(correct) == pytest.approx(5 / 12)
    # Of the 6 pairs of the first problem's samples 3 hold its correct one.
    assert pass_at_k(correct, 2) == pytest.approx((3 / 6 + 0 + 1) / 3)
    assert pass_at_k(correct, 4) == pytest.approx(2 / 3)
    assert pass_at_k(correct, 1) == pytest.approx(avg_at_k(correct))
    assert pass_ks(12) == [1, 2, 4, 8, 12]
    assert pass_ks(1) == [1]


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.lists(st.booleans(), min_size=1, max_size=7), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(row, data) -> None:
    k = data.draw(st.integers(1, len(row)))
    subsets = list(itertools.combinations(row, k))
    expected = sum(any(subset) for subset in subsets) / len(subsets)
    closed = 1 - math.comb(len(row) - sum(row), k) / math.comb(len(row), k)
    found = pass_at_k_by_problem(np.array([row], dtype=bool), k)
    assert found.tolist() == pytest.approx([expected])
    assert expected == pytest.approx(closed)


def test_pass_at_k_is_unbiased() -> None:
    """12 samples estimate what 4 fresh ones reach; any() over the first 4 does too, with more
    noise, and any() over all 12 does not."""
    rng = np.random.default_rng(0)
    chances = rng.uniform(0.0, 0.5, size=(4000, 1))
    correct = rng.random((4000, 12)) < chances
    truth = float((1 - (1 - chances) ** 4).mean())
    assert pass_at_k(correct, 4) == pytest.approx(truth, abs=0.015)
    assert pass_at_k(correct, 12) > truth + 0.15


def test_equal_answers_vote_together() -> None:
    """Three ways of writing one half outvote two of writing one third, each of them alone not."""
    halves, thirds = ["0.5", "\\frac12", "\\frac{1}{2}"], ["\\frac{1}{3}", "\\frac13"]
    assert majority(_voters("0.5", [*thirds, *halves]), equal_answers) == 1.0
    assert majority(_voters("\\frac13", [*thirds, *halves]), equal_answers) == 0.0
    # Where both are wrong, and only there, they are compared with each other.
    assert majority(_voters("7", ["7", "7", *halves]), equal_answers) == 0.0
    assert majority(_voters("7", ["7", "7", *halves]), lambda a, b: a == b) == 1.0
    classes = answer_classes(["0.5", "3", "\\frac12", "3", "03"], equal_answers)
    assert classes == [[0, 2], [1, 3, 4]]


def test_ties_and_samples_without_an_answer() -> None:
    assert majority(_voters("7", ["7", "8"]), equal_answers) == 0.5
    assert majority(_voters("7", ["7", "8", "9"]), equal_answers) == pytest.approx(1 / 3)
    assert majority(_voters("7", ["7", None, None, None]), equal_answers) == 1.0
    assert majority(_voters("7", ["7", "", " ", ""]), equal_answers) == 1.0
    assert majority(_voters("7", [None, None]), equal_answers) == 0.0
    assert majority(_voters("7", ["", ""]), equal_answers) == 0.0
    assert majority(_voters("7", ["8", "7", "8"]), equal_answers) == 0.0


def test_slow_answers_stand_alone_and_keep_no_others_apart() -> None:
    """In any order: what fails with one text says nothing of the other."""
    for answers in itertools.permutations(["slow", "slow too", "a", "A", "b", "B"]):
        classes = answer_classes(answers, _equal_unless_slow)
        texts = {frozenset(answers[place].lower() for place in members) for members in classes}
        assert texts == {frozenset({name}) for name in ("slow", "slow too", "a", "b")}
        assert sorted(map(len, classes)) == [1, 1, 2, 2]


def _equal_unless_slow(first: str, second: str) -> bool | None:
    slow = first.startswith("slow") or second.startswith("slow")
    return None if slow else first.lower() == second.lower()


def test_after_many_failures_nothing_more_is_asked() -> None:
    verdicts = []

    def equal(first: str, second: str) -> bool | None:
        verdicts.append(_equal_unless_slow(first, second))
        return verdicts[-1]

    answers = [*(f"slow {i}" for i in range(8)), "a", "A", "slow 3"]
    classes = answer_classes(answers, equal)
    assert verdicts == [None] * MAX_FAILURES
    # Equal texts are one answer all the same.
    assert [3, 10] in classes and [8] in classes and [9] in classes


def test_an_answer_whose_check_failed_votes_for_its_own_text_and_is_compared_with_none() -> None:
    asked = []

    def equal(first: str, second: str) -> bool | None:
        asked.append((first, second))
        return first == second

    failed = [
        EvalSample("p", i, "", 5, "slow", False, False, "the comparison took longer than 5 s")
        for i in range(2)
    ]
    assert majority([*_voters("7", ["7", "8"]), *failed], equal) == 0.0
    assert majority([*failed, *_voters("7", ["7", "7", "7", "8"])], equal) == 1.0
    assert asked == []


def test_equal_evaluations_differ_by_nothing() -> None:
    correct = np.random.default_rng(0).random((50, 4)) < 0.5
    same = paired_bootstrap((correct, correct))
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)


def test_the_interval_is_that_of_a_mean_over_problems() -> None:
    rng = np.random.default_rng(1)
    before, after = rng.random((200, 6)) < 0.4, rng.random((200, 6)) < 0.6
    result = paired_bootstrap((before, after))
    differences = after.mean(axis=1) - before.mean(axis=1)
    assert result.value == pytest.approx(differences.mean())
    # Of many problems the bootstrap's interval is the normal one.
    half = 1.96 * differences.std() / 200**0.5
    assert result.low == pytest.approx(differences.mean() - half, abs=0.1 * half)
    assert result.high == pytest.approx(differences.mean() + half, abs=0.1 * half)
    assert paired_bootstrap((before, after)) == result
    assert paired_bootstrap((after, before)).value == pytest.approx(-result.value)


def test_a_macro_average_weighs_benchmarks_alike_and_resamples_within_each() -> None:
    rng = np.random.default_rng(3)
    groups = [rng.random(30), 0.2 * rng.random(200)]
    found = bootstrap(groups)
    assert found.value == pytest.approx((groups[0].mean() + groups[1].mean()) / 2)
    # The variances of two independent means, each halved in weight.
    spread = sum(group.var() / len(group) for group in groups) ** 0.5 / 2
    assert found.high - found.low == pytest.approx(2 * 1.96 * spread, rel=0.05)


def test_a_planted_difference_is_covered_in_about_95_of_100_intervals() -> None:
    rng, covered = np.random.default_rng(2), 0
    for seed in range(200):
        # Problems of very different difficulty, all made easier by 0.1.
        difficulty = rng.uniform(0.0, 0.9, size=(60, 1))
        before, after = rng.random((60, 4)) < difficulty, rng.random((60, 4)) < difficulty + 0.1
        result = paired_bootstrap((before, after), num_resamples=500, seed=seed)
        covered += result.low <= 0.1 <= result.high
    assert 0.89 <= covered / 200 <= 0.985


def test_pairing_removes_the_spread_between_problems() -> None:
    before = np.repeat([[False], [True]], 50, axis=0)
    after = before.copy()
    after[:10] = True
    result = paired_bootstrap((before, after))
    assert result.value == pytest.approx(0.1)
    # Unpaired, the interval would be over 0.27 wide.
    assert result.low > 0.0 and result.high - result.low < 0.13


def test_evaluations_of_other_problems_are_not_paired() -> None:
    with pytest.raises(AssertionError):
        paired_bootstrap((np.ones((3, 2), dtype=bool), np.ones((4, 2), dtype=bool)))
