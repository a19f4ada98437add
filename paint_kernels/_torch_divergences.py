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

TILE = 256
"""columns whose sums and largest entries are kept, on a CPU"""
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
    """takes f"""

    def p(self) -> Float[Tensor, "R V"]:
        """Turns the exponentials into the student's probabilities, in place. Call it once."""
        if self.largest is not None:
            self.exponentials.scatter_(1, self.largest, 1.0)
        return self.exponentials.mul_(self.scale)


class Tiles(NamedTuple):
    """What is known of the whole tiles of a block's rows. A last part of a tile is not in it."""

    heavy: Bool[Tensor, "R tiles"]
    """with an entry whose rounding matters to the row's divergence, or its largest entry"""
    light: Float[Tensor, "R 1"]
    """float64: sum of p - q over the other tiles"""


def whole_tiles(x: Float[Tensor, "R V"]) -> tuple[Float[Tensor, "R tiles TILE"], Tensor]:
    """Returns the whole tiles, and the columns after them."""
    whole = x.shape[1] - x.shape[1] % TILE
    return x[:, :whole].unflatten(1, (-1, TILE)), x[:, whole:]


def row_sum(x: Float[Tensor, "R V"]) -> Float[Tensor, "R 1"]:
    """Returns row sums, in float64 of float32 sums over tiles."""
    tiles, last = whole_tiles(x)
    total = last.sum(dim=-1, keepdim=True, dtype=torch.float64)
    return total + tiles.sum(dim=-1).sum(dim=-1, keepdim=True, dtype=torch.float64)


def residual(
    a: Float[Tensor, "R V"],
    log_ratio: Float[Tensor, "R V"],
    f: Float[Tensor, "R V"],
    scratch: Float[Tensor, "R V"],
    tiles: Tiles | None,
) -> Float[Tensor, "R 1"]:
    """Returns the float64 sum of b - a = a (exp(-x) - 1), x = log(a/b), as it follows from x.

    It is 0 but for the error of the normalisers, which the sum of f = a x has too, with the other
    sign. That error outweighs a small divergence, and in a x + b - a every error of x is multiplied
    by x. It comes from the rounding of the few large exponentials. Tiles without one are taken from
    their sums, b - a, which saves most calls of the slowest function of the loss. In the others,
    a x + b - a is summed entry by entry, because f and b - a nearly cancel, and f subtracted.

    tiles: None if every tile is heavy.
    """
    if tiles is None:
        torch.neg(log_ratio, out=scratch).expm1_().add_(log_ratio).mul_(a)
        return row_sum(scratch) - row_sum(f)
    (a_tiles, a_last), (x_tiles, x_last) = whole_tiles(a), whole_tiles(log_ratio)
    f_tiles, f_last = whole_tiles(f)
    row, tile = tiles.heavy.nonzero(as_tuple=True)
    last = _second_order(a_last, x_last) - f_last.sum(dim=-1, dtype=torch.float64)
    # As in `row_sum`, so that the rounding of a tile's sum cancels.
    picked = _second_order(a_tiles[row, tile], x_tiles[row, tile]) - f_tiles[row, tile].sum(dim=-1)
    return tiles.light + last.index_add_(0, row, picked)[:, None]


def _second_order(a: Tensor, x: Tensor) -> Float[Tensor, " R"]:
    """Returns the float64 row sums of a (x + exp(-x) - 1)."""
    return x.neg().expm1_().add_(x).mul_(a).sum(dim=-1, dtype=torch.float64)


def forward_kl_terms(block: Block, settings: LossSettings) -> Tensor:
    """Returns f = q d, whose slope g is -q."""
    return torch.mul(block.q, block.d, out=block.spare)


def forward_kl_residual(block: Block, f: Tensor, tiles: Tiles | None) -> Tensor:
    return residual(block.q, block.d, f, block.g, tiles)


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


def reverse_kl_terms(block: Block, settings: LossSettings) -> Tensor:
    """Returns f = -p d, whose slope g is p (1 - d). Changes the sign of d."""
    return torch.mul(block.p(), block.d.neg_(), out=block.spare)


def reverse_kl_residual(block: Block, f: Tensor, tiles: Tiles | None) -> Tensor:
    other_way = None if tiles is None else tiles._replace(light=-tiles.light)
    return residual(block.exponentials, block.d, f, block.g, other_way)


def reverse_kl_slopes(block: Block, f: Tensor, unclipped: Tensor | None) -> Tensor:
    """Returns g u - p = f u - p (1 - u), without the cancellation in p - p sum(p)."""
    if unclipped is not None:
        f.mul_(unclipped)
        f.sub_(unclipped.neg_().add_(1).mul_(block.exponentials))
    return f


def jsd_terms(block: Block, settings: LossSettings) -> Tensor:
    """Returns f = b q log(q / m) + (1-b) p log(p / m) with m = b q + (1-b) p. Fills g = (1-b) p
    log(p / m)."""
    b, p, d, g = settings.jsd_weight, block.p(), block.d, block.g
    d.clamp_(min=-LARGEST_LOG_RATIO, max=LARGEST_LOG_RATIO)
    torch.expm1(d, out=g).mul_(b).log1p_().neg_()  # log p - log m
    f = torch.add(d, g, out=block.spare).mul_(block.q).mul_(b)
    return f.add_(g.mul_(p).mul_(1 - b))


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
    terms: Callable[[Block, LossSettings], Tensor]
    """returns f"""
    residual: Callable[[Block, Tensor, Tiles | None], Tensor] | None
    """takes the block, f and its tiles; returns what to add to the sum of f where that is small,
    float64. Called next, if at all."""
    slopes: Callable[[Block, Tensor, Tensor | None], Tensor]
    """takes the block, f (clipped by now) and u (None where nothing is clipped); returns h, with
    which the gradient is h - p sum(h), and leaves p in `block.exponentials`. h is g u, or g u - c p
    for some number c."""
    gradient: Callable[[Block, Tensor, Tensor | None, Tensor | float], Tensor]
    """takes these and sum(q u)"""


DIVERGENCES = {
    "forward_kl": Divergence(
        terms=forward_kl_terms,
        residual=forward_kl_residual,
        slopes=forward_kl_slopes,
        gradient=forward_kl_gradient,
    ),
    "reverse_kl": Divergence(
        terms=reverse_kl_terms,
        residual=reverse_kl_residual,
        slopes=reverse_kl_slopes,
        gradient=gradient_of_slopes(reverse_kl_slopes),
    ),
    "jsd": Divergence(
        terms=jsd_terms,
        residual=None,
        slopes=jsd_slopes,
        gradient=gradient_of_slopes(jsd_slopes),
    ),
}
