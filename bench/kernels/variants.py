"""Variants of the comparison: the fused losses, plain PyTorch and the floor.

A variant computes a loss of the given inputs and its gradient with respect to the student's hidden
states, and to the head if the variant trains it. Variants of one group do equal work.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.losses import (
    JSD_WEIGHT,
    LOGPROBS,
    Gradients,
    Inputs,
    Loss,
    Objective,
    gradients,
    our_loss,
    plain_logprobs_loss,
    plain_loss,
)
from paint_kernels import LossSettings
from paint_kernels._heads import Heads
from paint_kernels._shards import WHOLE

FULL_LOGITS = ("memory below the full logits",)


@dataclass(frozen=True)
class Variant:
    group: str
    name: str
    run: Callable[[Inputs], Gradients]
    objective: Objective
    kind: str
    """floor, ours, plain or peer"""
    lacks: tuple[str, ...] = ()
    unavailable: str = ""
    """why it cannot run on this machine"""
    trains_head: bool = False
    extra_products: int = 0
    """matrix products beyond the floor's, as large as each of these: logits computed again, or the
    gradient of the head"""
    float32_rows: Callable[[Inputs], Tensor] | None = None
    """(N, H) gradient of the hidden states before it is rounded to their dtype"""


def our_loss_bounds_on_device(inputs: Inputs, objective: Objective) -> Tensor:
    """Computes `paint_loss` with `cu_seqlens` on the device.

    The host never reads the bounds, so chunks cut rollouts and selected rows are computed twice.
    """
    on_device = inputs.cu_seqlens.to(inputs.student.device, non_blocking=True)
    return our_loss(inputs._replace(cu_seqlens=on_device), objective)


def our_float32_rows(inputs: Inputs, objective: Objective) -> Tensor:
    """Returns (N, H) float32: the gradient of the mean over tokens that `paint_loss` saves for
    backward."""
    num_tokens = len(inputs.student)
    settings = LossSettings(
        temperature=objective.temperature,
        divergence=objective.divergence,
        jsd_weight=JSD_WEIGHT,
        pointwise_clip=objective.pointwise_clip,
        top_fraction=objective.top_fraction,
        interpolation_weight=objective.interpolation_weight,
        teacher_top_k=None,
        entropy_floor=1e-6,
        backend="triton" if inputs.weight.is_cuda else "torch",
    )
    token_weights = torch.full_like(inputs.student[:, 0], 1 / num_tokens, dtype=torch.float32)
    heads = Heads(inputs.weight)
    _, _, _, rows, *_ = torch.ops.paint_kernels.paint_loss(
        inputs.student.detach(),
        inputs.teacher,
        *heads.arguments(),
        inputs.cu_seqlens,
        token_weights,
        *(None, None, None),
        *(True, False, False),
        *(*settings.arguments(), *WHOLE.arguments()),
    )
    return rows / num_tokens


def upcast_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Computes logits as most code does: they are rounded to half precision before they become
    float32."""
    return (hidden @ weight.T).float()


def chunk_rows(device: torch.device, vocab_size: int) -> int:
    """Returns the rows per chunk of the bare products, independent of the losses' chunks.

    On a GPU enough for full speed; on a CPU 2^24 logits (64 MiB), which is fastest there.
    """
    return 4096 if device.type == "cuda" else max(1, 2**24 // vocab_size)


@functools.lru_cache(maxsize=1)
def gradient_operand(rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device):
    """Returns random values of a gradient's size for the last GEMM; zeros draw less power and run
    faster."""
    return torch.randn(rows, vocab_size, dtype=dtype, device=device).mul_(1e-4)


def bare_gemms(inputs: Inputs, num_projections: int) -> Gradients:
    """Computes the floor: the projections to float32 logits, and the product of a gradient with the
    head."""
    weight, vocab_size = inputs.weight, inputs.weight.shape[0]
    rows = min(chunk_rows(weight.device, vocab_size), len(inputs.student))
    operand = gradient_operand(rows, vocab_size, weight.dtype, weight.device)
    logits = torch.empty(rows, vocab_size, dtype=torch.float32, device=weight.device)
    grad_hidden = torch.empty_like(inputs.student)
    with torch.no_grad():
        for start in range(0, len(grad_hidden), rows):
            part = slice(start, start + rows)
            for hidden in (inputs.student[part], inputs.teacher[part])[:num_projections]:
                bare_projection(hidden, weight, logits[: len(hidden)])
            result = grad_hidden[part]
            torch.mm(operand[: len(result)], weight, out=result)
    return (grad_hidden,)


def bare_projection(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    if weight.is_cuda:
        torch.mm(hidden, weight.T, out_dtype=out.dtype, out=out)
        return
    for start in range(
        0, len(weight), 2048
    ):  # the vocabulary tile that paint_kernels uses on a CPU
        tile = slice(start, start + 2048)
        torch.mm(hidden, weight[tile].T, out=out[:, tile])


def our_variant(group: str, name: str, objective: Objective, **options: Any) -> Variant:
    run = functools.partial(gradients, functools.partial(our_loss, objective=objective))
    rows = functools.partial(our_float32_rows, objective=objective)
    return Variant(group, name, run, objective, "ours", float32_rows=rows, **options)


@functools.lru_cache
def compile_once(loss: Loss) -> Loss:
    return torch.compile(loss)


def compiled_loss(inputs: Inputs, loss: Loss) -> Tensor:
    """Compiles the loss at its first run, because loading the compiler alone takes seconds."""
    return compile_once(loss)(inputs)


def plain_variants(group: str, objective: Objective, device: torch.device) -> list[Variant]:
    """Returns the variants of plain PyTorch: eager, compiled, and on a GPU with logits rounded to
    half precision."""
    loss: Loss = functools.partial(plain_loss, objective=objective)
    rounded: Loss = functools.partial(plain_loss, objective=objective, project=upcast_logits)
    if objective == LOGPROBS:
        loss = plain_logprobs_loss
        rounded = functools.partial(plain_logprobs_loss, project=upcast_logits)
    named = [("plain", loss), ("compiled", functools.partial(compiled_loss, loss=loss))]
    if device.type == "cuda":
        named.append(("plain, bfloat16 logits", rounded))
    return [
        Variant(group, name, functools.partial(gradients, one), objective, "plain", FULL_LOGITS)
        for name, one in named
    ]
