"""The row functions of rows whose columns lie on several ranks.

They have the names and arguments of those in `_torch_backend`. Each backend computes what its
rank's columns add (`_torch_shards`, `_triton_shards`), and small (R, few) tensors are reduced
between:

1. Statistics are gathered. Largest logit, normaliser and entropy of a row follow from those of its
   parts.
2. The sums of a row over the vocabulary are added up: divergence, clipped mass, and the sum in the
   gradient g u - p sum(g u) (see `_torch_divergences`).

The gradient needs both, and so the logits are read three times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from paint_kernels._settings import LossSettings
from paint_kernels._shards import Shard
from paint_kernels._torch_backend import (
    NEGATIVE_INFINITY,
    corrected_divergence,
    interpolate,
    lowest,
    small_correction,
)
from paint_kernels._types import RowValues, ShardStats, TokenStats

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class ShardedRows:
    functions: ModuleType
    """of one rank's columns"""
    shard: Shard

    def row_stats(self, logits: Float[Tensor, "R V"], temperature: float) -> TokenStats:
        (stats,), _ = self._stats([logits], temperature)
        logsumexp = stats.maximum / temperature + torch.log1p(stats.rest)
        return TokenStats(logsumexp.to(stats.entropy.dtype), stats.entropy)

    def pair_stats(
        self,
        student_logits: Float[Tensor, "R V"],
        teacher_logits: Float[Tensor, "R V"],
        temperature: float,
    ) -> tuple[ShardStats, ShardStats]:
        (student, teacher), _ = self._stats([student_logits, teacher_logits], temperature)
        return student, teacher

    def row_loss(
        self,
        student_logits: Float[Tensor, "R V"],
        teacher_logits: Float[Tensor, "R V"],
        interpolated: Bool[Tensor, " R"] | None,
        settings: LossSettings,
        gradient: Float[Tensor, "R V"] | None,
        *,
        gradient_scale: float = 1.0,
        stats: tuple[ShardStats, ShardStats] | None = None,
    ) -> RowValues:
        target_logits, temperature = teacher_logits, settings.temperature
        if interpolated is not None:
            weight = settings.interpolation_weight
            target_logits = interpolate(teacher_logits, student_logits, interpolated, weight)
        if stats is None:
            student, target = self.pair_stats(student_logits, target_logits, temperature)
        elif interpolated is None:
            student, target = stats
        else:
            student = stats[0]
            (target,), _ = self._stats([target_logits], temperature)
        given = student_logits, target_logits, student, target, settings
        sums = self.shard.sum(self.functions.local_sums(*given))
        clipped, total, small_sum, far, clipped_mass, others, own = sums.unbind()
        correction = small_correction(total, small_sum - total, far == 0)
        token_kl = corrected_divergence(total, correction)
        token_loss = token_kl if settings.pointwise_clip is None else clipped + correction
        if gradient is not None:
            # A row's gradient adds up to 0. That of its largest entry, h - p sum(h), in terms of
            # the other entries has the digits that p - 1 lacks.
            own_gradient = (student.rest * own - others) / (1 + student.rest)
            self.functions.fill_gradient(
                *given, others + own, own_gradient, gradient, gradient_scale
            )
        dtype = student.entropy.dtype
        return RowValues(
            token_loss.to(dtype),
            token_kl.to(dtype),
            clipped_mass.to(dtype),
            student.entropy,
            target.entropy,
        )

    def row_logprobs(
        self,
        logits: Float[Tensor, "R V"],
        token_ids: Int[Tensor, " R"],
        temperature: float,
        gradient: Float[Tensor, "R V"] | None,
        *,
        gradient_scale: float = 1.0,
    ) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"]]:
        rows = self.shard.local_ids(token_ids, logits.shape[1])
        chosen = logits.gather(1, rows.clamp(min=0)[:, None])[:, 0].double()
        (stats,), every = self._stats([logits], temperature, torch.where(rows >= 0, chosen, 0.0))
        x = ((every.sum(dim=0) - stats.maximum) / temperature).clamp(
            min=lowest(temperature) / temperature
        )
        if gradient is not None:
            # 1 - p of the largest entry is the sum of the others.
            is_largest = (rows == stats.largest) & (rows >= 0)
            others = torch.where(is_largest, stats.rest, 1 + stats.rest - x.exp())
            self.functions.fill_logprobs_gradient(
                *(logits, stats, rows, others / (1 + stats.rest), temperature),
                *(gradient, gradient_scale),
            )
        dtype = stats.entropy.dtype
        return (x - torch.log1p(stats.rest)).to(dtype), stats.entropy

    def _stats(
        self,
        parts: list[Float[Tensor, "R V"]],
        temperature: float,
        beside: Float[Tensor, " R"] | None = None,
    ) -> tuple[list[ShardStats], Float[Tensor, "ranks R"]]:
        """Returns the statistics of whole rows, from those of the rank's columns, and `beside` of
        all ranks."""
        local = [self.functions.local_stats(logits, temperature) for logits in parts]
        values = [value.double() for stats in local for value in stats[:3]]
        if beside is not None:
            values.append(beside)
        every = self.shard.gather(torch.stack(values))
        found = [
            merged(stats, every[:, 3 * role : 3 * role + 3], temperature, self.shard)
            for role, stats in enumerate(local)
        ]
        return found, every[:, -1]


def merged(
    local: ShardStats,
    parts: Float[Tensor, "ranks 3 R"],
    temperature: float,
    shard: Shard,
) -> ShardStats:
    """Returns the statistics of rows from those of their parts: maximum, rest and entropy.

    Ties of the largest entry go to the first rank. The entropy of a row is that of which part a
    token lies in, plus the mean of the parts' own.
    """
    maxima, rests, entropies = parts.unbind(1)
    maximum = maxima.amax(dim=0)
    owner = (maxima == maximum).to(torch.uint8).argmax(dim=0)
    finite_maximum = torch.where(maximum == -math.inf, 0.0, maximum)
    below = ((maxima - finite_maximum) / temperature).clamp(min=NEGATIVE_INFINITY)
    factor = below.exp()
    ranks = torch.arange(len(maxima), device=maxima.device)[:, None]
    rest = (factor * (rests + (ranks != owner))).sum(dim=0)
    surprise = torch.log1p(rest) - torch.log1p(rests) - below
    share = factor * (1 + rests) / (1 + rest)
    entropy = torch.where(share > 0, share * (entropies + surprise), 0.0).sum(dim=0)
    entropy = torch.where(rest.isnan(), rest, entropy)
    largest = torch.where(owner == shard.rank, local.largest.long(), -1)
    return ShardStats(
        maximum.to(local.maximum.dtype), rest, entropy.to(local.entropy.dtype), largest
    )
