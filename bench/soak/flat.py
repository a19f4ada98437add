"""Whether a series of samples is flat: the criterion of the soak, on numbers alone."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

MIB = 2**20


@dataclass(frozen=True)
class Verdict:
    """What a series does from its second quarter to its last. The first one warms up.

    second, last: of the two quarters, the median of amounts, the minimum of counts.
    slope: least squares over the second half, per 1,000 steps.
    """

    second: float
    last: float
    slope: float
    is_flat: bool

    def record(self) -> dict[str, Any]:
        return asdict(self)


def slope_per_1000_steps(steps: Sequence[int], values: Sequence[float]) -> float:
    """Returns the slope of the line through the points with the least squared error."""
    return 1000 * statistics.linear_regression(steps, values).slope


def _quarters(values: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    size = len(values) // 4
    if size == 0:
        raise ValueError(f"{len(values)} samples have no quarters; at least 4 are needed")
    return values[size : 2 * size], values[-size:]


def judge_amount(steps: Sequence[int], values: Sequence[float], limit: float) -> Verdict:
    """Judges an amount with noise, such as memory in bytes: flat if the last quarter's median is at
    most `limit` above the second's, and the second half's slope at most `limit` per 1,000 steps.

    An allocator's noise moves single samples up and down; a leak moves the medians and the slope.
    """
    second, last = map(statistics.median, _quarters(values))
    half = len(values) // 2
    slope = slope_per_1000_steps(steps[half:], values[half:])
    return Verdict(second, last, slope, last - second <= limit and slope <= limit)


def judge_count(steps: Sequence[int], values: Sequence[int]) -> Verdict:
    """Judges a count, such as that of open files: flat if the lowest of the last quarter is not
    above the lowest of the second.

    What is open for a moment, as during a checkpoint, raises single samples. What is never closed
    raises the lowest one.
    """
    second, last = map(min, _quarters(values))
    half = len(values) // 2
    slope = slope_per_1000_steps(steps[half:], values[half:])
    return Verdict(second, last, slope, last <= second)
