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

NUM_WARPS, BLOCK_NUM_WARPS = 4, 8
"""of 32 threads, for kernels with a program per row and for those with one per block of a row; half
as many on AMD, whose warps have 64"""
LANES = 32 * NUM_WARPS * 4
"""columns of float32 that the threads read with one load each, of 16 bytes; twice as many in half
precision, if rows are aligned. Each is a lane of the kernels, with sums of its own."""
GROUPS = 256
"""candidates of a row for clipped entries, each the largest of 2 lanes: two clipped entries share a
group in one row of 256, which is then read once more"""
VECTOR_ALIGNMENT = 16
"""rows to which vectors of rows are padded, so that the kernels are compiled for one alignment"""


class RowStats(NamedTuple):
    """A softmax relative to its row's largest logit m: p = exp((z - m) / T) / (1 + rest)."""

    maximum: Float[Tensor, " R"]
    rest: Float[Tensor, " R"]
    entropy: Float[Tensor, " R"]
    largest: Int[Tensor, " R"]
    candidates: Int[Tensor, "R groups"] | None
    """columns of large entries, of the teacher or of a model on its own"""


def check_device(kernel: Any, tensor: Tensor) -> None:
    if not tensor.is_cuda and isinstance(kernel, triton.JITFunction):
        raise ValueError(
            f'backend is "triton" for tensors on {tensor.device}: it needs CUDA tensors, or '
            'TRITON_INTERPRET=1 set before Python starts. Use backend="torch" on a CPU.'
        )


def launch_grid(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Tensor,
    num_warps: int = BLOCK_NUM_WARPS,
    **settings: Any,
) -> None:
    """Runs `kernel` with one program per point of the grid, on the GPU that holds the arguments."""
    check_device(kernel, arguments[0])
    if 0 in grid:
        return
    num_warps = num_warps // 2 if torch.version.hip else num_warps
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **settings, num_warps=num_warps)


def launch_rows(
    kernel: Any,
    logits: Float[Tensor, "R V"],
    *arguments: Tensor,
    roles: int = 1,
    **settings: Any,
) -> None:
    """Runs `kernel` with one program per row of `logits` and role."""
    num_rows, num_columns = logits.shape
    launch_grid(
        kernel,
        (num_rows, roles),
        *arguments,
        num_warps=NUM_WARPS,
        num_columns=num_columns,
        LANES=num_lanes(logits),
        **settings,
    )


def num_lanes(logits: Float[Tensor, "R V"]) -> int:
    # Triton loads 16 bytes at once from rows whose stride it knows to be a multiple of 16.
    most = LANES * 4 // logits.element_size() if logits.stride(0) % 16 == 0 else LANES
    return min(most, triton.next_power_of_2(logits.shape[1]))


def lane_columns(logits: Float[Tensor, "R V"]) -> int:
    """Returns the number of columns of a lane, rounded up to a power of two."""
    return triton.next_power_of_2(triton.cdiv(logits.shape[1], num_lanes(logits)))


def row_vectors(
    number: int, logits: Float[Tensor, "R V"], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Returns `number` vectors for a value of each row, and of the rows that pad them."""
    padded = -(-len(logits) // VECTOR_ALIGNMENT) * VECTOR_ALIGNMENT
    return torch.empty(number, padded, dtype=dtype, device=logits.device)


def stats_of_roles(
    logits: Float[Tensor, "R V"], temperature: float, *, roles: int = 1, role_offset: int = 0
) -> list[RowStats]:
    """Returns the statistics of as many rows for each role. Those of the second role begin
    `role_offset` elements behind `logits`, with the same strides."""
    assert logits.stride(1) == 1
    num_rows, groups = len(logits), min(GROUPS, num_lanes(logits))
    maximum, rest, entropy = row_vectors(3 * roles, logits).unflatten(0, (3, roles))
    largest = row_vectors(roles, logits, torch.int32)
    candidates = largest.new_empty(num_rows, groups)
    launch_rows(
        kernels.stats_kernel,
        logits,
        *(logits, maximum, rest, entropy, largest, candidates),
        roles=roles,
        row_stride=logits.stride(0),
        role_offset=role_offset,
        row_capacity=largest.shape[1],
        inverse_temperature=1 / temperature,
        GROUPS=groups,
        LANE_COLUMNS=lane_columns(logits),
    )
    found = [
        RowStats(*values, candidates=None)
        for values in zip(
            maximum[:, :num_rows],
            rest[:, :num_rows],
            entropy[:, :num_rows],
            largest[:, :num_rows],
            strict=True,
        )
    ]
    return [*found[:-1], found[-1]._replace(candidates=candidates)]


def row_stats(logits: Float[Tensor, "R V"], temperature: float) -> TokenStats:
    (stats,) = stats_of_roles(logits, temperature)
    maximum = stats.maximum.masked_fill(stats.maximum == kernels.EMPTY.value, -math.inf)
    logsumexp = maximum * (1 / temperature) + torch.log1p(stats.rest)
    return TokenStats(logsumexp, stats.entropy)


def pair_stats(
    student_logits: Float[Tensor, "R V"], teacher_logits: Float[Tensor, "R V"], temperature: float
) -> tuple[RowStats, RowStats]:
    """Returns the statistics of both models, which `row_loss` takes instead of computing them
    again. Logits in one buffer take one launch."""
    if share_buffer(student_logits, teacher_logits):
        offset = int(teacher_logits.storage_offset()) - int(student_logits.storage_offset())
        student, teacher = stats_of_roles(student_logits, temperature, roles=2, role_offset=offset)
        return student, teacher
    (student,) = stats_of_roles(student_logits, temperature)
    (teacher,) = stats_of_roles(teacher_logits, temperature)
    return student, teacher


def share_buffer(student_logits: Tensor, teacher_logits: Tensor) -> bool:
    storages = student_logits.untyped_storage(), teacher_logits.untyped_storage()
    same_layout = student_logits.stride() == teacher_logits.stride()
    same_dtype = student_logits.dtype == teacher_logits.dtype
    return storages[0].data_ptr() == storages[1].data_ptr() and same_layout and same_dtype


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
    num_rows = len(student_logits)
    token_loss, divergence, clipped_mass = row_vectors(3, student_logits)[:, :num_rows]
    written = student_logits if gradient is None else gradient
    assert teacher.candidates is not None
    assert student_logits.stride(1) == teacher_logits.stride(1) == written.stride(1) == 1
    marks = student.largest if interpolated is None else interpolated.to(torch.int8)
    launch_rows(
        kernels.loss_kernel,
        student_logits,
        *(student_logits, teacher_logits, written, marks),
        *(student.maximum, student.rest, student.largest),
        *(teacher.maximum, teacher.rest, teacher.largest, teacher.candidates),
        *(token_loss, divergence, clipped_mass),
        student_stride=student_logits.stride(0),
        teacher_stride=teacher_logits.stride(0),
        gradient_stride=written.stride(0),
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
        LANE_COLUMNS=lane_columns(student_logits),
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
    (stats,) = stats_of_roles(logits, temperature)
    chosen = logits.gather(1, token_ids[:, None])[:, 0].float()
    logprobs = (chosen - stats.maximum) * (1 / temperature) - torch.log1p(stats.rest)
    if gradient is not None:
        launch_rows(
            kernels.logprobs_gradient_kernel,
            logits,
            *(logits, gradient, token_ids, stats.maximum, stats.largest, stats.rest),
            row_stride=logits.stride(0),
            gradient_stride=gradient.stride(0),
            gradient_scale=gradient_scale,
            inverse_temperature=1 / temperature,
        )
    return logprobs, stats.entropy
