"""Selects positions for the interpolated target (Eq. 9, Alg. 1), and tokens for the top-k."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from paint_kernels._checks import (
    check_cu_seqlens,
    check_cu_seqlens_values,
    check_fraction,
    check_positive,
)
from paint_kernels._plan import row_slices

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

TOP_K_ELEMENTS = 2**23
"""ranked at a time: they take little memory beside the logits of a chunk"""
TOP_K_TILE = 64
"""columns of which the largest entry is found before any are ranked"""


def rollout_ids(cu_seqlens: Int[Tensor, " B+1"], num_tokens: int) -> Int[Tensor, " N"]:
    """Returns the rollout of each of N packed tokens; empty rollouts have none."""
    positions = torch.arange(num_tokens, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].long().contiguous(), positions, right=True)


def selected_counts(lengths: Int[Tensor, " B"], top_fraction: float) -> Int[Tensor, " B"]:
    """Returns S = ceil(top_fraction * length) in integers: in floats, 0.07 * 100 rounds up to 8.

    The fraction is the decimal that the user wrote, exact to nine digits.
    """
    fraction = Fraction(str(float(top_fraction))).limit_denominator(10**9)
    numerator, denominator = fraction.numerator, fraction.denominator
    return (lengths.long() * numerator + (denominator - 1)) // denominator


def teacher_top_k_indices(logits: Float[Tensor, "R V"], k: int) -> Int[Tensor, "R k"]:
    """Returns the columns of the k largest entries of each row. Ties go to the lower column, an
    order that torch.topk does not guarantee. NaN counts as the largest.

    The k largest entries lie in the k tiles of columns whose largest entries are the k largest: a
    better entry in another tile would leave k better ones outside. So one pass finds the largest
    entry of every tile, and only k tiles of a row are ranked.
    """
    num_rows, vocab_size = logits.shape
    num_ranked = min(vocab_size, k * TOP_K_TILE)
    indices = torch.empty(num_rows, k, dtype=torch.int64, device=logits.device)
    for rows in row_slices(num_rows, max(1, TOP_K_ELEMENTS // num_ranked)):
        part = logits[rows]
        if num_ranked == vocab_size:
            indices[rows] = ranked_top_k(part, None, k)
            continue
        tiles = ranked_top_k(tile_maxima(part), None, k).sort(dim=-1).values
        columns = tiles[:, :, None] * TOP_K_TILE + torch.arange(TOP_K_TILE, device=logits.device)
        columns = columns.flatten(1)
        inside = columns < vocab_size
        columns.clamp_(max=vocab_size - 1)
        indices[rows] = columns.gather(1, ranked_top_k(part.gather(1, columns), inside, k))
    return indices


def tile_maxima(logits: Float[Tensor, "R V"]) -> Float[Tensor, "R tiles"]:
    num_whole = logits.shape[1] // TOP_K_TILE
    split = num_whole * TOP_K_TILE
    maxima = logits[:, :split].unflatten(1, (num_whole, TOP_K_TILE)).amax(dim=-1)
    if split == logits.shape[1]:
        return maxima
    return torch.cat([maxima, logits[:, split:].amax(dim=-1, keepdim=True)], dim=1)


def ranked_top_k(
    values: Float[Tensor, "R C"], inside: Bool[Tensor, "R C"] | None, k: int
) -> Int[Tensor, "R k"]:
    """Returns the columns of the k largest values among those `inside`, at least k in each row."""
    num_columns = values.shape[1]
    lower_first = torch.arange(num_columns, 0, -1, device=values.device, dtype=torch.int32)
    if inside is not None:
        values = torch.where(inside, values, -math.inf)
    threshold = torch.topk(values, k, dim=-1).values[:, -1:]
    rank = torch.where(values == threshold, lower_first, 0)
    above = (values > threshold) | values.isnan()
    rank = torch.where(above, lower_first + num_columns, rank)
    if inside is not None:
        rank = torch.where(inside, rank, -1)
    return torch.topk(rank, k, dim=-1).indices


def entropy_ratio(
    teacher_entropy: Float[Tensor, " N"],
    student_entropy: Float[Tensor, " N"],
    *,
    entropy_floor: float = 1e-6,
) -> Float[Tensor, " N"]:
    """Returns R = H_T / max(H_S, entropy_floor) (Eq. 9).

    R only ranks positions. The floor keeps it finite where the student is certain.

    Args:
        teacher_entropy, student_entropy: (N,), in nats.
        entropy_floor: in nats, above 0.

    Returns:
        (N,), in the dtype of the entropies.

    Raises:
        ValueError: if `entropy_floor` is not above 0.
    """
    check_positive("entropy_floor", entropy_floor)
    return teacher_entropy / student_entropy.clamp(min=entropy_floor)


def select_top_fraction(
    entropy_ratio: Float[Tensor, " N"], cu_seqlens: Int[Tensor, " B+1"], top_fraction: float
) -> Bool[Tensor, " N"]:
    """Marks the ceil(top_fraction * length) positions of each rollout with the largest ratio.

    Args:
        entropy_ratio: (N,), of packed rollouts.
        cu_seqlens: (B+1,) int32 or int64, the bounds of the rollouts, from 0 to N.
        top_fraction: in [0, 1].

    Returns:
        (N,) bool. Positions are ranked within their rollout (Alg. 1 line 13); ties go to the lower
        position.

    Raises:
        ValueError: for bounds that do not cover N tokens, or a fraction outside [0, 1].
    """
    check_fraction("top_fraction", top_fraction)
    num_tokens = entropy_ratio.shape[0]
    check_cu_seqlens(cu_seqlens, entropy_ratio.device)
    check_cu_seqlens_values(cu_seqlens, num_tokens)
    ids = rollout_ids(cu_seqlens, num_tokens)
    # Two stable sorts, by ratio and then by rollout, order each rollout by falling ratio.
    by_ratio = torch.sort(entropy_ratio, descending=True, stable=True).indices
    order = by_ratio[torch.sort(ids[by_ratio], stable=True).indices]
    rank = torch.arange(num_tokens, device=ids.device) - cu_seqlens.long()[ids]
    counts = selected_counts(cu_seqlens.diff(), top_fraction)
    selected = torch.zeros(num_tokens, dtype=torch.bool, device=ids.device)
    # `ids` is sorted already, so place p of `order` is a token of rollout ids[p].
    selected[order] = rank < counts[ids]
    return selected
