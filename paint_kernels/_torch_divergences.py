"""The divergences in PyTorch: summands of a block of rows, and gradients by the student's logits.

The keys of `DIVERGENCES` are the values of the setting `divergence`. `_triton_divergences` has the
same formulas for the GPU, and `reference.divergence_terms` the specification.

With student p, target q and d = log q - log p, a divergence is the sum of f over the vocabulary,
and g = df / d log p. Where u is 1 on the unclipped entries and 0 elsewhere, the gradient by
x_S = z_S / T is g u - p sum(g u). Everything works in place, in buffers that stay in the cache.
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
"""of log q - log p in the JSD: beyond it one side has no weight, and its exponential is finite"""


@dataclass
class Block:
    """A block of rows, in buffers that a divergence overwrites."""

    exponentials: Float[Tensor, "R V"]
    """exp(x_S - m) for the row's largest entry m, where it is 0; times `scale`, the student's p"""
    scale: Float[Tensor, "R 1"]
    largest: Int[Tensor, "R 1"]
    """column of m"""
    q: Float[Tensor, "R V"]
    d: Float[Tensor, "R V"]
    g: Float[Tensor, "R V"]
    """free, to hold df / d log p until the gradient is computed"""
    spare: Float[Tensor, "R V"]

    def p(self) -> Float[Tensor, "R V"]:
        """The student's probabilities, in place of the exponentials: to be called once."""
        return self.exponentials.scatter_(1, self.largest, 1.0).mul_(self.scale)


class SmallDivergence(NamedTuple):
    """A row's sum of f, free of the rounding errors that outweigh a small divergence."""

    sum: Float[Tensor, "R 1"]
    holds: Bool[Tensor, "R 1"]
    """where no exponential overflows"""


class Terms(NamedTuple):
    f: Float[Tensor, "R V"]
    small: SmallDivergence | None


def small_divergence(
    a: Float[Tensor, "R V"], log_ratio: Float[Tensor, "R V"], spare: Float[Tensor, "R V"]
) -> SmallDivergence:
    """sum of a (x + exp(-x) - 1) = a log(a/b) - a + b for x = log(a/b), whose -a + b adds up to 0.

    An error of x, from the rounding of logits, enters this sum times x, and that of a x whole.
    """
    torch.neg(log_ratio, out=spare).expm1_().add_(log_ratio)
    total = torch.linalg.vecdot(a, spare)[:, None]
    return SmallDivergence(total, log_ratio.amin(dim=-1, keepdim=True) > -LARGEST_LOG_RATIO)


def forward_kl_terms(block: Block, settings: LossSettings) -> Terms:
    """f = q d, g = -q."""
    small = small_divergence(block.q, block.d, block.spare)
    return Terms(block.d.mul_(block.q), small)


def forward_kl_gradient(
    block: Block, f: Tensor, unclipped: Tensor | None, unclipped_mass: Tensor
) -> Tensor:
    """p sum(q u) - q u. `block.q` is q u by now, and sum(q u) is `unclipped_mass`."""
    return torch.sub(block.exponentials.mul_(block.scale * unclipped_mass), block.q, out=block.g)


def reverse_kl_terms(block: Block, settings: LossSettings) -> Terms:
    """f = -p d, g = p (1 - d)."""
    p = block.p()
    small = small_divergence(p, block.d.neg_(), block.spare)
    return Terms(block.d.mul_(p), small)


def reverse_kl_gradient(
    block: Block, f: Tensor, unclipped: Tensor | None, unclipped_mass: Tensor
) -> Tensor:
    """p C + f u - p (1 - u) with C = sum(p (1 - u) - f u).

    That is g u - p sum(g u) without the cancellation of p - p sum(p).
    """
    p = block.exponentials
    if unclipped is not None:
        f.mul_(unclipped)
        f.sub_(unclipped.neg_().add_(1).mul_(p))
    return f.sub_(p.mul_(f.sum(dim=-1, keepdim=True)))


def jsd_terms(block: Block, settings: LossSettings) -> Terms:
    """f = b q log(q / m) + (1-b) p log(p / m) with m = b q + (1-b) p; g = (1-b) p log(p / m)."""
    b, p, d, g = settings.jsd_weight, block.p(), block.d, block.g
    d.clamp_(min=-LARGEST_LOG_RATIO, max=LARGEST_LOG_RATIO)
    torch.expm1(d, out=g).mul_(b).log1p_().neg_()  # log p - log m
    f = d.add_(g).mul_(block.q).mul_(b)
    f.add_(g.mul_(p).mul_(1 - b))
    return Terms(f, None)


def gradient_of_slope(
    block: Block, f: Tensor, unclipped: Tensor | None, unclipped_mass: Tensor
) -> Tensor:
    """g u - p sum(g u), for a divergence that has left g in `block.g` and called `block.p()`."""
    g, p = block.g, block.exponentials
    if unclipped is not None:
        g.mul_(unclipped)
    return g.sub_(p.mul_(g.sum(dim=-1, keepdim=True)))


class Divergence(NamedTuple):
    terms: Callable[[Block, LossSettings], Terms]
    gradient: Callable[[Block, Tensor, Tensor | None, Tensor], Tensor]
    """of the block, f (clipped already), u and sum(q u); u is None where there is no clip"""


DIVERGENCES = {
    "forward_kl": Divergence(forward_kl_terms, forward_kl_gradient),
    "reverse_kl": Divergence(reverse_kl_terms, reverse_kl_gradient),
    "jsd": Divergence(jsd_terms, gradient_of_slope),
}
