"""Launches the Triton row kernels: the same row computations as `_torch_backend`, on a GPU.

Without a GPU they run in Triton's interpreter, for which TRITON_INTERPRET=1 is set before the
import.
"""

from typing import Any, NamedTuple

import torch
import triton
from jaxtyping import Bool, Float, Int
from torch import Tensor

from paint_kernels import _triton_kernels as kernels
from paint_kernels._types import RowValues, TokenStats

MAX_BLOCK = 4096
"""columns of a tile: 16 a thread, so that two tiles of logits and four sums fit the registers"""
NUM_WARPS = 8


class RowStats(NamedTuple):
    """A softmax relative to its row's largest logit m: p = exp(x - m) / (1 + rest)."""

    maximum: Float[Tensor, " R"]
    rest: Float[Tensor, " R"]
    entropy: Float[Tensor, " R"]
    largest: Int[Tensor, " R"]


def launch(kernel: Any, logits: Float[Tensor, "R V"], *arguments: Tensor, **constants: Any) -> None:
    """Runs `kernel` with one program a row, on the GPU that holds `logits`."""
    if not logits.is_cuda and isinstance(kernel, triton.JITFunction):
        raise ValueError(
            f'backend is "triton" for tensors on {logits.device}: it needs CUDA tensors, or '
            'TRITON_INTERPRET=1 set before Python starts. Use backend="torch" on a CPU.'
        )
    assert logits.stride(1) == 1
    num_rows, num_columns = logits.shape
    block = min(MAX_BLOCK, triton.next_power_of_2(num_columns))
    with torch.cuda.device_of(logits):
        kernel[(num_rows,)](
            *arguments,
            logits.stride(0),
            num_columns,
            **constants,
            BLOCK=block,
            num_warps=NUM_WARPS,
        )


def shifted_stats(logits: Float[Tensor, "R V"], temperature: float) -> RowStats:
    maximum, rest, entropy = torch.empty(
        3, len(logits), dtype=torch.float32, device=logits.device
    ).unbind(0)
    largest = torch.empty(len(logits), dtype=torch.int32, device=logits.device)
    launch(
        kernels.stats_kernel,
        logits,
        *(logits, maximum, rest, entropy, largest),
        INVERSE_TEMPERATURE=1 / temperature,
    )
    return RowStats(maximum, rest, entropy, largest)


def row_stats(logits: Float[Tensor, "R V"], temperature: float) -> TokenStats:
    stats = shifted_stats(logits, temperature)
    return TokenStats(stats.maximum + torch.log1p(stats.rest), stats.entropy)


def row_loss(
    student_logits: Float[Tensor, "R V"],
    teacher_logits: Float[Tensor, "R V"],
    interpolated: Bool[Tensor, " R"] | None,
    *,
    interpolation_weight: float,
    temperature: float,
    pointwise_clip: float | None,
    with_gradient: bool,
) -> RowValues:
    """Clipped forward KL of each row. `student_logits` becomes its gradient where one is wanted.

    Both buffers, of one shape and stride, are overwritten.
    """
    assert student_logits.stride() == teacher_logits.stride()
    student = shifted_stats(student_logits, temperature)
    teacher = shifted_stats(teacher_logits, temperature)
    teacher_entropy = teacher.entropy
    if interpolated is not None:
        launch(
            kernels.interpolate_kernel,
            student_logits,
            *(student_logits, teacher_logits, interpolated.to(torch.int8)),
            WEIGHT=interpolation_weight,
        )
        teacher = shifted_stats(teacher_logits, temperature)
    token_loss, token_kl, unclipped_mass, clipped_mass = torch.empty(
        4, len(student_logits), dtype=torch.float32, device=student_logits.device
    ).unbind(0)
    constants = {
        "CLIP": 0.0 if pointwise_clip is None else pointwise_clip,
        "HAS_CLIP": pointwise_clip is not None,
        "INVERSE_TEMPERATURE": 1 / temperature,
    }
    rows = (student.maximum, student.rest, teacher.maximum, teacher.rest)
    launch(
        kernels.loss_kernel,
        student_logits,
        *(student_logits, teacher_logits, *rows),
        *(token_loss, token_kl, unclipped_mass, clipped_mass),
        **constants,
    )
    if with_gradient:
        launch(
            kernels.gradient_kernel,
            student_logits,
            *(student_logits, teacher_logits, *rows, student.largest, unclipped_mass),
            **constants,
        )
    return RowValues(token_loss, token_kl, student.entropy, teacher_entropy, clipped_mass)


def row_logprobs(
    logits: Float[Tensor, "R V"],
    token_ids: Int[Tensor, " R"],
    *,
    temperature: float,
    with_gradient: bool,
) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"]]:
    """Log-probability of each row's token, and the row's entropy.

    `logits` is overwritten, with the gradient (one_hot - p) / temperature where one is wanted.
    """
    token_ids = token_ids.long()
    stats = shifted_stats(logits, temperature)
    chosen = logits.gather(1, token_ids[:, None])[:, 0] / temperature
    logprobs = chosen - stats.maximum - torch.log1p(stats.rest)
    if with_gradient:
        launch(
            kernels.logprobs_gradient_kernel,
            logits,
            *(logits, token_ids, stats.maximum, stats.rest),
            INVERSE_TEMPERATURE=1 / temperature,
        )
    return logprobs, stats.entropy
