"""What the public functions and the row kernels return."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class PaintLossOutput(NamedTuple):
    """The loss, and values of every token to log. Everything but `loss` is detached.

    `loss` is a scalar, or (N,) with reduction "none". The (N,) values are float32, or float64 for
    float64 inputs; losses, divergences and entropies are in nats.
    """

    loss: Float[Tensor, ...]
    token_loss: Float[Tensor, " N"]
    """sum over v of min(f(v), pointwise_clip) (Eq. 3); by design it can be negative"""
    token_kl: Float[Tensor, " N"]
    """sum over v of f(v): the divergence without the clip"""
    student_entropy: Float[Tensor, " N"]
    teacher_entropy: Float[Tensor, " N"]
    """of the teacher itself, before any interpolation"""
    entropy_ratio: Float[Tensor, " N"]
    """H_T / max(H_S, entropy_floor) (Eq. 9)"""
    clipped_mass: Float[Tensor, " N"]
    """the target's probability of the clipped entries; exactly 0 where none is clipped"""
    selected: Bool[Tensor, " N"]
    """True at the positions that get the interpolated target"""


class TokenStats(NamedTuple):
    """Detached float32 statistics of softmax(logits / temperature), entropy in nats."""

    logsumexp: Float[Tensor, " N"]
    entropy: Float[Tensor, " N"]


class TokenLogprobs(NamedTuple):
    """Differentiable log-probabilities of the given tokens, and the detached entropy, in nats."""

    logprobs: Float[Tensor, " N"]
    entropy: Float[Tensor, " N"]


class ShardStats(NamedTuple):
    """The softmax of R rows relative to their largest logits m: p = exp((z - m) / T) / (1 + rest).

    Of the columns of one rank, or of all ranks together.
    """

    maximum: Float[Tensor, " R"]
    """m, not divided by T; -inf where there is no finite logit"""
    rest: Float[Tensor, " R"]
    """float64: the sum of exp((z - m) / T) over all entries but the largest"""
    entropy: Float[Tensor, " R"]
    largest: Int[Tensor, " R"]
    """column of m among the rank's; -1 where another rank has it"""


class RowValues(NamedTuple):
    """What a row kernel returns for R rows of logits."""

    token_loss: Float[Tensor, " R"]
    token_kl: Float[Tensor, " R"]
    clipped_mass: Float[Tensor, " R"]
    student_entropy: Float[Tensor, " R"]
    target_entropy: Float[Tensor, " R"]
    """of the teacher; unspecified where rows are interpolated"""
