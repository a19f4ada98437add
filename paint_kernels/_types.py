"""What the public functions and the row kernels return."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


class PaintLossOutput(NamedTuple):
    """The loss and what to log beside it; all but `loss` are detached.

    `loss` is a scalar, or (N,) with reduction "none". The (N,) values are float32 (float64 for
    float64 inputs), entropies and divergences in nats.
    """

    loss: Float[Tensor, ...]
    token_loss: Float[Tensor, " N"]
    """sum over v of min(f(v), pointwise_clip): negative at times, by design"""
    token_kl: Float[Tensor, " N"]
    """sum over v of f(v), the divergence without the clip"""
    student_entropy: Float[Tensor, " N"]
    teacher_entropy: Float[Tensor, " N"]
    """of the teacher as it is, before any interpolation"""
    entropy_ratio: Float[Tensor, " N"]
    clipped_mass: Float[Tensor, " N"]
    """target probability on the clipped entries; exactly 0 where nothing is clipped"""
    selected: Bool[Tensor, " N"]
    """positions whose target is interpolated"""


class TokenStats(NamedTuple):
    """Detached float32 statistics of softmax(logits / temperature), entropy in nats."""

    logsumexp: Float[Tensor, " N"]
    entropy: Float[Tensor, " N"]


class TokenLogprobs(NamedTuple):
    """Differentiable log-probabilities of the given tokens, and the detached entropy, in nats."""

    logprobs: Float[Tensor, " N"]
    entropy: Float[Tensor, " N"]


class RowValues(NamedTuple):
    """What a row kernel finds for each of R rows of logits."""

    token_loss: Float[Tensor, " R"]
    token_kl: Float[Tensor, " R"]
    clipped_mass: Float[Tensor, " R"]
    student_entropy: Float[Tensor, " R"]
    target_entropy: Float[Tensor, " R"]
    """of the teacher, after the interpolation where there is one"""
