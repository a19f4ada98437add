"""Selects positions for the interpolated target (Eq. 9, Alg. 1), and tokens for the top-k."""

from __future__ import annotations

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

TOP_K_ROWS = 128
"""rows ranked at a time: their int32 ranks take little memory beside the logits of a chunk"""


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
    order that torch.topk does not guarantee."""
    vocab_size = logits.shape[1]
    lower_first = torch.arange(vocab_size, 0, -1, device=logits.device, dtype=torch.int32)
    indices = torch.empty(len(logits), k, dtype=torch.int64, device=logits.device)
    for rows in row_slices(len(logits), TOP_K_ROWS):
        part = logits[rows]
        threshold = torch.topk(part, k, dim=-1).values[:, -1:]
        rank = torch.where(part == threshold, lower_first, 0)
        rank = torch.where(part > threshold, lower_first + vocab_size, rank)
        indices[rows] = torch.topk(rank, k, dim=-1).indices
    return indices


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
