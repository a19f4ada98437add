"""Propositions and lemmas D.6, D.7, D.9 and D.11 (3.3): what a hidden block of the solution costs.

The reference solution y* has T tokens, the teacher's next action is A. A world is their joint
distribution, an array with one axis for each token and a last one for A. The mask of k tokens at
t = 1 .. T - k + 1 splits y* into the hidden block M and the visible context C.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise, permutations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from paint_engine.prompts.masking import PLACEMENTS, mask_solution
from paint_kernels import paint_loss_from_logits

Array = NDArray[np.float64]
Draw = Callable[..., Array]
Entropy = Callable[[Array], Array]

SEEDS = st.integers(0, 2**32 - 1)
ALPHABETS = st.integers(2, 3)
LENGTHS = st.integers(1, 4)
ZEROS = st.sampled_from([0.0, 0.5])


def draw_world(draw: Draw, seed: int, alphabet: int, length: int, zeros: float) -> Array:
    """Pr(y*, A); with `zeros`, some solutions and some actions are impossible."""
    generator = np.random.default_rng(seed)
    num_solutions, num_actions = alphabet**length, int(generator.integers(2, 5))
    solutions = draw(generator, num_solutions, zeros=zeros)
    actions = draw(generator, num_solutions, num_actions, zeros=zeros)
    return (solutions[:, None] * actions).reshape((alphabet,) * length + (num_actions,))


def masked(world: Array, t: int, k: int) -> Array:
    """Pr(C, M, A), one axis each, for the block y*_t .. y*_(t+k-1)."""
    length, alphabet, num_actions = world.ndim - 1, world.shape[0], world.shape[-1]
    hidden = list(range(t - 1, t + k - 1))
    visible = [axis for axis in range(length) if axis not in hidden]
    ordered = world.transpose([*visible, *hidden, length])
    return ordered.reshape(alphabet ** (length - k), alphabet**k, num_actions)


def positions(length: int, k: int) -> range:
    return range(1, length - k + 2)


def divergence(q: Array, p: Array) -> float:
    """KL(q, p) in nats over all entries, with 0 log 0 = 0."""
    some = q > 0
    return float((q[some] * np.log(q[some] / p[some])).sum())


def mutual_information(joint: Array) -> float:
    """I between the two axes of a joint distribution, in nats."""
    return divergence(joint, joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True))


def information_lost(world: Array, t: int, k: int) -> float:
    """Gamma(t) of one world: I(A; M | C), context by context."""
    parts = [part for part in masked(world, t, k) if part.sum() > 0]
    return float(sum(part.sum() * mutual_information(part / part.sum()) for part in parts))


def information_visible(world: Array, t: int, k: int) -> float:
    """I(A; C)."""
    return mutual_information(masked(world, t, k).sum(axis=1))


def information_whole(world: Array) -> float:
    """I(A; y*)."""
    return mutual_information(world.reshape(-1, world.shape[-1]))


@dataclass(frozen=True)
class Posterior:
    """What one visible context leaves open, and the teacher's target without the hidden block."""

    weights: Array
    """(M,) Pr(M = m | C)"""
    targets: Array
    """(M, A) q_m = Pr(A | C, M = m); uniform where m is impossible"""
    mixture: Array
    """(A,) Pr(A | C), summed from the joint without the posterior"""
    joint: Array
    """(M, A) Pr(M, A | C)"""


def posteriors(world: Array, t: int, k: int) -> list[Posterior]:
    """Of every visible context that is possible."""
    found = []
    for part in masked(world, t, k):
        if part.sum() == 0:
            continue
        joint = part / part.sum()
        weights = joint.sum(axis=1)
        uniform = np.full_like(joint, 1 / joint.shape[1])
        targets = np.divide(joint, weights[:, None], out=uniform, where=weights[:, None] > 0)
        found.append(Posterior(weights, targets, joint.sum(axis=0), joint))
    return found


def every_posterior(world: Array) -> list[Posterior]:
    """Over all budgets, positions and contexts."""
    length = world.ndim - 1
    blocks = [(t, k) for k in range(1, length + 1) for t in positions(length, k)]
    return [posterior for t, k in blocks for posterior in posteriors(world, t, k)]


@given(SEEDS, ALPHABETS, LENGTHS, ZEROS)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_proposition_d6_masking_never_sharpens_the_target(
    draw: Draw, entropy: Entropy, seed: int, alphabet: int, length: int, zeros: float
) -> None:
    """The gap is at least what Pinsker's inequality asks for, so it is 0 for equal targets only."""
    for posterior in every_posterior(draw_world(draw, seed, alphabet, length, zeros)):
        weights, targets = posterior.weights, posterior.targets
        np.testing.assert_allclose(weights @ targets, posterior.mixture, atol=1e-14)
        gap = entropy(posterior.mixture) - weights @ entropy(targets)
        distances = np.abs(targets - posterior.mixture).sum(axis=1)
        assert gap >= weights @ distances**2 / 2 - 1e-13


@given(SEEDS, st.integers(2, 6), st.integers(2, 5), st.booleans())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_proposition_d6_equality_asks_for_one_target_on_the_posteriors_support(
    draw: Draw, entropy: Entropy, seed: int, num_blocks: int, num_actions: int, agree: bool
) -> None:
    """Impossible blocks may have any target; possible ones, of 5% and more, must share theirs."""
    generator = np.random.default_rng(seed)
    possible = np.arange(num_blocks) < generator.integers(1, num_blocks + 1)
    weights = draw(generator, num_blocks, least=0.3) * possible
    weights /= weights.sum()
    targets = draw(generator, num_blocks, num_actions)
    if agree:
        targets[possible] = targets[0]
    gap = entropy(weights @ targets) - weights @ entropy(targets)
    apart = np.abs(targets[possible] - targets[0]).max()
    if apart == 0:
        assert gap == pytest.approx(0.0, abs=1e-14)
    elif apart > 1e-3:
        assert gap > 1e-9


@given(SEEDS, ALPHABETS, LENGTHS, ZEROS)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_lemma_d7_expected_kl_is_that_of_the_mixture_plus_mutual_information(
    draw: Draw, seed: int, alphabet: int, length: int, zeros: float
) -> None:
    generator = np.random.default_rng(seed + 1)
    for posterior in every_posterior(draw_world(draw, seed, alphabet, length, zeros)):
        # The student may lack the tokens that no target has.
        student = draw(generator, posterior.mixture.size, least=0.05) * (posterior.mixture > 0)
        student /= student.sum()
        possible = posterior.weights > 0
        kls = [divergence(target, student) for target in posterior.targets[possible]]
        expected = posterior.weights[possible] @ kls
        of_mixture = divergence(posterior.mixture, student)
        information = mutual_information(posterior.joint)
        assert expected == pytest.approx(of_mixture + information, rel=1e-12, abs=1e-12)


@given(SEEDS, ALPHABETS, st.integers(1, 3), ZEROS)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_lemma_d7_holds_for_the_divergence_that_the_loss_reports(
    draw: Draw, seed: int, alphabet: int, length: int, zeros: float
) -> None:
    """`token_kl` of the loss, targets with zeros and all; the last row is the mixture's."""
    generator = np.random.default_rng(seed + 1)
    for posterior in posteriors(draw_world(draw, seed, alphabet, length, zeros), 1, length):
        rows = np.vstack([posterior.targets, posterior.mixture])
        student = draw(generator, rows.shape[1], least=0.05)
        output = paint_loss_from_logits(
            torch.from_numpy(np.log(student)).expand(len(rows), -1).contiguous(),
            torch.from_numpy(rows).log(),
            torch.tensor([0, len(rows)]),
            interpolation_weight=0.0,
        )
        kls = output.token_kl.numpy()
        information = mutual_information(posterior.joint)
        assert posterior.weights @ kls[:-1] == pytest.approx(kls[-1] + information, abs=1e-12)
        # The same gap once more, from the entropies that the loss reports (Proposition D.6).
        entropies = output.teacher_entropy.numpy()
        smoothing = entropies[-1] - posterior.weights @ entropies[:-1]
        assert smoothing == pytest.approx(information, abs=1e-12)


@given(SEEDS, ALPHABETS, LENGTHS, ZEROS, st.integers(1, 3))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_lemma_d9_what_is_lost_and_what_is_visible_add_up_to_the_same_at_every_position(
    draw: Draw, seed: int, alphabet: int, length: int, zeros: float, num_worlds: int
) -> None:
    """Over weighted examples, prefixes and positions n, each of them a world."""
    worlds = [
        draw_world(draw, seed + offset, alphabet, length, zeros) for offset in range(num_worlds)
    ]
    weights = draw(np.random.default_rng(seed), num_worlds)
    total = weights @ [information_whole(world) for world in worlds]
    for k in range(1, length + 1):
        for t in positions(length, k):
            lost = weights @ [information_lost(world, t, k) for world in worlds]
            visible = weights @ [information_visible(world, t, k) for world in worlds]
            assert lost == pytest.approx(total - visible, abs=1e-12)
            assert lost >= -1e-14


def reordered_by_information(world: Array, k: int) -> Array | None:
    """Assumption D.10 made true by an order of the solution's tokens, if there is one."""
    length = world.ndim - 1
    for order in permutations(range(length)):
        candidate = world.transpose([*order, length])
        visible = [information_visible(candidate, t, k) for t in positions(length, k)]
        if all(below <= above for below, above in pairwise(visible)):
            return candidate
    return None


def position_of(placement: str, length: int, k: int) -> int:
    """The t at which the engine hides k of a solution of `length` characters."""
    assert placement in PLACEMENTS
    visible = mask_solution("abcdef"[:length], k / length, placement=placement, marker="_")
    assert len(visible) == length - k + 1
    return visible.index("_") + 1


@given(SEEDS, ALPHABETS, st.integers(2, 4), ZEROS, st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_theorem_d11_and_3_3_the_engines_suffix_loses_least_where_late_tokens_say_least(
    draw: Draw, seed: int, alphabet: int, length: int, zeros: float, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, length - 1))
    world = reordered_by_information(draw_world(draw, seed, alphabet, length, zeros), k)
    assume(world is not None)
    assert world is not None
    lost = {t: information_lost(world, t, k) for t in positions(length, k)}
    for t1, t2 in pairwise(lost):
        assert lost[t2] <= lost[t1] + 1e-13
    suffix = position_of("suffix", length, k)
    assert suffix == length - k + 1
    for placement in ("prefix", "middle"):
        assert lost[suffix] <= lost[position_of(placement, length, k)] + 1e-13


@pytest.mark.parametrize("length", [2, 3, 4])
def test_theorem_d11_needs_its_assumption(length: int) -> None:
    """An action that copies the last token: D.10 is false, and the suffix is the worst mask."""
    world = np.zeros((2,) * length + (2,))
    for solution in np.ndindex(world.shape[:-1]):
        world[(*solution, solution[-1])] = 1 / 2**length
    lost = [information_lost(world, t, 1) for t in positions(length, 1)]
    assert lost[:-1] == pytest.approx([0.0] * (length - 1), abs=1e-14)
    assert lost[-1] == pytest.approx(np.log(2))
