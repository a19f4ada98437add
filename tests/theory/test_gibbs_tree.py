"""Proposition D.1 (3.1 in the text): token by token, or by the energy of whole continuations."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from paint_kernels import token_logprobs

Array = NDArray[np.float64]
Path = tuple[int, ...]

EOS = 0
DEPTHS, VOCABULARIES = st.integers(1, 4), st.integers(2, 4)
SPREADS = st.sampled_from([0.1, 1.0, 5.0])
SEEDS = st.integers(0, 2**32 - 1)


@dataclass(frozen=True)
class Tree:
    """Every continuation of `len(costs)` tokens; costs[i][a_1, .., a_i+1] = c(s_i+1, a_i+1)."""

    costs: list[Array]

    @property
    def vocab_size(self) -> int:
        return self.costs[0].shape[0]

    def leaves(self) -> Iterator[Path]:
        return itertools.product(range(self.vocab_size), repeat=len(self.costs))

    def energy(self, leaf: Path, start: int = 0) -> float:
        """The sum of the costs from depth `start` on."""
        return math.fsum(self.costs[i][leaf[: i + 1]] for i in range(start, len(leaf)))

    def gibbs(self) -> dict[Path, float]:
        """exp(-E) over its sum, leaf by leaf."""
        weights = {leaf: math.exp(-self.energy(leaf)) for leaf in self.leaves()}
        partition = math.fsum(weights.values())
        return {leaf: weight / partition for leaf, weight in weights.items()}

    def soft_values(self) -> list[Array]:
        """V at every state of every depth, from the leaves back: V = log sum exp(-c + V next)."""
        values = [np.zeros((self.vocab_size,) * len(self.costs))]
        for costs in reversed(self.costs):
            values.append(np.logaddexp.reduce(-costs + values[-1], axis=-1))
        return values[::-1]

    def policy(self) -> list[Array]:
        """exp(-c(s_i, a_i) + V(s_i+1) - V(s_i)), the next-token distributions."""
        values = self.soft_values()
        return [
            np.exp(-costs + values[i + 1] - values[i][..., None])
            for i, costs in enumerate(self.costs)
        ]


def draw_tree(depth: int, vocab_size: int, spread: float, seed: int) -> Tree:
    generator = np.random.default_rng(seed)
    shapes = [(vocab_size,) * (i + 1) for i in range(depth)]
    return Tree([spread * generator.standard_normal(shape) for shape in shapes])


def assert_same(actual: dict[Path, float], expected: dict[Path, float]) -> None:
    assert actual.keys() == expected.keys()
    for leaf, probability in expected.items():
        assert math.isclose(actual[leaf], probability, rel_tol=1e-10, abs_tol=0.0), leaf


def product_of(policy: list[Array], leaf: Path) -> float:
    return math.prod(float(level[leaf[: i + 1]]) for i, level in enumerate(policy))


@given(DEPTHS, VOCABULARIES, SPREADS, SEEDS)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_proposition_d1_a_model_is_the_gibbs_distribution_of_its_log_costs(
    depth: int, vocab_size: int, spread: float, seed: int
) -> None:
    scores = draw_tree(depth, vocab_size, spread, seed).costs
    model = [np.exp(-c) / np.exp(-c).sum(axis=-1, keepdims=True) for c in scores]
    tree = Tree([-np.log(level) for level in model])
    assert_same(tree.gibbs(), {leaf: product_of(model, leaf) for leaf in tree.leaves()})
    # Its partition function is 1 from every state on: there is nothing left to normalise.
    for values in tree.soft_values():
        np.testing.assert_allclose(values, 0.0, atol=1e-12)


@given(DEPTHS, VOCABULARIES, SPREADS, SEEDS)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_proposition_d1_an_additive_energy_is_a_next_token_policy(
    depth: int, vocab_size: int, spread: float, seed: int
) -> None:
    tree = draw_tree(depth, vocab_size, spread, seed)
    policy = tree.policy()
    for level in policy:
        np.testing.assert_allclose(level.sum(axis=-1), 1.0, rtol=1e-12)
    assert_same({leaf: product_of(policy, leaf) for leaf in tree.leaves()}, tree.gibbs())


@given(DEPTHS, VOCABULARIES, SPREADS, SEEDS)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_proposition_d1_soft_values_are_log_sums_over_continuations(
    depth: int, vocab_size: int, spread: float, seed: int
) -> None:
    tree = draw_tree(depth, vocab_size, spread, seed)
    for start, values in enumerate(tree.soft_values()):
        sums = np.zeros_like(values)
        for state in np.ndindex(values.shape):
            rest = itertools.product(range(vocab_size), repeat=depth - start)
            terms = [math.exp(-tree.energy(state + suffix, start)) for suffix in rest]
            sums[state] = math.log(math.fsum(terms))
        np.testing.assert_allclose(values, sums, rtol=1e-12, atol=1e-12)


@given(DEPTHS, VOCABULARIES, SPREADS, SEEDS)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_proposition_d1_the_policy_is_the_conditional_of_the_gibbs_distribution(
    depth: int, vocab_size: int, spread: float, seed: int
) -> None:
    tree = draw_tree(depth, vocab_size, spread, seed)
    joint = np.zeros((vocab_size,) * depth)
    for leaf, probability in tree.gibbs().items():
        joint[leaf] = probability
    for i, level in enumerate(tree.policy()):
        prefix = joint.sum(axis=tuple(range(i + 1, depth)))
        np.testing.assert_allclose(level, prefix / prefix.sum(-1, keepdims=True), rtol=1e-10)


@given(DEPTHS, VOCABULARIES, SPREADS, SEEDS)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_proposition_d1_strings_that_stop_early_are_padded_leaves(
    depth: int, vocab_size: int, spread: float, seed: int
) -> None:
    """After the EOS only the EOS can follow, at no cost: the horizon is the same for every leaf."""
    tree = draw_tree(depth, vocab_size, spread, seed)
    weights: dict[Path, float] = {}
    for length in range(depth + 1):
        for words in itertools.product(range(1, vocab_size), repeat=length):
            string = words if length == depth else (*words, EOS)
            padding = (EOS,) * (depth - len(string))
            weights[string + padding] = math.exp(-tree.energy(string))
    partition = math.fsum(weights.values())

    for i, costs in enumerate(tree.costs):
        for node in np.ndindex(costs.shape):
            if EOS in node[:i]:
                costs[node] = 0.0 if node[i] == EOS else math.inf
    policy = tree.policy()
    for leaf in tree.leaves():
        expected = weights.get(leaf, 0.0) / partition
        assert math.isclose(product_of(policy, leaf), expected, rel_tol=1e-10, abs_tol=0.0)


@given(st.integers(1, 3), VOCABULARIES, st.floats(0.5, 1.5), SEEDS)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_proposition_d1_token_logprobs_are_the_local_costs(
    depth: int, vocab_size: int, temperature: float, seed: int
) -> None:
    """A model of one hidden state a prefix: minus the log-probabilities of the kernels add up to an
    energy that needs no normaliser."""
    generator = torch.Generator().manual_seed(seed % 2**31)
    head = torch.randn(vocab_size, 5, generator=generator, dtype=torch.float64)
    costs = []
    for i in range(depth):
        states = torch.randn(vocab_size**i, 5, generator=generator, dtype=torch.float64)
        states = states.repeat_interleave(vocab_size, dim=0)
        tokens = torch.arange(vocab_size).repeat(vocab_size**i)
        logprobs = token_logprobs(states, head, tokens, temperature=temperature).logprobs
        costs.append(-logprobs.view((vocab_size,) * (i + 1)).numpy())
    tree = Tree(costs)
    for leaf, probability in tree.gibbs().items():
        assert math.isclose(probability, math.exp(-tree.energy(leaf)), rel_tol=1e-12)
    for level, cost in zip(tree.policy(), costs, strict=True):
        np.testing.assert_allclose(level, np.exp(-cost), rtol=1e-12)
