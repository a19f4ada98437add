"""The specification of `paint_loss_from_topk` in plain PyTorch, with the full logits.

Everything that `reference` says holds here. Token by token, a distribution is a vector of
log-probabilities over the ids of that token and their tail.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Unpack

import torch
from torch import Tensor

from paint_kernels._settings import LossOptions, LossSettings, lists_options, without_temperature
from paint_kernels._types import PaintLossOutput
from paint_kernels.reference import (
    at_least_float32,
    divergence_terms,
    entropy_of,
    interpolate,
    kept_bounds,
    log_probabilities,
    ranked_ratio,
    reduce_tokens,
    select_top_fraction,
    spread_rows,
    trained_logits,
)

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


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


def supports(
    log_p: Float[Tensor, "N V"], ids: Int[Tensor, "N K"], log_q: Float[Tensor, "N K"], tail: str
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Returns the distributions of the student and of the teacher; None for a token without ids."""
    every_p, every_q = [], []
    for own_log_p, own_ids, own_log_q in zip(log_p, ids, log_q, strict=True):
        listed = own_ids[own_ids >= 0].long()
        if not len(listed):
            every_p.append(None)
            every_q.append(None)
            continue
        every_p.append(student_support(own_log_p, listed, tail))
        with_rest = len(every_p[-1]) > len(listed)
        every_q.append(teacher_support(own_log_q[own_ids >= 0], tail, with_rest=with_rest))
    return every_p, every_q


@lists_options
def paint_loss_from_topk(
    student_hidden_states: Float[Tensor, "N H"],
    lm_head_weight: Float[Tensor, "V H"],
    teacher_token_ids: Int[Tensor, "N K"],
    teacher_logprobs: Float[Tensor, "N K"],
    cu_seqlens: Int[Tensor, " B+1"] | None = None,
    *,
    tail: str = "bucket",
    labels: Int[Tensor, " N"] | Int[Tensor, "B T"] | None = None,
    ignore_index: int = -100,
    token_weights: Float[Tensor, " N"] | None = None,
    selected: Bool[Tensor, " N"] | None = None,
    lm_head_bias: Float[Tensor, " V"] | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    vocab_size: int | None = None,
    reduction: str = "sequence_mean",
    denominator: float | Tensor | None = None,
    **options: Unpack[LossOptions],
) -> PaintLossOutput:
    """Computes the loss with one distribution per token."""
    kept = torch.ones_like(student_hidden_states[..., 0], dtype=torch.bool)
    if labels is not None:
        kept = labels != ignore_index
        cu_seqlens = kept_bounds(kept, cu_seqlens)
    assert cu_seqlens is not None
    settings = LossSettings(**without_temperature(options))
    temperature = options.get("temperature", 1.0)
    if isinstance(temperature, Tensor):
        temperature = temperature[kept]
    if token_weights is not None:
        token_weights = token_weights[kept]
    head = lm_head_weight, lm_head_bias, logit_scale, logit_softcap
    logits = trained_logits(student_hidden_states[kept], head, token_weights)[:, :vocab_size]
    log_p, ids = log_probabilities(logits, temperature), teacher_token_ids[kept]
    log_q = at_least_float32(teacher_logprobs[kept]).detach().to(logits.dtype)
    every_p, every_q = supports(log_p, ids, log_q, tail)

    zero = logits.new_zeros(())
    with torch.no_grad():
        entropies = [
            [zero if x is None or (x == -math.inf).all() else entropy_of(x) for x in every]
            for every in (every_p, every_q)
        ]
        student_entropy, teacher_entropy = (torch.stack([*e, zero])[:-1] for e in entropies)
        ratio = teacher_entropy / student_entropy.clamp(min=settings.entropy_floor)
        chosen = None if selected is None else selected[kept]
        if chosen is None:
            ranked = ranked_ratio(ratio, token_weights)
            chosen = select_top_fraction(ranked, cu_seqlens, settings.top_fraction)

    values = [
        token_values(p, q, interpolated, len(own[own >= 0]), tail, settings)
        for p, q, interpolated, own in zip(every_p, every_q, chosen, ids, strict=True)
    ]
    # The first row keeps an empty batch, and one without any id, in the graph.
    first = torch.stack([logits[:0].sum(), zero, zero])
    token_loss, token_kl, clipped_mass = torch.stack([first, *values])[1:].unbind(1)
    token_loss = token_loss + first[0]
    output = PaintLossOutput(
        loss=reduce_tokens(token_loss, cu_seqlens, reduction, denominator, token_weights),
        token_loss=token_loss.detach(),
        token_kl=token_kl.detach(),
        student_entropy=student_entropy,
        teacher_entropy=teacher_entropy,
        entropy_ratio=ratio,
        clipped_mass=clipped_mass.detach(),
        selected=chosen,
    )
    return spread_rows(output, kept)


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
    if selected and settings.interpolation_weight > 0:
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
