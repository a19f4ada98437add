"""Proposition D.8 on the loss itself: masked targets have the same mean gradient, and less noise.

A context is a position with its student; a hidden block m is left open by it with probability
rho(m), and would give the teacher's target q_m. Theta is the output projection, which all contexts
share, or the hidden states of one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from paint_kernels import paint_loss

Array = NDArray[np.float64]
Draw = Callable[..., Array]

# The forward KL as the proposition has it. Its limits are tested below, one setting at a time.
PLAIN = {"divergence": "forward_kl", "pointwise_clip": None, "interpolation_weight": 0.0}
SEEDS = st.integers(0, 2**32 - 1)
TEMPERATURES = st.floats(0.5, 1.5)


@dataclass(frozen=True)
class Contexts:
    """X contexts of M possible blocks each, over V tokens, float64."""

    hidden_states: Tensor
    """(X, H) the student's"""
    head: Tensor
    """(V, H)"""
    chances: Tensor
    """(X,) how often each context comes up"""
    posteriors: Tensor
    """(X, M) rho(m | context)"""
    targets: Tensor
    """(X, M, V) q_m"""

    @property
    def mixtures(self) -> Tensor:
        """(X, V) the masked teacher's targets, sum over m of rho(m) q_m."""
        return torch.einsum("xm,xmv->xv", self.posteriors, self.targets)


def draw_contexts(draw: Draw, seed: int, num_contexts: int, num_blocks: int) -> Contexts:
    generator = np.random.default_rng(seed)
    vocab_size = int(generator.integers(2, 6))
    return Contexts(
        torch.from_numpy(generator.standard_normal((num_contexts, 3))),
        torch.from_numpy(generator.standard_normal((vocab_size, 3))),
        torch.from_numpy(draw(generator, num_contexts)),
        torch.from_numpy(draw(generator, num_contexts, num_blocks)),
        torch.from_numpy(draw(generator, num_contexts, num_blocks, vocab_size, least=0.01)),
    )


def hidden_gradients(
    hidden_states: Tensor, head: Tensor, targets: Tensor, temperature: float = 1.0, **changes
) -> Tensor:
    """(N, H) d token_loss / d hidden_states of N one-token rollouts with teachers `targets` (N, V).

    The teacher's hidden states are T log q under the identity as its head: softmax(z_T / T) = q.
    """
    hidden_states = hidden_states.clone().requires_grad_()
    output = paint_loss(
        hidden_states,
        temperature * targets.log(),
        head,
        torch.arange(len(targets) + 1),
        teacher_lm_head_weight=torch.eye(len(head), dtype=targets.dtype),
        temperature=temperature,
        reduction="sum",
        **PLAIN | changes,
    )
    return torch.autograd.grad(output.loss, hidden_states)[0]


def head_gradient(hidden_state: Tensor, head: Tensor, target: Tensor, temperature: float) -> Tensor:
    """(V H,) d token_loss / d lm_head_weight at one position."""
    head = head.clone().requires_grad_()
    output = paint_loss(
        hidden_state[None],
        temperature * target.log()[None],
        head,
        torch.tensor([0, 1]),
        teacher_lm_head_weight=torch.eye(len(head), dtype=target.dtype),
        temperature=temperature,
        **PLAIN,
    )
    return torch.autograd.grad(output.loss, head)[0].flatten()


def covariance(samples: Tensor, weights: Tensor) -> Tensor:
    """(D, D) of weighted samples (N, D), the weights adding up to 1."""
    centred = samples - weights @ samples
    return torch.einsum("n,nd,ne->de", weights, centred, centred)


def mean_and_mixture(contexts: Contexts, **changes) -> tuple[Tensor, Tensor]:
    """(X, H) the posterior means of the gradients, and the gradients of the mixtures."""
    num_contexts, num_blocks, vocab_size = contexts.targets.shape
    each = hidden_gradients(
        contexts.hidden_states.repeat_interleave(num_blocks, dim=0),
        contexts.head,
        contexts.targets.reshape(-1, vocab_size),
        **changes,
    ).view(num_contexts, num_blocks, -1)
    mean = torch.einsum("xm,xmh->xh", contexts.posteriors, each)
    mixture = hidden_gradients(contexts.hidden_states, contexts.head, contexts.mixtures, **changes)
    return mean, mixture


@given(SEEDS, st.integers(1, 4), st.integers(1, 5), TEMPERATURES)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_proposition_d8_mean_gradient_is_that_of_the_mixture(
    draw: Draw, seed: int, num_contexts: int, num_blocks: int, temperature: float
) -> None:
    contexts = draw_contexts(draw, seed, num_contexts, num_blocks)
    mean, mixture = mean_and_mixture(contexts, temperature=temperature)
    torch.testing.assert_close(mean, mixture, rtol=1e-10, atol=1e-12)
    # Neither is 0, and both are what the forward KL asks for: (p_S - q) W / T.
    p = torch.softmax(contexts.hidden_states @ contexts.head.T / temperature, dim=-1)
    expected = (p - contexts.mixtures) @ contexts.head / temperature
    torch.testing.assert_close(mixture, expected, rtol=1e-10, atol=1e-12)


@given(SEEDS, st.integers(2, 4), st.integers(2, 4), TEMPERATURES)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_proposition_d8_masked_targets_take_the_blocks_share_out_of_the_covariance(
    draw: Draw, seed: int, num_contexts: int, num_blocks: int, temperature: float
) -> None:
    contexts = draw_contexts(draw, seed, num_contexts, num_blocks)
    head = contexts.head
    revealed = torch.stack(
        [
            head_gradient(hidden_state, head, target, temperature)
            for hidden_state, targets in zip(contexts.hidden_states, contexts.targets, strict=True)
            for target in targets
        ]
    ).view(num_contexts, num_blocks, -1)
    hidden = torch.stack(
        [
            head_gradient(hidden_state, head, mixture, temperature)
            for hidden_state, mixture in zip(contexts.hidden_states, contexts.mixtures, strict=True)
        ]
    )
    joint = (contexts.chances[:, None] * contexts.posteriors).flatten()
    of_revealed = covariance(revealed.flatten(0, 1), joint)
    of_hidden = covariance(hidden, contexts.chances)
    within = torch.stack(
        [covariance(*pair) for pair in zip(revealed, contexts.posteriors, strict=True)]
    )
    expected = of_hidden + torch.einsum("x,xde->de", contexts.chances, within)
    torch.testing.assert_close(of_revealed, expected, rtol=1e-9, atol=1e-12)

    difference = of_revealed - of_hidden
    scale = of_revealed.diagonal().sum().item()
    assert torch.linalg.eigvalsh(difference).min().item() >= -1e-12 * scale
    # Where the blocks disagree there is noise to be lost, in total.
    spread = (contexts.targets - contexts.mixtures[:, None]).square().sum(dim=-1).flatten()
    assume(joint @ spread > 1e-4)
    assert difference.diagonal().sum().item() > 1e-9 * scale


def two_blocks() -> Contexts:
    """A student that is undecided between two tokens; the likelier block asks for the first."""
    return Contexts(
        torch.zeros(1, 2, dtype=torch.float64),
        torch.eye(2, dtype=torch.float64),
        torch.ones(1, dtype=torch.float64),
        torch.tensor([[0.75, 0.25]], dtype=torch.float64),
        torch.tensor([[[0.9, 0.1], [0.1, 0.9]]], dtype=torch.float64),
    )


def test_proposition_d8_by_hand() -> None:
    """p_S - q: 0.75 (-0.4) + 0.25 (0.4) = -0.2, and 0.5 - 0.7 for the mixture (0.7, 0.3)."""
    expected = torch.tensor([[-0.2, 0.2]], dtype=torch.float64)
    for gradient in mean_and_mixture(two_blocks()):
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0.0)


def test_proposition_d8_ends_where_the_clip_begins() -> None:
    """With tau = 0.06 the favourite of either block is clipped, and so is that of the mixture.

    A row's gradient is then p_S times the unclipped target mass, minus that mass on its entry:
    (0.05, -0.05) and its mirror image, whose mean is (0.025, -0.025); but (0.15, -0.15) for the
    mixture, which has three times the unclipped mass on the token that it favours less.
    """
    mean, mixture = mean_and_mixture(two_blocks(), pointwise_clip=0.06)
    by_hand = torch.tensor([[0.025, -0.025], [0.15, -0.15]], dtype=torch.float64)
    torch.testing.assert_close(torch.cat([mean, mixture]), by_hand, rtol=1e-12, atol=0.0)


@given(SEEDS, st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_proposition_d8_survives_a_clip_that_no_entry_reaches(
    draw: Draw, seed: int, num_contexts: int, num_blocks: int
) -> None:
    contexts = draw_contexts(draw, seed, num_contexts, num_blocks)
    log_p = torch.log_softmax(contexts.hidden_states @ contexts.head.T, dim=-1)[:, None]
    targets = torch.cat([contexts.targets, contexts.mixtures[:, None]], dim=1)
    largest = (targets * (targets.log() - log_p)).max().item()
    mean, mixture = mean_and_mixture(contexts, pointwise_clip=max(largest, 0.0) + 1e-9)
    torch.testing.assert_close(mean, mixture, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "changes",
    [
        {"interpolation_weight": 0.5, "top_fraction": 1.0},
        {"divergence": "reverse_kl"},
        {"divergence": "jsd"},
    ],
    ids=["interpolation", "reverse_kl", "jsd"],
)
def test_proposition_d8_is_about_the_plain_forward_kl(changes: dict[str, str | float]) -> None:
    """Interpolated targets and the other divergences are not linear in q."""
    mean, mixture = mean_and_mixture(two_blocks(), **changes)
    assert (mean - mixture).norm() > 1e-3
