"""Computes the tables from the runs' records: means over seeds, and intervals of differences."""

import statistics
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from bench.paper.plan import (
    PlannedRun,
    Scale,
    Table,
    chosen_tables,
    shown_rows,
    table_seeds,
    table_sizes,
)

Record = dict[str, Any]
NUM_RESAMPLES = 10_000
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def encode_counts(correct: np.ndarray) -> str:
    """Encodes (P, k) bools, k < 36, as one character per problem: its number of correct answers."""
    return "".join(_DIGITS[count] for count in correct.sum(axis=1))


def decode_counts(text: str) -> np.ndarray:
    """Returns (P,) int64 counts; the inverse of `encode_counts`."""
    return np.array([int(digit, 36) for digit in text])


@dataclass(frozen=True)
class Difference:
    """Mean difference to a reference row with its 95% interval, as fractions.

    seeds_above, seeds_equal: number of seeds in which the row is above, or equal to, the reference.
    verdict: "above" or "below" if the interval excludes 0, else "within noise".
    """

    reference: str
    difference: float
    low: float
    high: float
    seeds_above: int
    seeds_equal: int

    @property
    def verdict(self) -> str:
        if self.low > 0:
            return "above"
        return "below" if self.high < 0 else "within noise"


def hierarchical_bootstrap(
    row: np.ndarray, reference: np.ndarray, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> tuple[float, float, float]:
    """Returns the mean of row - reference and its 95% interval, resampling seeds and problems.

    row, reference: (S, P) shares of correct answers, with seeds and problems in the same order.

    Each resample draws S seeds and P problems with replacement, the same for both rows: all seeds
    share the problems, and a seed fixes the data order and the random numbers of both rows.

    Resampling S seeds scales their part of the variance by (S - 1) / S, a third too little at 3
    seeds, and a few values say little about a distribution, so the seeds' part of the interval is
    rough. The noise of single answers is resampled with the seeds and again with the problems. It
    counts (2 - 1/S) (2 - 1/P) - 1 times, 2.3 at 3 seeds and 2.6 at 5, which widens the interval. In
    simulations with 256 problems and 2 answers each, at 3 and 5 seeds, the interval covered the
    truth in 99 to 100% of trials if seeds move a row by up to 1 point, in 95 to 97% at 2 points and
    in 88 to 95% at 3 points.
    """
    assert row.shape == reference.shape, (row.shape, reference.shape)
    differences = row - reference
    seeds, problems = _draws(*differences.shape, num_resamples, seed)
    # (R, S) @ (S, P), then a weighted mean over P.
    means = np.einsum("rp,rp->r", seeds @ differences, problems) / differences.size
    low, high = np.quantile(means, [0.025, 0.975])
    return float(differences.mean()), float(low), float(high)


@lru_cache(maxsize=4)
def _draws(
    num_seeds: int, num_problems: int, num_resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (R, S) and (R, P) counts of each seed and each problem in each resample.

    All rows of a table share them.
    """
    rng = np.random.default_rng(seed)
    seeds = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), num_resamples)
    problems = rng.multinomial(num_problems, np.full(num_problems, 1 / num_problems), num_resamples)
    return seeds, problems


def last_shares(records: Sequence[Record]) -> np.ndarray:
    """Returns (S, P) shares of correct answers after the last step, one row per seed."""
    return np.array(
        [decode_counts(r["evaluations"][-1]["correct"]) / r["num_samples"] for r in records]
    )


def row_numbers(
    setting: str, records: Sequence[Record], references: Mapping[str, Sequence[Record]]
) -> dict[str, Any]:
    """Returns one row of a table: last and best accuracy, the seeds' spread and the differences.

    `best` is the best of each seed's evaluations, chosen on the test problems themselves.
    """
    last = [record["evaluations"][-1]["avg_at_k"] for record in records]
    best = [max(e["avg_at_k"] for e in record["evaluations"]) for record in records]
    differences = []
    for name, others in references.items():
        if name != setting:
            here, there = last_shares(records), last_shares(others)
            # Counts of answers are exact; shares are rounded.
            gained = np.rint((here - there).sum(axis=1) * records[0]["num_samples"])
            seeds = int((gained > 0).sum()), int((gained == 0).sum())
            found = Difference(name, *hierarchical_bootstrap(here, there), *seeds)
            differences.append({**asdict(found), "verdict": found.verdict})
    return {
        "setting": setting,
        "learning_rate": records[0]["learning_rate"],
        "last": statistics.fmean(last),
        "best": statistics.fmean(best),
        "seed_std": statistics.stdev(last) if len(last) > 1 else None,
        "last_by_seed": last,
        "best_by_seed": best,
        "seconds_per_run": statistics.fmean(record["seconds"] for record in records),
        "differences": differences,
    }


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
            seeds = table_seeds(scale, table)
            by_row = {
                row: [records[PlannedRun(size, row, seed).run_id] for seed in seeds]
                for row in shown_rows(scale, table)
            }
            rows = []
            for row, found in by_row.items():
                references = {name: by_row[name] for name in compared_with(table, row, by_row)}
                rows.append(row_numbers(row, found, references))
            panels.append({"table": table.number, "size": size, "seeds": list(seeds), "rows": rows})
    return panels
