"""Sums and gradients of one rank's columns in PyTorch, for rows whose logits several ranks hold.

What the rank does not know of a row, `_sharded_rows` has from all ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from paint_kernels._plan import BLOCK_BUFFERS
from paint_kernels._precision import full_precision
from paint_kernels._settings import LossSettings
from paint_kernels._torch_backend import (
    Shifted,
    buffers,
    clip,
    distributions,
    exponentiate,
    row_blocks,
    shift,
)
from paint_kernels._torch_divergences import DIVERGENCES, Block, row_sum
from paint_kernels._types import ShardStats

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@full_precision()
def local_stats(logits: Float[Tensor, "R V"], temperature: float) -> ShardStats:
    """Returns the statistics of the rank's columns."""
    scratch = buffers(3, logits)
    maximum = scratch.new_empty(len(logits))
    entropy = torch.empty_like(maximum)
    rest = maximum.new_empty(len(logits), dtype=torch.float64)
    largest = torch.empty_like(maximum, dtype=torch.int64)
    for rows in row_blocks(logits):
        shifted = shift(logits[rows], temperature, *scratch[:, : rows.stop - rows.start])
        assert shifted.largest is not None
        maximum[rows], rest[rows] = shifted.maximum[:, 0], shifted.rest[:, 0]
        entropy[rows], largest[rows] = shifted.entropy[:, 0], shifted.largest[:, 0]
    return ShardStats(maximum, rest, entropy, largest)


@full_precision()
def local_sums(
    student_logits: Float[Tensor, "R V"],
    target_logits: Float[Tensor, "R V"],
    student: ShardStats,
    target: ShardStats,
    settings: LossSettings,
) -> Float[Tensor, "7 R"]:
    """Returns what the rank's columns add to a row, in float64: to the sums of the clipped f, of f,
    of f without its first-order terms, of entries in which these overflow, of the clipped mass, and
    of the slopes but for that of the student's largest entry; and that slope."""
    scratch = buffers(BLOCK_BUFFERS, student_logits)
    sums = scratch.new_empty(7, len(student_logits), dtype=torch.float64)
    for rows in row_blocks(student_logits):
        block = _block(student_logits, target_logits, student, target, rows, settings, scratch)
        divergence = DIVERGENCES[settings.divergence]
        f = divergence.terms(block, settings)
        total = row_sum(f)
        small_sum, far = total, torch.zeros_like(total)
        if divergence.residual is not None:
            small_sum = total + divergence.residual(block, f, None)
            far = (~small_sum.isfinite()).to(total.dtype)
        clipped = clip(block, f, settings.pointwise_clip)
        unclipped = None if clipped is None else clipped.unclipped
        slopes = divergence.slopes(block, f, unclipped)
        largest = student.largest[rows, None]
        own = _entries(slopes, largest)
        _put(slopes, largest, torch.zeros_like(own))
        clipped_sum, clipped_mass = total, torch.zeros_like(total)
        if clipped is not None:
            clipped_sum, clipped_mass = clipped.sum, clipped.clipped_mass
        parts = clipped_sum, total, small_sum, far, clipped_mass, row_sum(slopes), own
        for value, part in zip(sums, parts, strict=True):
            value[rows] = part[:, 0]
    return sums


def fill_gradient(
    student_logits: Float[Tensor, "R V"],
    target_logits: Float[Tensor, "R V"],
    student: ShardStats,
    target: ShardStats,
    settings: LossSettings,
    slope_sum: Float[Tensor, " R"],
    own: Float[Tensor, " R"],
    gradient: Float[Tensor, "R V"],
    gradient_scale: float,
) -> None:
    """Fills `gradient`, which may be `student_logits`, with that of the losses by the raw logits.

    slope_sum: of all ranks. own: the gradient by z / T of the largest entry, for the rank that has
    it.
    """
    scratch = buffers(BLOCK_BUFFERS, student_logits)
    scale = gradient_scale / settings.temperature
    for rows in row_blocks(student_logits):
        block = _block(student_logits, target_logits, student, target, rows, settings, scratch)
        f = DIVERGENCES[settings.divergence].terms(block, settings)
        clipped = clip(block, f, settings.pointwise_clip)
        unclipped = None if clipped is None else clipped.unclipped
        by_logits = DIVERGENCES[settings.divergence].slopes(block, f, unclipped)
        by_logits.sub_(block.exponentials.mul_(slope_sum[rows, None].to(f.dtype)))
        _put(by_logits, student.largest[rows, None], own[rows, None].to(f.dtype))
        gradient[rows] = by_logits if scale == 1 else by_logits.mul_(scale)


def fill_logprobs_gradient(
    logits: Float[Tensor, "R V"],
    stats: ShardStats,
    token_rows: Int[Tensor, " R"],
    own: Float[Tensor, " R"],
    temperature: float,
    gradient: Float[Tensor, "R V"],
    gradient_scale: float,
) -> None:
    """Fills `gradient`, which may be `logits`, with that of the tokens' log-probabilities by the
    raw logits.

    token_rows: columns of the tokens; -1 where another rank has them. own: 1 - p of the token.
    """
    scratch = buffers(2, logits)
    scale = gradient_scale / temperature
    for rows in row_blocks(logits):
        x, p = scratch[:, : rows.stop - rows.start]
        exponentiate(logits[rows], stats.maximum[rows, None], temperature, x, p, bounds=False)
        p.mul_((-scale / (1 + stats.rest[rows, None])).to(p.dtype))
        _put(p, token_rows[rows, None], (own[rows, None] * scale).to(p.dtype))
        gradient[rows] = p.to(gradient.dtype)


def _block(
    student_logits: Tensor,
    target_logits: Tensor,
    student: ShardStats,
    target: ShardStats,
    rows: slice,
    settings: LossSettings,
    scratch: Tensor,
) -> Block:
    x_s, exp_s, x_t, exp_t, spare = scratch[:, : rows.stop - rows.start]
    s = _shifted(student_logits, student, rows, settings.temperature, x_s, exp_s)
    t = _shifted(target_logits, target, rows, settings.temperature, x_t, exp_t)
    return distributions(s, t, spare, settings.temperature)


def _shifted(
    logits: Tensor, stats: ShardStats, rows: slice, temperature: float, x: Tensor, exp: Tensor
) -> Shifted:
    maximum, rest, entropy = (value[rows, None] for value in stats[:3])
    exponentiate(logits[rows], maximum, temperature, x, exp, bounds=True)
    return Shifted(x, exp, None, maximum, rest, entropy)


def _entries(values: Float[Tensor, "R V"], columns: Int[Tensor, "R 1"]) -> Float[Tensor, "R 1"]:
    """Returns the entries in these columns; 0 where a column is -1."""
    return torch.where(columns >= 0, values.gather(1, columns.clamp(min=0)), 0.0)


def _put(
    values: Float[Tensor, "R V"], columns: Int[Tensor, "R 1"], new: Float[Tensor, "R 1"]
) -> None:
    """Writes entries into these columns, and nothing where a column is -1."""
    index = columns.clamp(min=0)
    values.scatter_(1, index, torch.where(columns >= 0, new, values.gather(1, index)))
