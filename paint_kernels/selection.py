"""Which positions get the interpolated target (Eq. 9 and Alg. 1), and which tokens the top-k."""

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
"""ranked together: their ranks, int32, are small beside a chunk's logits"""


def rollout_ids(cu_seqlens: Int[Tensor, " B+1"], num_tokens: int) -> Int[Tensor, " N"]:
    """The rollout that each of N packed tokens belongs to; empty rollouts own none."""
    positions = torch.arange(num_tokens, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].long().contiguous(), positions, right=True)


def selected_counts(lengths: Int[Tensor, " B"], top_fraction: float) -> Int[Tensor, " B"]:
    """S = ceil(top_fraction * length) in integers, for in floats 0.07 * 100 rounds up to 8.

    The fraction is the decimal that the user wrote, exact to nine digits.
    """
    fraction = Fraction(str(float(top_fraction))).limit_denominator(10**9)
    numerator, denominator = fraction.numerator, fraction.denominator
    return (lengths.long() * numerator + (denominator - 1)) // denominator


def teacher_top_k_indices(logits: Float[Tensor, "R V"], k: int) -> Int[Tensor, "R k"]:
    """The k largest entries of each row, ties to the lower index, which torch.topk leaves open."""
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
    """R = H_T / max(H_S, entropy_floor) (Eq. 9), entropies in nats.

    R only ranks positions; the floor keeps a student that is certain from making it infinite.
    """
    check_positive("entropy_floor", entropy_floor)
    return teacher_entropy / student_entropy.clamp(min=entropy_floor)


def select_top_fraction(
    entropy_ratio: Float[Tensor, " N"], cu_seqlens: Int[Tensor, " B+1"], top_fraction: float
) -> Bool[Tensor, " N"]:
    """True on the ceil(top_fraction * length) positions of each rollout with the largest ratio.

    Ranked within each rollout (Alg. 1 line 13), ties to the lower position. `cu_seqlens` (B+1,) are
    the rollouts' bounds in the N packed tokens. ValueError where these do not cover N tokens, or
    `top_fraction` is outside [0, 1].
    """
    check_fraction("top_fraction", top_fraction)
    num_tokens = entropy_ratio.shape[0]
    check_cu_seqlens(cu_seqlens, entropy_ratio.device)
    check_cu_seqlens_values(cu_seqlens, num_tokens)
    ids = rollout_ids(cu_seqlens, num_tokens)
    # Two stable sorts, by ratio and then by rollout, leave rollouts together, largest ratio first.
    by_ratio = torch.sort(entropy_ratio, descending=True, stable=True).indices
    order = by_ratio[torch.sort(ids[by_ratio], stable=True).indices]
    rank = torch.arange(num_tokens, device=ids.device) - cu_seqlens.long()[ids]
    counts = selected_counts(cu_seqlens.diff(), top_fraction)
    selected = torch.zeros(num_tokens, dtype=torch.bool, device=ids.device)
    # The place p now holds a token of rollout ids[p], because ids was sorted to begin with.
    selected[order] = rank < counts[ids]
    return selected
