"""The specification of `paint_loss_from_topk` in plain PyTorch, with the full logits.

Everything that `reference` says holds here. Token by token, a distribution is a vector of
log-probabilities over the ids of that token and their tail.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Unpack

import torch
from torch import Tensor

from paint_kernels._settings import LossOptions, LossSettings, lists_options
from paint_kernels._types import PaintLossOutput
from paint_kernels.reference import (
    at_least_float32,
    divergence_terms,
    entropy_of,
    interpolate,
    log_probabilities,
    project,
    reduce_tokens,
    select_top_fraction,
)

if TYPE_CHECKING:
    from jaxtyping import Float, Int


LEAST_TAIL = 1e-6
"""of the teacher's probability: rounded log-probabilities leave no certain rest below it"""


def student_support(
    log_p: Float[Tensor, " V"], ids: Int[Tensor, " k"], tail: str
) -> Float[Tensor, " K"]:
    """Returns log-probabilities over the ids and their tail, or over the ids renormalised."""
    if tail == "renormalise":
        return torch.log_softmax(log_p[ids], dim=0)
    outside = torch.ones_like(log_p, dtype=torch.bool)
    outside[ids] = False
    if not outside.any():
        return log_p[ids]
    return torch.cat([log_p[ids], torch.logsumexp(log_p[outside], dim=0, keepdim=True)])


def teacher_support(
    logprobs: Float[Tensor, " k"], tail: str, *, with_rest: bool
) -> Float[Tensor, " K"]:
    """Returns the same of the teacher; -inf throughout if it gives no id a probability."""
    if tail != "renormalise" and with_rest:
        left = (1 - logprobs.double().exp().sum()).clamp(min=LEAST_TAIL)
        logprobs = torch.cat([logprobs, left.log().to(logprobs)[None]])
    return logprobs if (logprobs == -math.inf).all() else torch.log_softmax(logprobs, dim=0)


@lists_options
def paint_loss_from_topk(
    student_hidden_states: Float[Tensor, "N H"],
    lm_head_weight: Float[Tensor, "V H"],
    teacher_token_ids: Int[Tensor, "N K"],
    teacher_logprobs: Float[Tensor, "N K"],
    cu_seqlens: Int[Tensor, " B+1"],
    *,
    tail: str = "bucket",
    vocab_size: int | None = None,
    reduction: str = "sequence_mean",
    denominator: float | Tensor | None = None,
    **options: Unpack[LossOptions],
) -> PaintLossOutput:
    """Computes the loss with one distribution per token."""
    settings = LossSettings(**options)  # pyright: ignore[reportArgumentType]
    logits = project(student_hidden_states, lm_head_weight)[:, :vocab_size]
    logprobs = at_least_float32(teacher_logprobs).detach().to(logits.dtype)
    every_p, every_q = [], []
    for log_p, ids, log_q in zip(
        log_probabilities(logits, settings.temperature), teacher_token_ids, logprobs, strict=True
    ):
        listed = ids[ids >= 0].long()
        if not len(listed):
            every_p.append(None)
            every_q.append(None)
            continue
        every_p.append(student_support(log_p, listed, tail))
        with_rest = len(every_p[-1]) > len(listed)
        every_q.append(teacher_support(log_q[ids >= 0], tail, with_rest=with_rest))

    zero = logits.new_zeros(())
    with torch.no_grad():
        entropies = [
            [zero if x is None or (x == -math.inf).all() else entropy_of(x) for x in every]
            for every in (every_p, every_q)
        ]
        student_entropy, teacher_entropy = (torch.stack([*e, zero])[:-1] for e in entropies)
        ratio = teacher_entropy / student_entropy.clamp(min=settings.entropy_floor)
        selected = select_top_fraction(ratio, cu_seqlens, settings.top_fraction)

    values = [
        token_values(p, q, chosen, len(ids[ids >= 0]), tail, settings)
        for p, q, chosen, ids in zip(every_p, every_q, selected, teacher_token_ids, strict=True)
    ]
    # The first row keeps an empty batch, and one without any id, in the graph.
    first = torch.stack([logits.sum() * 0.0, zero, zero])
    token_loss, token_kl, clipped_mass = torch.stack([first, *values])[1:].unbind(1)
    token_loss = token_loss + first[0]
    return PaintLossOutput(
        loss=reduce_tokens(token_loss, cu_seqlens, reduction, denominator),
        token_loss=token_loss.detach(),
        token_kl=token_kl.detach(),
        student_entropy=student_entropy,
        teacher_entropy=teacher_entropy,
        entropy_ratio=ratio,
        clipped_mass=clipped_mass.detach(),
        selected=selected,
    )


def token_values(
    log_p: Tensor | None,
    log_q: Tensor | None,
    selected: Tensor,
    num_ids: int,
    tail: str,
    settings: LossSettings,
) -> Float[Tensor, " 3"]:
    """Returns token loss, divergence and clipped mass of one token."""
    if log_p is None or log_q is None or (log_q == -math.inf).all():
        return torch.zeros(3) if log_p is None else (0 * log_p.sum()).expand(3)
    target = log_q
    if selected and settings.interpolates:
        mixed = interpolate(
            log_q[None], log_p.detach()[None], selected[None], settings.interpolation_weight
        )
        target = log_probabilities(mixed, 1.0)[0]
    f = divergence_terms(log_p, target, settings.divergence, settings.jsd_weight)
    if tail == "drop":
        f, target = f[:num_ids], target[:num_ids]
    clip = math.inf if settings.pointwise_clip is None else settings.pointwise_clip
    mass = torch.where(f > clip, target.exp(), 0.0).sum()
    loss = f.sum() if clip == math.inf else f.clamp(max=clip).sum()
    return torch.stack([loss, f.sum(), mass])
