"""The criterion of the soak finds a leak below an allocator's noise, and no leak in the noise."""

import random

import pytest

from bench.soak.flat import MIB, judge_amount, judge_count, slope_per_1000_steps
from bench.soak.steps import AMOUNTS, COUNTS, LIMIT_BYTES, judge

STEPS = list(range(5, 1001, 5))


def memory(leaked_bytes_per_step: float) -> list[float]:
    """500 MiB after a warm-up, with the noise of an allocator that keeps and returns 2 MiB."""
    rng = random.Random(0)
    warm = [(300 + 200 * min(1.0, step / 200)) * MIB for step in STEPS]
    return [
        base + rng.choice((0, 2)) * MIB + leaked_bytes_per_step * step
        for base, step in zip(warm, STEPS, strict=True)
    ]


def test_a_warm_up_and_noise_are_flat() -> None:
    assert judge_amount(STEPS, memory(0), LIMIT_BYTES).is_flat


@pytest.mark.parametrize("leaked_kib_per_step", [16, 1000])
def test_a_leak_of_some_kibibytes_a_step_is_found(leaked_kib_per_step: int) -> None:
    verdict = judge_amount(STEPS, memory(1024 * leaked_kib_per_step), LIMIT_BYTES)
    assert not verdict.is_flat
    assert verdict.slope == pytest.approx(1000 * 1024 * leaked_kib_per_step, rel=0.3)


def test_a_leak_that_begins_late_is_found() -> None:
    late = [300 * MIB + max(0, step - 700) * MIB / 10 for step in STEPS]
    assert not judge_amount(STEPS, late, LIMIT_BYTES).is_flat


def test_files_that_are_open_for_a_moment_are_no_leak_and_one_that_stays_is() -> None:
    brief = [6 + (step % 15 == 0) for step in STEPS]
    assert judge_count(STEPS, brief).is_flat
    assert not judge_count(STEPS, [n + (step > 740) for n, step in zip(brief, STEPS)]).is_flat  # noqa: B905


def test_every_series_is_judged() -> None:
    series = {name: [7] * len(STEPS) for name in (*AMOUNTS, *COUNTS)}
    assert all(verdict["is_flat"] for verdict in judge({"step": STEPS, **series}).values())
    leaking = judge({"step": STEPS, **series, "threads": [step // 5 for step in STEPS]})
    assert [name for name, verdict in leaking.items() if not verdict["is_flat"]] == ["threads"]


def test_the_slope_is_per_1000_steps() -> None:
    assert slope_per_1000_steps([0, 10, 20], [1.0, 2.0, 3.0]) == pytest.approx(100.0)
    with pytest.raises(ValueError, match="3 samples have no quarters"):
        judge_count([1, 2, 3], [1, 2, 3])
