"""The divergences in PyTorch: summands of a block of rows, and gradients by the student's logits.

The keys of `DIVERGENCES` are the values of the setting `divergence`. `_triton_divergences` has the
same formulas for the GPU, and `reference.divergence_terms` their specification.

For student p, target q and d = log q - log p, a divergence is the sum of its summands f over the
vocabulary. With g = df / d log p, and u = 1 for unclipped entries and 0 for the others, its
gradient by x_S = z_S / T is g u - p sum(g u). Everything is computed in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from paint_kernels._settings import LossSettings

LARGEST_LOG_RATIO = 80.0
"""bound of |log q - log p|, where one side has no weight left and exponentials are still finite"""


@dataclass
class Block:
    """The distributions of a block of rows, in buffers that a divergence overwrites."""

    exponentials: Float[Tensor, "R V"]
    """exp((z_S - m) / T) with the row's largest logit m, but 0 at m if its column is given; times
    `scale` they are p"""
    scale: Float[Tensor, "R 1"]
    largest: Int[Tensor, "R 1"] | None
    """column of m"""
    q: Float[Tensor, "R V"]
    d: Float[Tensor, "R V"]
    g: Float[Tensor, "R V"]
    """free to keep df / d log p until the gradient is computed"""
    spare: Float[Tensor, "R V"]

    def p(self) -> Float[Tensor, "R V"]:
        """Turns the exponentials into the student's probabilities, in place. Call it once."""
        if self.largest is not None:
            self.exponentials.scatter_(1, self.largest, 1.0)
        return self.exponentials.mul_(self.scale)


class SmallDivergence(NamedTuple):
    """The sum of f, without the rounding errors that outweigh a small divergence."""

    sum: Float[Tensor, "R 1"]
    holds: Bool[Tensor, "R 1"]
    """where no exponential overflows"""


class Terms(NamedTuple):
    f: Float[Tensor, "R V"]
    small: SmallDivergence | None


def small_divergence(
    a: Float[Tensor, "R V"], log_ratio: Float[Tensor, "R V"], spare: Float[Tensor, "R V"]
) -> SmallDivergence:
    """Returns the sum of a (x + exp(-x) - 1) = a log(a/b) - a + b, where x = log(a/b) and -a + b
    sums to 0.

    An error of x, from rounded logits, enters this sum multiplied by x, but enters the sum of a x
    undiminished.
    """
    torch.neg(log_ratio, out=spare).expm1_().add_(log_ratio)
    total = torch.linalg.vecdot(a, spare)[:, None]
    return SmallDivergence(total, total.isfinite())


def forward_kl_terms(block: Block, settings: LossSettings) -> Terms:
    """Returns f = q d, whose slope g is -q."""
    small = small_divergence(block.q, block.d, block.spare)
    return Terms(block.d.mul_(block.q), small)


def forward_kl_slopes(block: Block, f: Tensor, unclipped: Tensor | None) -> Tensor:
    """Returns -q u. `block.q` holds q u by now."""
    block.p()
    return block.q.neg_()


def forward_kl_gradient(
    block: Block, f: Tensor, unclipped: Tensor | None, unclipped_mass: Tensor | float
) -> Tensor:
    """Returns p sum(q u) - q u, with one pass less than `gradient_of_slopes`. `unclipped_mass` is
    the sum of q u."""
    return torch.sub(block.exponentials.mul_(block.scale * unclipped_mass), block.q, out=block.g)


def reverse_kl_terms(block: Block, settings: LossSettings) -> Terms:
    """Returns f = -p d, whose slope g is p (1 - d)."""
    p = block.p()
    small = small_divergence(p, block.d.neg_(), block.spare)
    return Terms(block.d.mul_(p), small)


def reverse_kl_slopes(block: Block, f: Tensor, unclipped: Tensor | None) -> Tensor:
    """Returns g u - p = f u - p (1 - u), without the cancellation in p - p sum(p)."""
    if unclipped is not None:
        f.mul_(unclipped)
        f.sub_(unclipped.neg_().add_(1).mul_(block.exponentials))
    return f


def jsd_terms(block: Block, settings: LossSettings) -> Terms:
    """Returns f = b q log(q / m) + (1-b) p log(p / m) with m = b q + (1-b) p. Fills g = (1-b) p
    log(p / m)."""
    b, p, d, g = settings.jsd_weight, block.p(), block.d, block.g
    d.clamp_(min=-LARGEST_LOG_RATIO, max=LARGEST_LOG_RATIO)
    torch.expm1(d, out=g).mul_(b).log1p_().neg_()  # log p - log m
    f = d.add_(g).mul_(block.q).mul_(b)
    f.add_(g.mul_(p).mul_(1 - b))
    return Terms(f, None)


def jsd_slopes(block: Block, f: Tensor, unclipped: Tensor | None) -> Tensor:
    """Returns g u."""
    return block.g if unclipped is None else block.g.mul_(unclipped)


def gradient_of_slopes(slopes: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def gradient(
        block: Block, f: Tensor, unclipped: Tensor | None, unclipped_mass: Tensor | float
    ) -> Tensor:
        h = slopes(block, f, unclipped)
        return h.sub_(block.exponentials.mul_(h.sum(dim=-1, keepdim=True)))

    return gradient


class Divergence(NamedTuple):
    terms: Callable[[Block, LossSettings], Terms]
    slopes: Callable[[Block, Tensor, Tensor | None], Tensor]
    """takes the block, f (clipped by now) and u (None where nothing is clipped); returns h, with
    which the gradient is h - p sum(h), and leaves p in `block.exponentials`. h is g u, or g u - c p
    for some number c."""
    gradient: Callable[[Block, Tensor, Tensor | None, Tensor | float], Tensor]
    """takes these and sum(q u)"""


DIVERGENCES = {
    "forward_kl": Divergence(forward_kl_terms, forward_kl_slopes, forward_kl_gradient),
    "reverse_kl": Divergence(
        reverse_kl_terms, reverse_kl_slopes, gradient_of_slopes(reverse_kl_slopes)
    ),
    "jsd": Divergence(jsd_terms, jsd_slopes, gradient_of_slopes(jsd_slopes)),
}
