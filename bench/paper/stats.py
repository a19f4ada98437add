"""Computes the tables from the runs' records: means over seeds, and intervals of differences."""

import math
import statistics
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import mpmath
import numpy as np

from bench.paper.plan import (
    PlannedRun,
    Scale,
    Table,
    chosen_tables,
    seeds_of,
    shown_rows,
    table_sizes,
)

Record = dict[str, Any]
LEVEL = 0.95
"""of the tables' intervals"""
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def encode_counts(correct: np.ndarray) -> str:
    """Encodes (P, k) bools, k < 36, as one character per problem: its number of correct answers."""
    return "".join(_DIGITS[count] for count in correct.sum(axis=1))


def decode_counts(text: str) -> np.ndarray:
    """Returns (P,) int64 counts; the inverse of `encode_counts`."""
    return np.array([int(digit, 36) for digit in text])


@dataclass(frozen=True)
class Mean:
    """A mean over seeds and problems, its standard error, and the degrees of freedom of Student's
    t."""

    value: float
    standard_error: float
    degrees: int

    def interval(self, level: float) -> tuple[float, float]:
        half = student_quantile(level, self.degrees) * self.standard_error
        return self.value - half, self.value + half

    @property
    def p_value(self) -> float:
        """Two-sided, of the hypothesis that the mean is 0."""
        if self.standard_error == 0:
            return 1.0 if self.value == 0 else 0.0
        return student_tails(abs(self.value) / self.standard_error, self.degrees)


def student_tails(t: float, degrees: int) -> float:
    """Returns the probability that Student's t is above t or below -t."""
    below = degrees / (degrees + t * t)
    return float(mpmath.betainc(degrees / 2, 0.5, 0, below, regularized=True))


@lru_cache
def student_quantile(level: float, degrees: int) -> float:
    """Returns the t with the probability `level` between -t and t."""
    # Solved in x = degrees / (degrees + t^2), which lies between 0 and 1.
    x = mpmath.findroot(
        lambda x: mpmath.betainc(degrees / 2, 0.5, 0, x, regularized=True) - (1 - level),
        (0, 1),
        solver="bisect",
        tol=1e-24,
    )
    return math.sqrt(degrees * (1 - float(x)) / float(x))


def clustered_mean(differences: np.ndarray) -> Mean:
    """Returns the mean of D (S, P), seeds by problems, with its two-way cluster-robust error.

    The variance is V_seeds / S + V_problems / P - V_cells / (S P). V_seeds is the variance of the
    means of the seeds, V_problems of those of the problems, and V_cells that of what both leave of
    a cell. The noise of single cells is in each of the first two terms once, and so is subtracted
    once. The variance is never below the larger of these two terms.

    Student's t has S - 1 degrees of freedom, by the fewer clusters. With seeds that hardly differ,
    the interval is therefore too wide: at 10 seeds up to 1.3 times.

    Source: Cameron, Gelbach and Miller, "Robust Inference With Multiway Clustering", Journal of
    Business & Economic Statistics 29(2), 2011, for a mean, with unbiased variances.
    """
    num_seeds, num_problems = differences.shape
    assert num_seeds >= 2 and num_problems >= 2, differences.shape
    mean = differences.mean()
    seeds, problems = differences.mean(axis=1), differences.mean(axis=0)
    cells = differences - seeds[:, None] - problems + mean
    of_seeds = seeds.var(ddof=1) / num_seeds
    of_problems = problems.var(ddof=1) / num_problems
    of_cells = (cells**2).sum() / ((num_seeds - 1) * (num_problems - 1)) / differences.size
    variance = max(of_seeds + of_problems - of_cells, of_seeds, of_problems)
    return Mean(float(mean), math.sqrt(variance), num_seeds - 1)


def expected_half_width(
    seed_sd: float,
    problem_sd: float,
    answer_sd: float,
    num_seeds: int,
    num_problems: int,
    num_samples: int,
    level: float = LEVEL,
) -> float:
    """Returns about how wide half the interval of `clustered_mean` will be, in the unit of the
    standard deviations.

    seed_sd, problem_sd: of the effect that a seed, or a problem, has on the difference of two rows.
    answer_sd: of the difference of one answer of either row, for a given seed and problem.
    """
    variance = (
        seed_sd**2 / num_seeds
        + problem_sd**2 / num_problems
        + answer_sd**2 / (num_seeds * num_problems * num_samples)
    )
    return student_quantile(level, num_seeds - 1) * math.sqrt(variance)


@dataclass(frozen=True)
class Difference:
    """Mean difference to a reference row with its 95% interval, as fractions.

    p_value: two-sided, of the hypothesis that the rows are equal.
    num_seeds: of the seeds that both rows have.
    seeds_above, seeds_equal: number of them in which the row is above, or equal to, the reference.
    verdict: "above" or "below" if the interval excludes 0, else "within noise".
    """

    reference: str
    difference: float
    low: float
    high: float
    p_value: float
    num_seeds: int
    seeds_above: int
    seeds_equal: int

    @property
    def verdict(self) -> str:
        if self.low > 0:
            return "above"
        return "below" if self.high < 0 else "within noise"


def compare(
    records: Sequence[Record],
    others: Sequence[Record],
    reference: str,
    level: float = LEVEL,
    *,
    skip: int = 0,
) -> Difference:
    """Returns the difference of two rows after the last step, with its interval at `level`.

    records, others: of the row and of the reference, in the order of the seeds. Of a row with more
        seeds than the other, those that both have count.
    skip: so many of the first problems are left out.
    """
    count = min(len(records), len(others))
    records, others = records[:count], others[:count]
    assert [r["seed"] for r in records] == [r["seed"] for r in others]
    gained = (last_shares(records) - last_shares(others))[:, skip:]
    mean = clustered_mean(gained)
    # Counts of answers are exact; shares are rounded.
    counts = np.rint(gained.sum(axis=1) * records[0]["num_samples"])
    return Difference(
        reference,
        mean.value,
        *mean.interval(level),
        mean.p_value,
        count,
        int((counts > 0).sum()),
        int((counts == 0).sum()),
    )


def last_shares(records: Sequence[Record]) -> np.ndarray:
    """Returns (S, P) shares of correct answers after the last step, one row per seed."""
    return np.array(
        [decode_counts(r["evaluations"][-1]["correct"]) / r["num_samples"] for r in records]
    )


def row_numbers(
    setting: str, records: Sequence[Record], references: Mapping[str, Sequence[Record]]
) -> dict[str, Any]:
    """Returns one row of a table: last accuracy, the seeds' spread and the differences."""
    last = [record["evaluations"][-1]["avg_at_k"] for record in records]
    found = [
        compare(records, others, name) for name, others in references.items() if name != setting
    ]
    return {
        "setting": setting,
        "learning_rate": records[0]["learning_rate"],
        "last": statistics.fmean(last),
        "seed_std": statistics.stdev(last),
        "last_by_seed": last,
        "seconds_per_run": statistics.fmean(record["seconds"] for record in records),
        "differences": [{**asdict(one), "verdict": one.verdict} for one in found],
    }


def row_records(
    scale: Scale, size: str, setting: str, records: Mapping[str, Record]
) -> list[Record]:
    """Returns the records of a row, in the order of the seeds."""
    return [records[PlannedRun(size, setting, seed).run_id] for seed in seeds_of(scale, setting)]


def compared_with(table: Table, setting: str, shown: Container[str]) -> tuple[str, ...]:
    """Returns the shown references that a row is compared with."""
    all_of_them = setting == "paint" or table.all_with_all
    references = table.references if all_of_them else table.references[:1]
    return tuple(name for name in references if name in shown)


def table_numbers(
    scale: Scale, numbers: Sequence[int], records: Mapping[str, Record]
) -> list[dict[str, Any]]:
    """Returns every panel of the given tables; Table 1 has one per size of the base."""
    panels = []
    for table in chosen_tables(numbers):
        for size in table_sizes(scale, table):
            by_row = {
                row: row_records(scale, size, row, records) for row in shown_rows(scale, table)
            }
            rows = []
            for row, found in by_row.items():
                references = {name: by_row[name] for name in compared_with(table, row, by_row)}
                rows.append(row_numbers(row, found, references))
            panels.append({"table": table.number, "size": size, "rows": rows})
    return panels
