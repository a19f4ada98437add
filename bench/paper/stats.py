"""The tables' numbers from the runs' records: means over seeds, and intervals of differences."""

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
    """(P, k) booleans as one character a problem: how many of its k < 36 answers are correct."""
    return "".join(_DIGITS[count] for count in correct.sum(axis=1))


def decode_counts(text: str) -> np.ndarray:
    """(P,) int64, the inverse of `encode_counts`."""
    return np.array([int(digit, 36) for digit in text])


@dataclass(frozen=True)
class Difference:
    """Mean difference to a reference row with its 95% interval, as fractions.

    seeds_above, seeds_equal: in how many seeds the row is above the reference, and as high.
    verdict: "above" or "below" where the interval leaves 0 out, else "within noise".
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
    """row - reference and its 95% interval, resampling seeds and problems.

    row, reference: (S, P) shares of correct answers, seeds and problems in the same order.

    Each resample draws S seeds and P problems with replacement, the same for both rows: the
    problems are those of every seed, and a seed stands for the same data order and the same random
    numbers in both rows.

    Resampling S seeds understates their part of the variance by (S - 1) / S, a third at 3 seeds,
    and so few values say little of their distribution: the seeds' part of the interval is rough.
    The chance in single answers, drawn with the seeds and again with the problems, counts (2 - 1/S)
    (2 - 1/P) - 1 times, 2.3 at 3 seeds and 2.6 at 5, which widens the interval. On answers drawn as
    ours are (256 problems, 2 each), it held the truth in 99 to 100% of trials where seeds move a
    row by up to 1 point, in 95 to 97% at 2 points, in 88 to 95% at 3 points (3 and 5 seeds).
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
    """(R, S) and (R, P) counts: how often each resample holds each seed and each problem. All rows
    of a table share them."""
    rng = np.random.default_rng(seed)
    seeds = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), num_resamples)
    problems = rng.multinomial(num_problems, np.full(num_problems, 1 / num_problems), num_resamples)
    return seeds, problems


def last_shares(records: Sequence[Record]) -> np.ndarray:
    """(S, P) shares of correct answers after the last step, one row a seed."""
    return np.array(
        [decode_counts(r["evaluations"][-1]["correct"]) / r["num_samples"] for r in records]
    )


def row_numbers(
    setting: str, records: Sequence[Record], references: Mapping[str, Sequence[Record]]
) -> dict[str, Any]:
    """One row of a table: last and best accuracy, the seeds' spread, and its differences.

    best: of each seed's evaluations, chosen on the test problems themselves.
    """
    last = [record["evaluations"][-1]["avg_at_k"] for record in records]
    best = [max(e["avg_at_k"] for e in record["evaluations"]) for record in records]
    differences = []
    for name, others in references.items():
        if name != setting:
            here, there = last_shares(records), last_shares(others)
            # Counts of answers, which are exact where shares are not.
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
    """The references of a row, of those that are shown."""
    references = table.references if setting == "paint" else table.references[:1]
    return tuple(name for name in references if name in shown)


def table_numbers(
    scale: Scale, numbers: Sequence[int], records: Mapping[str, Record]
) -> list[dict[str, Any]]:
    """Every panel of the tables asked for: Table 1 has one a size of the base."""
    panels = []
    for table in chosen_tables(numbers):
        for size in table_sizes(scale, table):
            seeds = table_seeds(scale, table)
            of = {
                row: [records[PlannedRun(size, row, seed).run_id] for seed in seeds]
                for row in shown_rows(scale, table)
            }
            rows = []
            for row, found in of.items():
                references = {name: of[name] for name in compared_with(table, row, of)}
                rows.append(row_numbers(row, found, references))
            panels.append({"table": table.number, "size": size, "seeds": list(seeds), "rows": rows})
    return panels
