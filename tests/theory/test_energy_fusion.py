"""Propositions D.4 and D.5: mixing energies, and which positions are worth it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from paint_kernels import entropy_ratio, paint_loss, paint_loss_from_logits, select_top_fraction

Array = NDArray[np.float64]

SEEDS = st.integers(0, 2**32 - 1)
DEVIATIONS = st.floats(-1.0, 1.0).map(lambda exponent: 10**exponent)
STRENGTHS = st.floats(0.01, 0.99)
EXPONENTS = st.floats(0.25, 3.0)
FRACTIONS = st.sampled_from([0.0, 0.03, 0.07, 0.25, 0.5, 0.9, 1.0])
LENGTHS = st.lists(st.integers(0, 8), min_size=1, max_size=4)


def information_gain(ratio: float, strength: float, exponent: float) -> float:
    """Delta I = log(1 - k + k R^gamma) / 2 (Eq. 10), in nats."""
    return 0.5 * math.log(1 - strength + strength * ratio**exponent)


def best_sum(scores: Sequence[float], budget: int) -> float:
    """The optimum of Eq. 11 over every subset of `budget` positions."""
    return max(math.fsum(chosen) for chosen in combinations(scores, budget))


def assert_solves_the_budget_problem(
    selected: Tensor, ratio: Tensor, lengths: list[int], fraction: float, k: float, exponent: float
) -> None:
    """Rollout by rollout: the budget is spent in full, and no other subset gains more."""
    assert len(selected) == sum(lengths)
    start = 0
    for length in lengths:
        part, ratios = (one[start : start + length].tolist() for one in (selected, ratio))
        scores = [information_gain(value, k, exponent) for value in ratios]
        budget = math.ceil(Fraction(str(fraction)) * length)
        assert sum(part) == budget
        gained = math.fsum(score for score, one in zip(scores, part, strict=True) if one)
        assert gained == pytest.approx(best_sum(scores, budget), rel=1e-12, abs=1e-12)
        start += length


@given(SEEDS, st.integers(2, 6), DEVIATIONS, DEVIATIONS)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_proposition_d4_the_map_energy_weighs_each_by_its_precision(
    seed: int, vocab_size: int, student_deviation: float, teacher_deviation: float
) -> None:
    """The likeliest latent energies, found by autograd, and their distribution, by the loss."""
    generator = torch.Generator().manual_seed(seed % 2**31)
    logits = 2 * torch.randn(2, vocab_size, generator=generator, dtype=torch.float64)
    student, teacher = -torch.log_softmax(logits, dim=-1)
    latent = torch.zeros_like(student, requires_grad=True)

    def negative_log_likelihood(latent: Tensor) -> Tensor:
        from_student = (student - latent).square() / (2 * student_deviation**2)
        from_teacher = (teacher - latent).square() / (2 * teacher_deviation**2)
        return (from_student + from_teacher).sum()

    # It is a quadratic: one step of Newton's method from anywhere ends at its minimum.
    (slope,) = torch.autograd.grad(negative_log_likelihood(latent), latent, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), latent)
    energy = -slope.detach() / curvature

    variance = teacher_deviation**2
    k = variance / (variance + student_deviation**2)
    torch.testing.assert_close(energy, k * student + (1 - k) * teacher, rtol=1e-9, atol=1e-12)

    # The target that the loss builds on a selected position is the distribution of that energy.
    output = paint_loss_from_logits(
        logits[:1],
        logits[1:],
        torch.tensor([0, 1]),
        top_fraction=1.0,
        interpolation_weight=k,
        pointwise_clip=None,
    )
    log_map = torch.log_softmax(-energy, dim=-1)
    expected = (log_map.exp() * (log_map + student)).sum()
    torch.testing.assert_close(output.token_kl[0], expected, rtol=1e-8, atol=1e-12)


@dataclass(frozen=True)
class Sensor:
    """A local Gaussian over one energy coordinate."""

    mean: float
    deviation: float

    def log_density(self, energy: Array) -> Array:
        return -((energy - self.mean) ** 2) / (2 * self.deviation**2)


def differential_entropy(log_density: Array, energies: Array) -> float:
    """In nats, of an unnormalised density on an even grid that holds all of it."""
    step = energies[1] - energies[0]
    density = np.exp(log_density - log_density.max())
    density /= density.sum() * step
    return float(-(density * np.log(np.where(density > 0, density, 1.0))).sum() * step)


@given(
    student_entropy=st.floats(0.05, 3.0),
    ratio=st.floats(0.2, 5.0),
    exponent=st.floats(0.25, 2.0),
    strength=STRENGTHS,
    scale=DEVIATIONS,
    shift=st.floats(-3.0, 3.0),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_proposition_d5_gain_is_the_lost_entropy_of_the_interpolated_gaussian(
    student_entropy: float,
    ratio: float,
    exponent: float,
    strength: float,
    scale: float,
    shift: float,
) -> None:
    """Entropies by numerical integration of the densities, wherever their means are."""
    teacher_entropy = ratio * student_entropy
    student = Sensor(0.0, scale * student_entropy ** (exponent / 2))
    teacher = Sensor(shift * student.deviation, scale * teacher_entropy ** (exponent / 2))
    widest = max(student.deviation, teacher.deviation)
    # Beyond 12 deviations nothing is left that a float64 sum would notice.
    reach = 12 * widest + abs(teacher.mean)
    energies = np.linspace(-reach, reach, 4001)
    of_teacher = teacher.log_density(energies)
    mixed = (1 - strength) * of_teacher + strength * student.log_density(energies)
    lost = differential_entropy(of_teacher, energies) - differential_entropy(mixed, energies)
    gain = information_gain(ratio, strength, exponent)
    assert lost == pytest.approx(gain, abs=1e-9)
    if abs(ratio - 1) > 1e-6:
        assert (lost > 0) == (ratio > 1)


@given(st.lists(st.floats(-4.0, 4.0), min_size=2, max_size=8, unique=True), STRENGTHS, EXPONENTS)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_proposition_d5_gain_rises_with_the_ratio_and_is_positive_above_1(
    logarithms: list[float], strength: float, exponent: float
) -> None:
    ratios = [math.exp(one) for one in sorted(logarithms)]
    assume(all(above - below > 1e-6 for below, above in pairwise(ratios)))
    gains = [information_gain(ratio, strength, exponent) for ratio in ratios]
    assert all(below < above for below, above in pairwise(gains))
    assert information_gain(1.0, strength, exponent) == pytest.approx(0.0, abs=1e-15)
    clear = [pair for pair in zip(gains, ratios, strict=True) if abs(pair[1] - 1) > 1e-6]
    assert all((gain > 0) == (ratio > 1) for gain, ratio in clear)


@given(LENGTHS, FRACTIONS, STRENGTHS, EXPONENTS, st.booleans(), st.data())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_proposition_d5_the_kernels_selector_solves_the_budget_problem(
    lengths: list[int],
    fraction: float,
    strength: float,
    exponent: float,
    ties: bool,
    data: st.DataObject,
) -> None:
    """With ties any choice at the cutoff is optimal, so the sums are compared, not the sets."""
    num_tokens = sum(lengths)
    one = st.sampled_from([0.1, 0.2, 0.4]) if ties else st.floats(0.01, 5.0)
    many = st.lists(one, min_size=num_tokens, max_size=num_tokens)
    student, teacher = (torch.tensor(data.draw(many), dtype=torch.float64) for _ in range(2))
    ratio = entropy_ratio(teacher, student)
    torch.testing.assert_close(ratio, teacher / student, rtol=1e-15, atol=0.0)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    selected = select_top_fraction(ratio, cu_seqlens, fraction)
    assert_solves_the_budget_problem(selected, ratio, lengths, fraction, strength, exponent)


@given(LENGTHS, FRACTIONS, STRENGTHS, EXPONENTS, st.floats(0.5, 1.5), SEEDS)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_proposition_d5_the_loss_interpolates_where_the_gain_is_largest(
    draw: Callable[..., Array],
    entropy: Callable[[Array], Array],
    lengths: list[int],
    fraction: float,
    strength: float,
    exponent: float,
    temperature: float,
    seed: int,
) -> None:
    """The positions that `paint_loss` marks, from entropies (Eq. 8) computed apart from it."""
    generator = np.random.default_rng(seed)
    # Rows of very different sharpness, so that the ratios lie on both sides of 1.
    scales = np.exp(generator.uniform(-2, 2, (2, sum(lengths), 1)))
    hidden = torch.from_numpy(scales * generator.standard_normal((2, sum(lengths), 4)))
    head = torch.from_numpy(generator.standard_normal((7, 4)))
    output = paint_loss(
        hidden[0],
        hidden[1],
        head,
        torch.tensor([0, *lengths]).cumsum(0),
        temperature=temperature,
        top_fraction=fraction,
        interpolation_weight=strength,
    )
    p = torch.softmax(hidden @ head.T / temperature, dim=-1)
    of_student, of_teacher = torch.from_numpy(entropy(p.numpy()))
    # Entropies are exact to 1e-15 or so, and the floor divides that by no less than 1e-6.
    ratio = of_teacher / of_student.clamp(min=1e-6)
    torch.testing.assert_close(output.entropy_ratio, ratio, rtol=1e-8, atol=1e-8)
    assert_solves_the_budget_problem(
        output.selected, output.entropy_ratio, lengths, fraction, strength, exponent
    )
