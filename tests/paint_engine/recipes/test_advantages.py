"""Advantages of GRPO's groups."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paint_engine.recipes.grpo import group_advantages

REWARDS = st.floats(-5, 5, allow_subnormal=False)


def test_a_group_by_hand() -> None:
    # Mean 1/4; squares 3 (1/4)^2 + (3/4)^2 = 3/4, of n - 1 = 3: variance 1/4.
    scaled = group_advantages([0, 0, 1, 0], 4, scale_by_std=True)
    assert scaled == pytest.approx([-0.25 / 0.5001, -0.25 / 0.5001, 0.75 / 0.5001, -0.25 / 0.5001])
    assert group_advantages([0, 0, 1, 0], 4, scale_by_std=False) == [-0.25, -0.25, 0.75, -0.25]


def test_groups_are_consecutive_and_do_not_see_each_other() -> None:
    first, second = [1.0, 0.0, 0.0], [5.0, 3.0, 7.0]
    both = group_advantages(first + second, 3, scale_by_std=True)
    assert both[:3] == group_advantages(first, 3, scale_by_std=True)
    assert both[3:] == group_advantages(second, 3, scale_by_std=True)


@pytest.mark.parametrize("scale_by_std", [True, False])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1 / 3])
def test_equal_rewards_give_exact_zeros(reward: float, scale_by_std: bool) -> None:
    assert group_advantages([reward] * 14, 7, scale_by_std=scale_by_std) == [0.0] * 14


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.lists(REWARDS, min_size=2, max_size=8))
def test_mean_zero_and_a_deviation_of_nearly_one(rewards: list[float]) -> None:
    advantages = group_advantages(rewards, len(rewards), scale_by_std=True)
    assert math.fsum(advantages) == pytest.approx(0.0, abs=1e-9)
    mean = math.fsum(rewards) / len(rewards)
    count = len(rewards) - 1
    std = math.sqrt(math.fsum((r - mean) ** 2 for r in rewards) / count)
    deviation = math.sqrt(math.fsum(a * a for a in advantages) / count)
    assert deviation == pytest.approx(std / (std + 1e-4), rel=1e-6, abs=1e-9)


def test_incomplete_groups_are_our_own_mistake() -> None:
    with pytest.raises(AssertionError):
        group_advantages([1.0, 0.0, 1.0], 2, scale_by_std=True)
