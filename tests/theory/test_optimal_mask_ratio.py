"""Theorem D.2 (3.2 in the text): the further the student, the less is hidden; and the schedule."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from paint_engine.prompts.masking import mask_ratio, mask_solution

Array = NDArray[np.float64]
Draw = Callable[..., Array]

SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.integers(2, 8)
COEFFICIENTS = st.floats(-1.5, 1.5).map(lambda exponent: 10**exponent)


@dataclass(frozen=True)
class Targets:
    """q_rho = (1 - rho) q0 + rho q1 over |X| continuations, all entries positive."""

    q0: Array
    q1: Array

    def at(self, rho: float) -> Array:
        return (1 - rho) * self.q0 + rho * self.q1

    def entropy(self, rho: float) -> float:
        return float(-(self.at(rho) * np.log(self.at(rho))).sum())

    def entropy_slope(self, rho: float) -> float:
        # d/drho of -q log q is -(q1 - q0)(log q + 1), and the entries of q1 - q0 add up to 0.
        return float(-((self.q1 - self.q0) * np.log(self.at(rho))).sum())

    def entropy_curvature(self, rho: float) -> float:
        return float(-((self.q1 - self.q0) ** 2 / self.at(rho)).sum())


@dataclass(frozen=True)
class Student:
    """p_theta over X: a softmax of features (|X|, D) times parameters (D,)."""

    features: torch.Tensor
    parameters: torch.Tensor

    def second_moment(self, q: Array) -> float:
        """M2(q, theta) = E_q |d log p_theta / d theta|^2, the gradients by autograd."""
        theta = self.parameters.clone().requires_grad_()
        log_p = torch.log_softmax(self.features @ theta, dim=0)
        squares = [
            torch.autograd.grad(one, theta, retain_graph=True)[0].square().sum().item()
            for one in log_p
        ]
        return float(q @ np.array(squares))

    def epsilon(self, targets: Targets) -> float:
        return self.second_moment(targets.q1) - self.second_moment(targets.q0)


def draw_targets(draw: Draw, seed: int, size: int) -> Targets:
    q0, q1 = draw(np.random.default_rng(seed), 2, size, least=0.05)
    assume(np.abs(q0 - q1).max() > 0.05)
    return Targets(q0, q1)


def draw_student(seed: int, size: int) -> Student:
    generator = torch.Generator().manual_seed(seed % 2**31)
    features = torch.randn(size, 3, generator=generator, dtype=torch.float64)
    return Student(features, torch.randn(3, generator=generator, dtype=torch.float64))


def maximiser(targets: Targets, beta: float, cost: float, epsilon: float) -> float:
    """The rho in [0, 1] with the largest beta H(rho) - cost rho epsilon, by bisection.

    Its derivative beta H'(rho) - cost epsilon falls strictly; where it never changes sign the best
    rho is an end.
    """
    low, high = 0.0, 1.0
    for _ in range(80):
        middle = (low + high) / 2
        if beta * targets.entropy_slope(middle) > cost * epsilon:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def is_interior(rho: float) -> bool:
    return 0.02 < rho < 0.98


@given(SEEDS, SIZES, st.floats(0.0, 1.0))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_theorem_d2_the_second_moment_is_linear_along_the_path(
    draw: Draw, seed: int, size: int, rho: float
) -> None:
    targets, student = draw_targets(draw, seed, size), draw_student(seed, size)
    expected = student.second_moment(targets.q0) + rho * student.epsilon(targets)
    assert student.second_moment(targets.at(rho)) == pytest.approx(expected, rel=1e-12)


@given(SEEDS, SIZES, st.floats(0.05, 0.95))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_theorem_d2_entropy_is_strictly_concave_along_the_path(
    draw: Draw, seed: int, size: int, rho: float
) -> None:
    targets = draw_targets(draw, seed, size)
    step = 1e-4
    below, above = targets.entropy(rho - step), targets.entropy(rho + step)
    slope = (above - below) / (2 * step)
    curvature = (above - 2 * targets.entropy(rho) + below) / step**2
    assert targets.entropy_slope(rho) == pytest.approx(slope, abs=1e-5)
    assert targets.entropy_curvature(rho) == pytest.approx(curvature, rel=1e-3, abs=1e-5)
    # By Cauchy and Schwarz, as q_rho adds up to 1.
    assert targets.entropy_curvature(rho) <= -(np.abs(targets.q1 - targets.q0).sum() ** 2) + 1e-12


@given(SEEDS, SIZES, COEFFICIENTS, COEFFICIENTS)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_theorem_d2_no_ratio_beats_the_maximiser(
    draw: Draw, seed: int, size: int, beta: float, cost: float
) -> None:
    """The objective itself, with the second moment measured at each ratio."""
    targets, student = draw_targets(draw, seed, size), draw_student(seed, size)

    def objective(rho: float) -> float:
        return beta * targets.entropy(rho) - cost * student.second_moment(targets.at(rho))

    best = maximiser(targets, beta, cost, student.epsilon(targets))
    peak = objective(best)
    others = [objective(rho) for rho in np.linspace(0.0, 1.0, 21)]
    assert peak >= max(others) - 1e-12 * abs(peak)


@given(SEEDS, SIZES, COEFFICIENTS, COEFFICIENTS)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_theorem_d2_slope_of_the_optimal_ratio(
    draw: Draw, seed: int, size: int, beta: float, cost: float
) -> None:
    """d rho*/d epsilon = lambda / (beta H''(rho*)) < 0, against central differences."""
    targets, student = draw_targets(draw, seed, size), draw_student(seed, size)
    epsilon = student.epsilon(targets)
    rho = maximiser(targets, beta, cost, epsilon)
    assume(is_interior(rho))
    expected = cost / (beta * targets.entropy_curvature(rho))
    step = 1e-4 / abs(expected)
    above = maximiser(targets, beta, cost, epsilon + step)
    below = maximiser(targets, beta, cost, epsilon - step)
    assert above < rho < below
    assert (above - below) / (2 * step) == pytest.approx(expected, rel=1e-4)


@given(SEEDS, SIZES, COEFFICIENTS, COEFFICIENTS)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_theorem_3_2_students_further_off_get_smaller_ratios(
    draw: Draw, seed: int, size: int, beta: float, cost: float
) -> None:
    """Real students in the order of their epsilon, not one epsilon that is moved by hand."""
    targets = draw_targets(draw, seed, size)
    students = [draw_student(seed + offset, size) for offset in range(6)]
    epsilons = sorted(student.epsilon(targets) for student in students)
    ratios = [maximiser(targets, beta, cost, epsilon) for epsilon in epsilons]
    assume(any(is_interior(rho) for rho in ratios))
    for (near, far), (hidden, less_hidden) in zip(
        pairwise(epsilons), pairwise(ratios), strict=True
    ):
        assert less_hidden <= hidden
        if far - near > 1e-6 and (is_interior(hidden) or is_interior(less_hidden)):
            assert less_hidden < hidden


ENDS = st.tuples(st.floats(0.0, 1.0), st.floats(0.0, 1.0)).map(sorted)


@given(ENDS, st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_theorem_3_2_the_schedule_is_affine_and_falls_with_the_error(
    ends: list[float], error: float, other: float, weight: float
) -> None:
    """`mask_ratio` over 1 - overlap, which stands for epsilon."""
    rho_wrong, rho_correct = ends

    def schedule(error: float) -> float:
        return mask_ratio(1.0 - error, rho_wrong, rho_correct)

    between = weight * error + (1 - weight) * other
    on_the_line = weight * schedule(error) + (1 - weight) * schedule(other)
    assert schedule(between) == pytest.approx(on_the_line, abs=1e-14)
    assert schedule(0.0) == pytest.approx(rho_correct, abs=1e-15)
    assert schedule(1.0) == pytest.approx(rho_wrong, abs=1e-15)
    if error - other > 1e-6 and rho_correct - rho_wrong > 1e-6:
        assert schedule(error) < schedule(other)


@given(ENDS, st.lists(st.floats(0.0, 1.0), min_size=2, max_size=6).map(sorted))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_theorem_3_2_more_overlap_hides_more_of_the_solution(
    ends: list[float], overlaps: list[float]
) -> None:
    solution = "abcdefghijklmnopqrstuvwxyz" * 8
    rho_wrong, rho_correct = ends
    visible = [
        len(mask_solution(solution, mask_ratio(overlap, rho_wrong, rho_correct), marker=""))
        for overlap in (0.0, *overlaps, 1.0)
    ]
    assert visible == sorted(visible, reverse=True)
    if rho_correct - rho_wrong > 0.01:
        assert visible[-1] < visible[0]
