"""The functions of `_torch_shards` as launches of Triton kernels."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from paint_kernels import _triton_shard_kernels as kernels
from paint_kernels._settings import LossSettings
from paint_kernels._triton_backend import launch_rows, row_vectors, stats_of_roles
from paint_kernels._types import ShardStats

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def local_stats(logits: Float[Tensor, "R V"], temperature: float) -> ShardStats:
    """Returns the statistics of the rank's columns."""
    (stats,) = stats_of_roles(logits, temperature)
    empty = kernels.EMPTY.value
    maximum = stats.maximum.masked_fill(stats.maximum == empty, -math.inf)
    return ShardStats(maximum, stats.rest.double(), stats.entropy, stats.largest.long())


def local_sums(
    student_logits: Float[Tensor, "R V"],
    target_logits: Float[Tensor, "R V"],
    student: ShardStats,
    target: ShardStats,
    settings: LossSettings,
) -> Float[Tensor, "7 R"]:
    """Returns what `_torch_shards.local_sums` does. The kernel sums f without its first-order terms
    in any case."""
    num_rows = len(student_logits)
    sums = row_vectors(5, student_logits)
    launch_rows(
        kernels.shard_sums_kernel,
        student_logits,
        *(student_logits, target_logits, *_statistics(student, target), sums),
        student_stride=student_logits.stride(0),
        target_stride=target_logits.stride(0),
        row_capacity=sums.shape[1],
        **_options(settings),
    )
    loss, divergence, *others = sums[:, :num_rows].double()
    return torch.stack([loss, divergence, divergence, torch.zeros_like(divergence), *others])


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
    """Fills `gradient` as `_torch_shards.fill_gradient` does. It must not share memory with the
    logits."""
    assert student_logits.stride(1) == target_logits.stride(1) == gradient.stride(1) == 1
    launch_rows(
        kernels.shard_gradient_kernel,
        student_logits,
        *(student_logits, target_logits, gradient, *_statistics(student, target)),
        *(slope_sum.float(), own.float()),
        student_stride=student_logits.stride(0),
        target_stride=target_logits.stride(0),
        gradient_stride=gradient.stride(0),
        gradient_scale=gradient_scale,
        **_options(settings),
    )


def fill_logprobs_gradient(
    logits: Float[Tensor, "R V"],
    stats: ShardStats,
    token_rows: Int[Tensor, " R"],
    own: Float[Tensor, " R"],
    temperature: float,
    gradient: Float[Tensor, "R V"],
    gradient_scale: float,
) -> None:
    """Fills `gradient` as `_torch_shards.fill_logprobs_gradient` does. It must not share memory
    with the logits."""
    launch_rows(
        kernels.shard_logprobs_gradient_kernel,
        logits,
        *(logits, gradient, token_rows, _maximum(stats), stats.rest.float(), own.float()),
        row_stride=logits.stride(0),
        gradient_stride=gradient.stride(0),
        gradient_scale=gradient_scale,
        inverse_temperature=1 / temperature,
    )


def _maximum(stats: ShardStats) -> Float[Tensor, " R"]:
    """Returns m as the kernels have it: finite where there is no finite logit."""
    return stats.maximum.masked_fill(stats.maximum == -math.inf, kernels.EMPTY.value)


def _statistics(student: ShardStats, target: ShardStats) -> tuple[Tensor, ...]:
    largest = student.largest.to(torch.int32)
    of_student = _maximum(student), student.rest.float(), largest
    return *of_student, _maximum(target), target.rest.float()


def _options(settings: LossSettings) -> dict[str, Any]:
    return {
        "jsd_weight": settings.jsd_weight,
        "clip": math.inf if settings.pointwise_clip is None else settings.pointwise_clip,
        "inverse_temperature": 1 / settings.temperature,
        "DIVERGENCE": settings.divergence,
        "HAS_CLIP": settings.pointwise_clip is not None,
    }
