"""Accuracy by length budget, and the tokens that correct answers take.

A model may keep its accuracy and think longer, or think shorter and lose accuracy only where length
is needed. Neither shows in Avg@k alone.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from paint_engine.evaluation.accuracy import NUM_RESAMPLES, Estimate
from paint_engine.evaluation.store import EvalSample
from paint_engine.seeds import BOOTSTRAP_SEED

ACCURACY_WITHIN = "accuracy_within_"
LENGTH = "mean_length"
CORRECT_LENGTH = "mean_correct_length"
CORRECT_MEDIAN = "median_correct_length"
PER_CORRECT = "tokens_per_correct"
LENGTHS = (LENGTH, CORRECT_LENGTH, CORRECT_MEDIAN, PER_CORRECT)
"""the statistics in tokens; the others are fractions"""

_PARTS = (8, 4, 2, 1)
_MAX_UNDEFINED = 0.025
_MAX_ENTRIES = 1 << 22
"""entries of a table of resamples and answers that is in memory at once"""


@dataclass(frozen=True)
class Answers:
    """A benchmark's answers, one row per problem.

    correct: (P, k) booleans. lengths: (P, k) in tokens.
    """

    correct: np.ndarray
    lengths: np.ndarray


def answers_of(rows: Iterable[Sequence[EvalSample]]) -> Answers:
    """Returns the verdicts and lengths of problems with equally many samples each."""
    rows = list(rows)
    return Answers(
        np.array([[s.correct for s in row] for row in rows], dtype=bool),
        np.array([[s.num_tokens for s in row] for row in rows], dtype=np.int64),
    )


def length_budgets(max_new_tokens: int) -> list[int]:
    """Returns an eighth, a quarter, a half and the whole of the limit in tokens, rounded down.

    Evaluations that `compare` accepts have one limit, and so the same budgets. A limit under 8
    tokens has fewer.
    """
    return sorted({max_new_tokens // part for part in _PARTS} - {0})


def length_statistics(
    answers: Answers, budgets: Sequence[int], counts: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Returns (R,) values of each statistic, for R ways to draw the problems.

    accuracy_within_N: the fraction of answers that are correct and at most N tokens long. One that
        a limit of N would have cut counts as wrong, though a box in its first N tokens might have
        been right: these are the answers of the larger limit, which were not judged again.
    mean_length: tokens of all answers. mean_correct_length, median_correct_length: tokens of the
        correct ones, over all problems together. tokens_per_correct: the tokens of all answers,
        divided by the number of correct ones. The last three are NaN without a correct answer.

    counts: (R, P), how often each problem was drawn; None = each once, R = 1.
    """
    correct, lengths = answers.correct, answers.lengths
    if counts is None:
        counts = np.ones((1, len(correct)), dtype=np.int64)
    num_answers = counts.sum(axis=1) * correct.shape[1]
    num_correct = counts @ correct.sum(axis=1)
    num_tokens = counts @ lengths.sum(axis=1)
    within = {budget: (correct & (lengths <= budget)).sum(axis=1) for budget in budgets}
    divisor = np.where(num_correct > 0, num_correct, np.nan)
    return {
        **{f"{ACCURACY_WITHIN}{budget}": counts @ n / num_answers for budget, n in within.items()},
        LENGTH: num_tokens / num_answers,
        CORRECT_LENGTH: counts @ (correct * lengths).sum(axis=1) / divisor,
        CORRECT_MEDIAN: _correct_medians(answers, counts),
        PER_CORRECT: num_tokens / divisor,
    }


def _correct_medians(answers: Answers, counts: np.ndarray) -> np.ndarray:
    """Returns (R,) medians of the correct answers' lengths, NaN where none was drawn."""
    problems, places = np.nonzero(answers.correct)
    lengths = answers.lengths[problems, places]
    medians = np.full(len(counts), np.nan)
    if not len(lengths):
        return medians
    order = np.argsort(lengths)
    lengths, problems = lengths[order], problems[order]
    num_rows = max(1, _MAX_ENTRIES // len(lengths))
    for start in range(0, len(counts), num_rows):
        rows = slice(start, start + num_rows)
        # Twice the number of answers up to this one, beside the number of all.
        doubled = 2 * counts[rows][:, problems].cumsum(axis=1)
        total = doubled[:, -1:] // 2
        lower, upper = (doubled >= total).argmax(axis=1), (doubled > total).argmax(axis=1)
        middle = (lengths[lower] + lengths[upper]) / 2
        medians[rows] = np.where(total[:, 0] > 0, middle, np.nan)
    return medians


def length_estimates(
    groups: Sequence[Answers], budgets: Sequence[int], before: Sequence[Answers] | None = None
) -> dict[str, Estimate]:
    """Returns each statistic's mean over benchmarks with its 95% interval by bootstrap over the
    problems of each benchmark.

    groups: the answers to each benchmark.
    before: those of another model to the same problems in the same order; the statistics are then
        the differences of `groups` to these, and a resampled problem has the answers of both.

    A value is NaN where a benchmark has no correct answer. So are the bounds where more than 2.5%
    of the resamples have none: too few problems were solved for an interval.
    """
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    sums: dict[str, np.ndarray] = {}
    for place, group in enumerate(groups):
        counts = _resampled_counts(rng, len(group.correct))
        found = length_statistics(group, budgets, counts)
        if before is not None:
            earlier = length_statistics(before[place], budgets, counts)
            found = {key: values - earlier[key] for key, values in found.items()}
        sums = {key: sums.get(key, 0.0) + values for key, values in found.items()}
    return {key: _estimate(values / len(groups)) for key, values in sums.items()}


def _resampled_counts(rng: np.random.Generator, num_problems: int) -> np.ndarray:
    """Returns (1 + NUM_RESAMPLES, P) counts: each problem once, then the draws of `bootstrap`."""
    draws = rng.integers(num_problems, size=(NUM_RESAMPLES, num_problems))
    draws += num_problems * np.arange(NUM_RESAMPLES)[:, None]
    counts = np.bincount(draws.ravel(), minlength=NUM_RESAMPLES * num_problems)
    return np.vstack([np.ones((1, num_problems), dtype=np.int64), counts.reshape(draws.shape)])


def _estimate(values: np.ndarray) -> Estimate:
    """values: that of the problems as they are, then those of the resamples."""
    value, resampled = float(values[0]), values[1:]
    undefined = np.isnan(resampled)
    if undefined.mean() > _MAX_UNDEFINED:
        return Estimate(value, np.nan, np.nan)
    low, high = np.quantile(resampled[~undefined], [0.025, 0.975])
    return Estimate(value, float(low), float(high))
