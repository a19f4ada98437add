"""What the kernel benchmark compares: shapes, inputs, our losses, plain PyTorch, the floor.

A variant computes a loss of the same inputs and its gradient by the student's hidden states (and by
the head, where the variant trains it). Variants of one group do equal work.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from paint_kernels import (
    LossSettings,
    entropy_ratio,
    paint_loss,
    select_top_fraction,
    token_logprobs,
)

LOGIT_STD = 2.4
"""of a row's logits beside its peak, as language models have it"""
SMALLEST_PEAK, LARGEST_PEAK = 10.0, 20.0
"""a row has one larger logit, uniform between these: probabilities of about 0.01 to 0.99"""
TEACHER_NOISE = 0.024
"""standard deviation of h_T - h_S: a KL of 0.001 nats"""
DISAGREEMENT, ROWS_PER_DISAGREEMENT = 0.75, 64
"""nats by which the teacher's peak is higher in some rows: the clip acts there, and these rows
bring the mean KL to about 0.002 nats"""


@dataclass(frozen=True)
class Shape:
    model: str
    num_tokens: int
    rollout_tokens: int
    hidden: int
    vocab_size: int

    @property
    def num_rollouts(self) -> int:
        return self.num_tokens // self.rollout_tokens


class Inputs(NamedTuple):
    student: Tensor
    """(N, H), with a gradient"""
    teacher: Tensor
    """(N, H)"""
    weight: Tensor
    """(V, H), of both models"""
    cu_seqlens: Tensor
    """(B+1,) int32 on the CPU; all rollouts are of one length, so that a mean over rollouts of
    token means is the peers' mean over tokens"""
    token_ids: Tensor
    """(N,) int64: the token at each row's peak"""


@dataclass(frozen=True)
class Objective:
    divergence: str = "forward_kl"
    temperature: float = 1.0
    pointwise_clip: float | None = None
    top_fraction: float = 0.0
    interpolation_weight: float = 0.0


PAINT = Objective("forward_kl", 1.1, 0.06, 0.03, 0.03)
FORWARD_KL, JSD, LOGPROBS = Objective(), Objective("jsd"), Objective("logprobs")
JSD_WEIGHT = 0.5
FULL_LOGITS = ("memory below the full logits",)

Gradients = tuple[Tensor, ...]
"""(N, H) by the hidden states, and (V, H) by the head of variants that train it"""
Loss = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Variant:
    group: str
    name: str
    run: Callable[[Inputs], Gradients]
    objective: Objective
    kind: str
    """one of floor, ours, plain, peer"""
    lacks: tuple[str, ...] = ()
    unavailable: str = ""
    """why it cannot run on this machine"""
    trains_head: bool = False
    float32_rows: Callable[[Inputs], Tensor] | None = None
    """(N, H): the gradient by the hidden states before it is rounded to their dtype"""


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Logits with one peak a row, and a teacher at a mean KL of about 0.002 nats."""
    assert shape.num_rollouts * shape.rollout_tokens == shape.num_tokens, "rollouts of one length"
    generator = torch.Generator(device).manual_seed(0)
    options = {"generator": generator, "device": device}
    weight = torch.randn(shape.vocab_size, shape.hidden, **options)
    weight = weight.mul_(LOGIT_STD / shape.hidden**0.5).to(dtype)
    token_ids = torch.randint(shape.vocab_size, (shape.num_tokens,), **options)
    peak = torch.rand(shape.num_tokens, **options)
    peak = SMALLEST_PEAK + (LARGEST_PEAK - SMALLEST_PEAK) * peak
    disagree = torch.arange(shape.num_tokens, device=device) % ROWS_PER_DISAGREEMENT == 31
    peak[disagree] = math.log(shape.vocab_size) + LOGIT_STD**2 / 2  # a probability of one half
    # A step of w / |w|^2 raises the logit of the token with head row w by 1, others by little.
    direction = weight[token_ids].float()
    direction /= direction.square().sum(dim=1, keepdim=True)
    student = torch.randn(shape.num_tokens, shape.hidden, **options)
    own_logit = (student * weight[token_ids].float()).sum(dim=1)
    student += direction * (peak - own_logit)[:, None]
    teacher = torch.randn(shape.num_tokens, shape.hidden, **options).mul_(TEACHER_NOISE)
    teacher += student + direction * (DISAGREEMENT * disagree)[:, None]
    cu_seqlens = torch.arange(0, shape.num_tokens + 1, shape.rollout_tokens, dtype=torch.int32)
    student = student.to(dtype).requires_grad_()
    return Inputs(student, teacher.to(dtype), weight, cu_seqlens, token_ids)


def gradients(loss: Loss, inputs: Inputs, *, trains_head: bool = False) -> Gradients:
    student = inputs.student.detach().requires_grad_()
    weight = inputs.weight.detach().requires_grad_(trains_head)
    wanted = (student, weight) if trains_head else (student,)
    return torch.autograd.grad(loss(inputs._replace(student=student, weight=weight)), wanted)


def our_loss(inputs: Inputs, objective: Objective) -> Tensor:
    return paint_loss(
        inputs.student,
        inputs.teacher,
        inputs.weight,
        inputs.cu_seqlens,
        temperature=objective.temperature,
        divergence=objective.divergence,
        jsd_weight=JSD_WEIGHT,
        pointwise_clip=objective.pointwise_clip,
        top_fraction=objective.top_fraction,
        interpolation_weight=objective.interpolation_weight,
    ).loss


def our_loss_bounds_on_device(inputs: Inputs, objective: Objective) -> Tensor:
    """The rollouts' bounds are never read: chunks of any tokens, selected rows computed twice."""
    on_device = inputs.cu_seqlens.to(inputs.student.device, non_blocking=True)
    return our_loss(inputs._replace(cu_seqlens=on_device), objective)


def our_logprobs_loss(inputs: Inputs) -> Tensor:
    return -token_logprobs(inputs.student, inputs.weight, inputs.token_ids).logprobs.mean()


def our_float32_rows(inputs: Inputs, objective: Objective) -> Tensor:
    """(N, H) float32: what `paint_loss` keeps for its backward pass, of the mean over tokens."""
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
    _, _, _, rows, _ = torch.ops.paint_kernels.paint_loss(
        inputs.student.detach(),
        inputs.teacher,
        inputs.weight,
        None,
        inputs.cu_seqlens,
        token_weights,
        True,
        False,
        *settings.arguments(),
    )
    return rows / num_tokens


class WideProjection(torch.autograd.Function):
    """hidden @ weight.T in float32 out of half-precision factors, as one GEMM can give it."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)

    @staticmethod
    def backward(ctx, *upstream: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return upstream[0].to(weight.dtype) @ weight, None


def float32_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    if hidden.dtype == torch.float32:
        return hidden @ weight.T
    projected = WideProjection.apply(hidden, weight)
    assert isinstance(projected, Tensor)
    return projected


def upcast_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """What most code does: the logits lose their digits before they become float32."""
    return (hidden @ weight.T).float()


def plain_loss(
    inputs: Inputs,
    objective: Objective,
    project: Callable[[Tensor, Tensor], Tensor] = float32_logits,
) -> Tensor:
    """The loss as one writes it with the logits of all tokens at hand."""
    t, k = objective.temperature, objective.interpolation_weight
    student_logits = project(inputs.student, inputs.weight)
    log_p = torch.log_softmax(student_logits / t, dim=-1)
    with torch.no_grad():
        teacher_logits = project(inputs.teacher, inputs.weight)
        log_q = torch.log_softmax(teacher_logits / t, dim=-1)
        if k > 0:
            ratio = entropy_ratio(
                -(log_q.exp() * log_q).sum(dim=-1), -(log_p.exp() * log_p).sum(dim=-1)
            )
            cu_seqlens = inputs.cu_seqlens.to(ratio.device)
            rows = select_top_fraction(ratio, cu_seqlens, objective.top_fraction)
            mixed = (1 - k) * teacher_logits[rows] + k * student_logits[rows]
            log_q[rows] = torch.log_softmax(mixed / t, dim=-1)
        del teacher_logits
    if objective.divergence == "forward_kl":
        f = log_q.exp() * (log_q - log_p)
    else:
        assert objective.divergence == "jsd"
        log_m = torch.logaddexp(log_q, log_p) + math.log(JSD_WEIGHT)
        f = JSD_WEIGHT * (log_q.exp() * (log_q - log_m) + log_p.exp() * (log_p - log_m))
    if objective.pointwise_clip is not None:
        f = f.clamp(max=objective.pointwise_clip)
    return f.sum(dim=-1).mean()


def plain_logprobs_loss(
    inputs: Inputs, project: Callable[[Tensor, Tensor], Tensor] = float32_logits
) -> Tensor:
    return F.cross_entropy(project(inputs.student, inputs.weight), inputs.token_ids)


def chunk_rows(device: torch.device, vocab_size: int) -> int:
    """Rows of a chunk of bare products: on a GPU enough for full speed, whatever chunks the losses
    take; on a CPU 2^24 logits (64 MiB), the fastest there."""
    return 4096 if device.type == "cuda" else max(1, 2**24 // vocab_size)


@functools.lru_cache(maxsize=1)
def gradient_operand(rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device):
    """Values of a gradient's size for the last GEMM; zeros would draw less power and run faster."""
    return torch.randn(rows, vocab_size, dtype=dtype, device=device).mul_(1e-4)


def bare_gemms(inputs: Inputs, num_projections: int) -> Gradients:
    """The projections (float32 logits) and the product of a gradient with the head: the floor."""
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
    for start in range(0, len(weight), 2048):  # the vocabulary tile of paint_kernels on a CPU
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
    """Compiled when it first runs, for loading the compiler alone takes seconds."""
    return compile_once(loss)(inputs)


def plain_variants(group: str, objective: Objective, device: torch.device) -> list[Variant]:
    """Eager, compiled, and with the logits rounded to half precision as most code has it."""
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
