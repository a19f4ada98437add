"""The row functions of `_torch_backend` as launches of Triton kernels.

Without a GPU they run in Triton's interpreter, if TRITON_INTERPRET=1 is set before the import.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
from torch import Tensor

from paint_kernels import _triton_kernels as kernels
from paint_kernels._settings import LossSettings
from paint_kernels._types import RowValues, TokenStats

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

MAX_BLOCK = 2048
"""columns of a tile: 8 per thread"""
LOSS_MAX_BLOCK = 1024
"""4 per thread: with more, two tiles of logits and five sums make some variants spill registers
(`python -m bench.kernels_report --all`)"""
GROUPS = 256
"""candidates of a row for clipped entries, each the largest of 8 lanes: two clipped entries share a
group in one row of 256, which is then read once more"""
NUM_WARPS = 8
"""of 32 threads; half as many on AMD, whose warps have 64"""


class RowStats(NamedTuple):
    """A softmax relative to its row's largest logit m: p = exp(x - m) / (1 + rest)."""

    maximum: Float[Tensor, " R"]
    rest: Float[Tensor, " R"]
    entropy: Float[Tensor, " R"]
    largest: Int[Tensor, " R"]
    candidates: Int[Tensor, "R groups"]
    """columns of large entries"""


def check_device(kernel: Any, tensor: Tensor) -> None:
    if not tensor.is_cuda and isinstance(kernel, triton.JITFunction):
        raise ValueError(
            f'backend is "triton" for tensors on {tensor.device}: it needs CUDA tensors, or '
            'TRITON_INTERPRET=1 set before Python starts. Use backend="torch" on a CPU.'
        )


def launch(
    kernel: Any,
    logits: Float[Tensor, "R V"],
    *arguments: Tensor,
    max_block: int,
    **settings: Any,
) -> None:
    """Runs `kernel` with one program per row, on the GPU that holds `logits`."""
    check_device(kernel, logits)
    num_rows, num_columns = logits.shape
    if num_rows == 0:
        return
    num_warps = NUM_WARPS // 2 if torch.version.hip else NUM_WARPS
    block = min(max_block, triton.next_power_of_2(num_columns))
    with torch.cuda.device_of(logits):
        kernel[(num_rows,)](
            *arguments, num_columns=num_columns, **settings, BLOCK=block, num_warps=num_warps
        )


def row_vectors(number: int, logits: Float[Tensor, "R V"]) -> tuple[Tensor, ...]:
    """Returns (R,) float32 vectors, each aligned to 16 bytes, for which the kernels are
    compiled."""
    num_rows = len(logits)
    padded = -(-num_rows // 4) * 4
    table = torch.empty(number, padded, dtype=torch.float32, device=logits.device)
    return table[:, :num_rows].unbind(0)


def shifted_stats(logits: Float[Tensor, "R V"], temperature: float) -> RowStats:
    assert logits.stride(1) == 1
    maximum, rest, entropy = row_vectors(3, logits)
    groups = min(GROUPS, MAX_BLOCK, triton.next_power_of_2(logits.shape[1]))
    largest = torch.empty(len(logits), dtype=torch.int32, device=logits.device)
    candidates = torch.empty(len(logits), groups, dtype=torch.int32, device=logits.device)
    launch(
        kernels.stats_kernel,
        logits,
        *(logits, maximum, rest, entropy, largest, candidates),
        max_block=MAX_BLOCK,
        row_stride=logits.stride(0),
        inverse_temperature=1 / temperature,
        GROUPS=groups,
    )
    return RowStats(maximum, rest, entropy, largest, candidates)


def row_stats(logits: Float[Tensor, "R V"], temperature: float) -> TokenStats:
    stats = shifted_stats(logits, temperature)
    return TokenStats(stats.maximum + torch.log1p(stats.rest), stats.entropy)


def pair_stats(
    student_logits: Float[Tensor, "R V"], teacher_logits: Float[Tensor, "R V"], temperature: float
) -> tuple[RowStats, RowStats]:
    """Returns the statistics of both models, which `row_loss` takes instead of computing them
    again."""
    return shifted_stats(student_logits, temperature), shifted_stats(teacher_logits, temperature)


def row_loss(
    student_logits: Float[Tensor, "R V"],
    teacher_logits: Float[Tensor, "R V"],
    interpolated: Bool[Tensor, " R"] | None,
    settings: LossSettings,
    gradient: Float[Tensor, "R V"] | None,
    *,
    gradient_scale: float = 1.0,
    stats: tuple[RowStats, RowStats] | None = None,
) -> RowValues:
    """Returns the clipped divergence of each row. Fills `gradient` with that of its loss by the raw
    logits.

    `gradient`, which is multiplied by `gradient_scale`, must not share memory with the logits: they
    may be read again after it has been written.
    """
    student, teacher = stats or pair_stats(student_logits, teacher_logits, settings.temperature)
    token_loss, divergence, clipped_mass = row_vectors(3, student_logits)
    written = student_logits if gradient is None else gradient
    assert student_logits.stride(1) == teacher_logits.stride(1) == written.stride(1) == 1
    marks = student.largest if interpolated is None else interpolated.to(torch.int8)
    launch(
        kernels.loss_kernel,
        student_logits,
        *(student_logits, teacher_logits, written, marks),
        *(student.maximum, student.rest, student.largest, teacher.maximum, teacher.rest),
        teacher.candidates,
        *(token_loss, divergence, clipped_mass),
        student_stride=student_logits.stride(0),
        teacher_stride=teacher_logits.stride(0),
        gradient_stride=written.stride(0),
        max_block=LOSS_MAX_BLOCK,
        INTERPOLATE=interpolated is not None,
        interpolation_weight=settings.interpolation_weight,
        DIVERGENCE=settings.divergence,
        jsd_weight=settings.jsd_weight,
        clip=math.inf if settings.pointwise_clip is None else settings.pointwise_clip,
        HAS_CLIP=settings.pointwise_clip is not None,
        WITH_GRADIENT=gradient is not None,
        gradient_scale=gradient_scale,
        inverse_temperature=1 / settings.temperature,
        GROUPS=teacher.candidates.shape[1],
    )
    return RowValues(token_loss, divergence, clipped_mass, student.entropy, teacher.entropy)


def row_logprobs(
    logits: Float[Tensor, "R V"],
    token_ids: Int[Tensor, " R"],
    temperature: float,
    gradient: Float[Tensor, "R V"] | None,
    *,
    gradient_scale: float = 1.0,
) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"]]:
    """Returns the log-probability of each row's token, and the row's entropy.

    Fills `gradient`, which must not share memory with `logits`, with (one_hot - p) / temperature *
    gradient_scale.
    """
    token_ids = token_ids.long()
    stats = shifted_stats(logits, temperature)
    chosen = logits.gather(1, token_ids[:, None])[:, 0].float() * (1 / temperature)
    logprobs = chosen - stats.maximum - torch.log1p(stats.rest)
    if gradient is not None:
        launch(
            kernels.logprobs_gradient_kernel,
            logits,
            *(logits, gradient, token_ids, stats.maximum, stats.rest),
            max_block=MAX_BLOCK,
            row_stride=logits.stride(0),
            gradient_stride=gradient.stride(0),
            gradient_scale=gradient_scale,
            inverse_temperature=1 / temperature,
        )
    return logprobs, stats.entropy
