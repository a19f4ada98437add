"""The metrics of an evaluation and their intervals.

Every metric is a mean over problems, and its 95% interval a bootstrap over problems, since a
benchmark has few of these. With the 30 problems of an AIME and half of the answers correct, such an
interval is 25 to 35 points wide, so two models are compared by their paired difference.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from paint_engine.evaluation.store import EvalSample, Evaluation
from paint_engine.seeds import BOOTSTRAP_SEED

NUM_RESAMPLES = 10_000
MAX_FAILURES = 10
"""comparisons of one problem's answers that may fail, each after seconds, before the rest are
skipped"""


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval: Estimate(0.5, 0.38, 0.63). NaN stands for what is not
    defined."""

    value: float
    low: float
    high: float

    @property
    def known(self) -> float | None:
        """The value as JSON has it: None if it is not defined."""
        return None if math.isnan(self.value) else self.value

    @property
    def ci95(self) -> list[float] | None:
        """The bounds as JSON has them: None if they are not defined."""
        return None if math.isnan(self.low) else [self.low, self.high]


def by_problem(samples: Sequence[EvalSample]) -> dict[str, list[EvalSample]]:
    """Returns the samples of each problem, sorted by index; problems in order of first
    appearance."""
    rows: dict[str, list[EvalSample]] = {}
    for sample in samples:
        rows.setdefault(sample.problem_id, []).append(sample)
    return {name: sorted(row, key=lambda s: s.sample_index) for name, row in rows.items()}


def correct_matrix(samples: Sequence[EvalSample]) -> np.ndarray:
    """Returns (P, k) booleans: problems in order of first appearance, samples sorted by index."""
    return np.array([[s.correct for s in row] for row in by_problem(samples).values()], dtype=bool)


def avg_at_k(correct: np.ndarray) -> float:
    """Returns the fraction of correct answers over all problems and samples."""
    return float(correct.mean())


def pass_at_k_by_problem(correct: np.ndarray, k: int) -> np.ndarray:
    """Returns (P,) probabilities that k of a problem's n samples, drawn without replacement,
    contain a correct one: 1 - C(n - c, k) / C(n, k) with c correct ones. They are unbiased for k
    fresh samples.

    correct: (P, n) booleans, 1 <= k <= n.
    """
    num_samples = correct.shape[1]
    assert 1 <= k <= num_samples, (k, num_samples)
    chances = [
        1 - math.comb(num_samples - c, k) / math.comb(num_samples, k)
        for c in range(num_samples + 1)
    ]
    return np.array(chances)[correct.sum(axis=1)]


def pass_at_k(correct: np.ndarray, k: int) -> float:
    """Returns the mean of `pass_at_k_by_problem`, a fraction."""
    return float(pass_at_k_by_problem(correct, k).mean())


def pass_ks(num_samples: int) -> list[int]:
    """Returns the powers of two up to the number of samples, and that number itself."""
    powers = [1 << i for i in range(num_samples.bit_length())]
    return sorted({*(k for k in powers if k <= num_samples), num_samples})


def answer_classes(
    answers: Sequence[str], equal: Callable[[str, str], bool | None]
) -> list[list[int]]:
    """Returns the indices of equal answers, grouped; groups in order of first appearance.

    equal: compares two different texts; None = the comparison failed, which counts as unequal.
        It is not called again after MAX_FAILURES failures, since each may take seconds.
    """
    first: dict[str, list[int]] = {}
    for place, answer in enumerate(answers):
        first.setdefault(answer, []).append(place)
    classes: list[tuple[str, list[int]]] = []
    num_failures = 0
    for answer, places in first.items():
        for representative, members in classes:
            verdict = equal(representative, answer) if num_failures < MAX_FAILURES else False
            num_failures += verdict is None
            if verdict:
                members += places
                break
        else:
            classes.append((answer, places))
    return [sorted(members) for _, members in classes]


def majority(samples: Sequence[EvalSample], equal: Callable[[str, str], bool | None]) -> float:
    """Returns the probability that the most common answer of a problem's samples is correct, with
    ties broken at random.

    Correct answers form one class, since all equal the reference; wrong ones are compared with
    `equal`. A sample without an answer has no vote, and one whose check failed votes for its own
    text.
    """
    num_correct = sum(s.correct for s in samples)
    wrong = [s.extracted for s in samples if s.extracted is not None and not s.correct]
    unchecked = {s.extracted for s in samples if s.error is not None}

    def compare(first: str, second: str) -> bool | None:
        return False if {first, second} & unchecked else equal(first, second)

    others = [len(members) for members in answer_classes(wrong, compare)]
    most = max([num_correct, *others])
    if most == 0 or num_correct < most:
        return 0.0
    return 1 / (1 + others.count(most))


def bootstrap(
    groups: Sequence[np.ndarray], *, num_resamples: int = NUM_RESAMPLES, seed: int = BOOTSTRAP_SEED
) -> Estimate:
    """Returns the mean over benchmarks of their means over problems, with its interval. Problems
    are resampled within each benchmark.

    groups: for each benchmark (P,) numbers, one per problem.
    """
    rng = np.random.default_rng(seed)
    resampled = np.zeros(num_resamples)
    for group in groups:
        draws = rng.integers(len(group), size=(num_resamples, len(group)))
        resampled += group[draws].mean(axis=1) / len(groups)
    low, high = np.quantile(resampled, [0.025, 0.975])
    value = sum(float(group.mean()) for group in groups) / len(groups)
    return Estimate(value, float(low), float(high))


def paired_bootstrap(
    *pairs: tuple[np.ndarray, np.ndarray],
    num_resamples: int = NUM_RESAMPLES,
    seed: int = BOOTSTRAP_SEED,
) -> Estimate:
    """Returns the mean of after - before, over benchmarks of their means over problems, with its
    bootstrap interval over the problems of each benchmark.

    Each resampled problem keeps its results before and after together.

    pairs: for each benchmark, before and after: (P, k) booleans over the same problems in the same
        order.
    """
    for before, after in pairs:
        assert before.shape[0] == after.shape[0], (before.shape, after.shape)
    groups = [after.mean(axis=1) - before.mean(axis=1) for before, after in pairs]
    return bootstrap(groups, num_resamples=num_resamples, seed=seed)


def macro_avg_at_k(evaluations: Mapping[str, Evaluation]) -> float:
    """Returns the unweighted mean of Avg@k over benchmarks.

    evaluations: of the same weights, by benchmark.
    """
    averages = [avg_at_k(correct_matrix(found.samples)) for found in evaluations.values()]
    return sum(averages) / len(averages)


def best_step(evaluations: Mapping[int, Mapping[str, Evaluation]]) -> int | None:
    """Returns the training step with the highest Avg@k, the later one of a tie, or None without
    evaluations after training steps. Of several benchmarks, their macro average counts.

    evaluations: by step and benchmark, each step with the same benchmarks.
    """
    averages = {step: macro_avg_at_k(found) for step, found in evaluations.items() if step > 0}
    return max(averages, key=lambda step: (averages[step], step), default=None)
