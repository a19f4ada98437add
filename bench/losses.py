"""Shapes, inputs and losses that several benchmarks share."""

import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from paint_kernels import (
    entropy_ratio,
    paint_loss,
    select_top_fraction,
    token_logprobs,
)

QWEN3_HIDDEN = {"1.7b": 2048, "4b": 2560, "8b": 4096}
"""hidden size by model"""
QWEN3_VOCAB_SIZE = 151936
LOGIT_STD = 2.4
"""standard deviation of a row's logits without its peak, as in language models"""
SMALLEST_PEAK, LARGEST_PEAK = 10.0, 20.0
"""each row has one larger logit, uniform between these: probabilities of about 0.01 to 0.99"""
TEACHER_NOISE = 0.024
"""standard deviation of h_T - h_S: a KL of 0.001 nats"""
DISAGREEMENT, ROWS_PER_DISAGREEMENT = 0.75, 64
"""the teacher's peak logit is higher by this much in one row of 64: the clip acts there, and these
rows bring the mean KL to about 0.002 nats"""


EQUAL = "all 1,024"
MIXTURES = (EQUAL, "all 1,100", "uniform 200 to 1,024", "lognormal around 1,500", "one of 32,768")
"""of rollout lengths, in tokens"""


def drawn_lengths(mixture: str) -> Iterator[int]:
    """Yields the rollout lengths of a mixture, without end."""
    generator = random.Random(0)
    while True:
        yield {
            EQUAL: lambda: 1024,
            "all 1,100": lambda: 1100,
            "uniform 200 to 1,024": lambda: generator.randint(200, 1024),
            "lognormal around 1,500": lambda: round(generator.lognormvariate(math.log(1500), 0.6)),
            "one of 32,768": lambda: 32768,
        }[mixture]()


def bounds_of(mixture: str, num_tokens: int) -> Tensor:
    """Returns a mixture's cu_seqlens, int32, the last rollout cut to end at `num_tokens`."""
    ends = itertools.accumulate(drawn_lengths(mixture))
    inside = list(itertools.takewhile(lambda end: end < num_tokens, ends))
    return torch.tensor([0, *inside, num_tokens], dtype=torch.int32)


@dataclass(frozen=True)
class Shape:
    """mixture: of the rollout lengths; "" if all have `rollout_tokens`."""

    model: str
    num_tokens: int
    rollout_tokens: int
    hidden: int
    vocab_size: int
    mixture: str = ""

    def cu_seqlens(self) -> Tensor:
        """Returns the bounds of the rollouts, int32."""
        if self.mixture:
            return bounds_of(self.mixture, self.num_tokens)
        assert self.num_tokens % self.rollout_tokens == 0, "all rollouts must have one length"
        return torch.arange(0, self.num_tokens + 1, self.rollout_tokens, dtype=torch.int32)


class Inputs(NamedTuple):
    student: Tensor
    """(N, H), requires a gradient"""
    teacher: Tensor
    """(N, H)"""
    weight: Tensor
    """(V, H), the head of both models"""
    cu_seqlens: Tensor
    """(B+1,) int32 on the CPU"""
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

Gradients = tuple[Tensor, ...]
"""(N, H) for the hidden states; also (V, H) for the head if the variant trains it"""
Loss = Callable[[Inputs], Tensor]


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Returns hidden states whose logits have one peak per row, and a teacher at a mean KL of about
    0.002 nats."""
    generator = torch.Generator(device).manual_seed(0)
    options = {"generator": generator, "device": device}
    weight = torch.randn(shape.vocab_size, shape.hidden, **options)
    weight = weight.mul_(LOGIT_STD / shape.hidden**0.5).to(dtype)
    token_ids = torch.randint(shape.vocab_size, (shape.num_tokens,), **options)
    peak = torch.rand(shape.num_tokens, **options)
    peak = SMALLEST_PEAK + (LARGEST_PEAK - SMALLEST_PEAK) * peak
    disagree = torch.arange(shape.num_tokens, device=device) % ROWS_PER_DISAGREEMENT == 31
    peak[disagree] = math.log(shape.vocab_size) + LOGIT_STD**2 / 2  # a probability of one half
    # Adding w / |w|^2 raises the logit of the token with head row w by 1 and others by little.
    direction = weight[token_ids].float()
    direction /= direction.square().sum(dim=1, keepdim=True)
    student = torch.randn(shape.num_tokens, shape.hidden, **options)
    own_logit = (student * weight[token_ids].float()).sum(dim=1)
    student += direction * (peak - own_logit)[:, None]
    teacher = torch.randn(shape.num_tokens, shape.hidden, **options).mul_(TEACHER_NOISE)
    teacher += student + direction * (DISAGREEMENT * disagree)[:, None]
    student = student.to(dtype).requires_grad_()
    return Inputs(student, teacher.to(dtype), weight, shape.cu_seqlens(), token_ids)


def gradients(loss: Loss, inputs: Inputs, *, trains_head: bool = False) -> Gradients:
    student = inputs.student.detach().requires_grad_()
    weight = inputs.weight.detach().requires_grad_(trains_head)
    wanted = (student, weight) if trains_head else (student,)
    return torch.autograd.grad(loss(inputs._replace(student=student, weight=weight)), wanted)


def our_loss(inputs: Inputs, objective: Objective) -> Tensor:
    """Computes the mean over tokens, as the peers do."""
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
        reduction="token_mean",
    ).loss


def our_logprobs_loss(inputs: Inputs) -> Tensor:
    return -token_logprobs(inputs.student, inputs.weight, inputs.token_ids).logprobs.mean()


class WideProjection(torch.autograd.Function):
    """hidden @ weight.T with half-precision factors and a float32 result, in one GEMM."""

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


def plain_loss(
    inputs: Inputs,
    objective: Objective,
    project: Callable[[Tensor, Tensor], Tensor] = float32_logits,
) -> Tensor:
    """Computes the loss in plain PyTorch, with the full logits of all tokens; mean over tokens."""
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
