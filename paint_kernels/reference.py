"""The specification: every public function in plain PyTorch, with the full logits.

The tests compare the fused functions with these in float64. Any floating dtype is accepted; half
precision is computed in float32. Gradients come from autograd. Arguments are those of the public
functions of the same names, without `backend`. Tensors are not checked.
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import TYPE_CHECKING, Unpack

import torch
from torch import Tensor

from paint_kernels._settings import LossOptions, LossSettings, lists_options, without_temperature
from paint_kernels._types import PaintLossOutput, TokenLogprobs, TokenStats

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


def at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def project(
    hidden_states: Float[Tensor, "N H"], weight: Float[Tensor, "V H"]
) -> Float[Tensor, "N V"]:
    """Computes logits in float32 or better, also under autocast."""
    dtype = torch.promote_types(hidden_states.dtype, weight.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    with torch.autocast(hidden_states.device.type, enabled=False):
        return hidden_states.to(dtype) @ weight.to(dtype).T


def head_logits(
    hidden_states: Float[Tensor, "N H"],
    weight: Float[Tensor, "V H"],
    bias: Float[Tensor, " V"] | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Float[Tensor, "N V"]:
    """Returns softcap * tanh(scale * (h W^T + b) / softcap), without a cap scale * (h W^T + b)."""
    logits = project(hidden_states, weight)
    if bias is not None:
        logits = logits + bias.to(torch.promote_types(logits.dtype, bias.dtype))
    logits = scale * logits
    return logits if softcap in (None, math.inf) else softcap * torch.tanh(logits / softcap)


def trained_logits(
    hidden_states: Float[Tensor, "N H"],
    head: tuple[Tensor, Tensor | None, float, float | None],
    token_weights: Float[Tensor, " N"] | None,
) -> Float[Tensor, "N V"]:
    """Returns the student's logits. Rows of weight 0 are constants, also where they are NaN."""
    logits = head_logits(hidden_states, *head)
    if token_weights is None:
        return logits
    unused = (token_weights == 0)[:, None]
    others = head_logits(hidden_states.masked_fill(unused, 0.0), *head)
    return torch.where(unused, logits.detach(), others)


def ranked_ratio(
    entropy_ratio: Float[Tensor, " N"], token_weights: Float[Tensor, " N"] | None
) -> Float[Tensor, " N"]:
    """Returns the ratios by which positions are ranked: tokens of weight 0 come last."""
    if token_weights is None:
        return entropy_ratio
    return entropy_ratio.masked_fill(token_weights == 0, -math.inf)


def per_row(temperature: float | Tensor) -> float | Tensor:
    """Returns a number as it is, and (N,) temperatures as a column."""
    return temperature[:, None] if isinstance(temperature, Tensor) else temperature


def masked_rows(logits: Float[Tensor, "N V"]) -> Bool[Tensor, " N"]:
    """Returns True for rows in which every logit is -inf, which define no distribution."""
    return (logits == -math.inf).all(dim=-1)


def log_probabilities(
    logits: Float[Tensor, "N V"], temperature: float | Float[Tensor, " N"]
) -> Float[Tensor, "N V"]:
    """Returns log softmax(logits / temperature). Fully masked rows are uniform; no result uses
    them."""
    usable = torch.where(masked_rows(logits)[:, None], 0.0, logits)
    return torch.log_softmax(usable / per_row(temperature), dim=-1)


def entropy_of(log_p: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """Returns H in nats (Eq. 8), where 0 log 0 is 0."""
    p = log_p.exp()
    return -torch.where(p > 0, p * log_p, 0.0).sum(dim=-1)


def select_top_fraction(
    entropy_ratio: Float[Tensor, " N"], cu_seqlens: Int[Tensor, " B+1"], top_fraction: float
) -> Bool[Tensor, " N"]:
    """Returns True at the ceil(top_fraction * n) positions of a rollout with the largest ratio
    (Alg. 1)."""
    ratios, bounds = entropy_ratio.tolist(), cu_seqlens.tolist()
    selected = torch.zeros(len(ratios), dtype=torch.bool, device=entropy_ratio.device)
    for start, end in itertools.pairwise(bounds):
        num_selected = math.ceil(Fraction(str(top_fraction)) * (end - start))
        ranked = sorted(range(start, end), key=lambda n: (-ratios[n], n))
        selected[ranked[:num_selected]] = True
    return selected


def top_k_indices(logits: Float[Tensor, "N V"], k: int) -> Int[Tensor, "N k"]:
    """Returns the columns of the k largest entries of each row. Ties go to the lower column."""
    return torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :k]


def interpolate(
    teacher_logits: Float[Tensor, "N V"],
    student_logits: Float[Tensor, "N V"],
    selected: Bool[Tensor, " N"],
    weight: float,
) -> Float[Tensor, "N V"]:
    """Returns (1-k) z_T + k z_S in the selected rows (Eq. 12), where 0 times -inf is 0."""
    if weight == 0:
        return teacher_logits
    mixed = student_logits
    if weight < 1:
        mixed = (1 - weight) * teacher_logits + weight * student_logits
    return torch.where(selected[:, None], mixed, teacher_logits)


def divergence_terms(
    log_p: Float[Tensor, "N V"],
    log_q: Float[Tensor, "N V"],
    divergence: str,
    jsd_weight: float,
) -> Float[Tensor, "N V"]:
    """Returns f(v), whose sum over v is the divergence of the student p from the target q.

    forward_kl: q (log q - log p). reverse_kl: p (log p - log q). jsd, with weight b on the target
    and m = b q + (1-b) p: b q (log q - log m) + (1-b) p (log p - log m). A product with a factor 0
    is 0, whatever the logarithm: without the guards 0 * inf would be NaN.
    """
    p, q = log_p.exp(), log_q.exp()
    if divergence == "forward_kl":
        return q * torch.where(q > 0, log_q - log_p, 0.0)
    if divergence == "reverse_kl":
        apart = (p > 0) & (q == 0)
        f = p * torch.where((p > 0) & (q > 0), log_p - log_q, 0.0)
        return torch.where(apart, math.inf, f)
    assert divergence == "jsd"
    b = jsd_weight
    some = (p > 0) | (q > 0)
    safe_p, safe_q = torch.where(some, log_p, 0.0), torch.where(some, log_q, 0.0)
    log_m = torch.logaddexp(safe_q + math.log(b), safe_p + math.log1p(-b))
    target_term = q * torch.where(q > 0, log_q - log_m, 0.0)
    student_term = p * torch.where(p > 0, safe_p - log_m, 0.0)
    return b * target_term + (1 - b) * student_term


def clipped_divergence(
    log_p_student: Float[Tensor, "N V"],
    log_p_target: Float[Tensor, "N V"],
    divergence: str,
    jsd_weight: float,
    pointwise_clip: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (N,) token losses (Eq. 3), unclipped divergences, and target mass of the clipped
    entries."""
    f = divergence_terms(log_p_student, log_p_target, divergence, jsd_weight)
    token_divergence = f.sum(dim=-1)
    if pointwise_clip is None:
        return token_divergence, token_divergence.detach(), torch.zeros_like(token_divergence)
    clipped_mass = torch.where(f > pointwise_clip, log_p_target.exp(), 0.0).sum(dim=-1)
    # clamp passes the gradient at equality: an entry is unclipped when f <= tau.
    return f.clamp(max=pointwise_clip).sum(dim=-1), token_divergence.detach(), clipped_mass


def reduce_tokens(
    token_loss: Float[Tensor, " N"],
    cu_seqlens: Int[Tensor, " B+1"],
    reduction: str,
    denominator: float | Tensor | None,
    token_weights: Float[Tensor, " N"] | None = None,
) -> Tensor:
    """Returns the loss of a batch; "sequence_mean" is Alg. 1 line 17. The weights multiply the
    token losses and change no denominator. 0 times NaN is 0 here."""
    if token_weights is not None:
        token_loss = torch.where(token_weights == 0, 0.0, token_loss * token_weights)
    if reduction == "none":
        return token_loss
    if reduction == "sum":
        return token_loss.sum()
    if reduction == "token_mean":
        return token_loss.sum() / (max(len(token_loss), 1) if denominator is None else denominator)
    rollouts = token_loss.split(cu_seqlens.diff().tolist())
    means = [rollout.mean() for rollout in rollouts if len(rollout)]
    total = torch.stack(means).sum() if means else token_loss.sum()
    return total / (max(len(means), 1) if denominator is None else denominator)


@lists_options
def paint_loss_from_logits(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    cu_seqlens: Int[Tensor, " B+1"],
    *,
    token_weights: Float[Tensor, " N"] | None = None,
    selected: Bool[Tensor, " N"] | None = None,
    vocab_size: int | None = None,
    reduction: str = "sequence_mean",
    denominator: float | Tensor | None = None,
    **options: Unpack[LossOptions],
) -> PaintLossOutput:
    """Computes the PAINT loss of (N, V) logits (Eq. 3, 8, 9, 12, 13, Alg. 1)."""
    temperature = options.get("temperature", 1.0)
    settings = LossSettings(**without_temperature(options))
    student_logits = at_least_float32(student_logits[:, :vocab_size])
    teacher_logits = at_least_float32(teacher_logits[:, :vocab_size]).detach()
    if token_weights is not None:
        unused = (token_weights == 0)[:, None]
        student_logits = torch.where(unused, student_logits.detach(), student_logits)
    if settings.teacher_top_k is not None:
        largest = top_k_indices(teacher_logits, settings.teacher_top_k)
        student_logits = student_logits.gather(1, largest)
        teacher_logits = teacher_logits.gather(1, largest)

    student_masked, teacher_masked = masked_rows(student_logits), masked_rows(teacher_logits)
    log_p_student = log_probabilities(student_logits, temperature)
    with torch.no_grad():
        student_entropy = entropy_of(log_p_student).masked_fill(student_masked, 0.0)
        teacher_entropy = entropy_of(log_probabilities(teacher_logits, temperature))
        teacher_entropy = teacher_entropy.masked_fill(teacher_masked, 0.0)
        entropy_ratio = teacher_entropy / student_entropy.clamp(min=settings.entropy_floor)
        if selected is None:
            ranked = ranked_ratio(entropy_ratio, token_weights)
            selected = select_top_fraction(ranked, cu_seqlens, settings.top_fraction)
        target_logits = interpolate(
            teacher_logits, student_logits, selected, settings.interpolation_weight
        )
        log_p_target = log_probabilities(target_logits, temperature)

    values = clipped_divergence(
        log_p_student,
        log_p_target,
        settings.divergence,
        settings.jsd_weight,
        settings.pointwise_clip,
    )
    # A row that is fully masked on either side counts as a token with loss 0.
    usable = ~(student_masked | masked_rows(target_logits))
    token_loss, token_kl, clipped_mass = (torch.where(usable, value, 0.0) for value in values)
    return PaintLossOutput(
        loss=reduce_tokens(token_loss, cu_seqlens, reduction, denominator, token_weights),
        token_loss=token_loss.detach(),
        token_kl=token_kl,
        student_entropy=student_entropy,
        teacher_entropy=teacher_entropy,
        entropy_ratio=entropy_ratio,
        clipped_mass=clipped_mass,
        selected=selected,
    )


def kept_bounds(
    kept: Bool[Tensor, ...], cu_seqlens: Int[Tensor, " B+1"] | None
) -> Int[Tensor, " B+1"]:
    """Returns the bounds of the rollouts in the kept rows: of the rows of (B, T), or of (N,) with
    the bounds `cu_seqlens`."""
    if cu_seqlens is None:
        lengths = [int(row.sum()) for row in kept]
    else:
        lengths = [int(part.sum()) for part in kept.split(cu_seqlens.diff().tolist())]
    return torch.tensor([0, *itertools.accumulate(lengths)])


@lists_options
def paint_loss(
    student_hidden_states: Float[Tensor, "N H"],
    teacher_hidden_states: Float[Tensor, "N H_T"],
    lm_head_weight: Float[Tensor, "V H"],
    cu_seqlens: Int[Tensor, " B+1"] | None = None,
    *,
    labels: Int[Tensor, " N"] | Int[Tensor, "B T"] | None = None,
    ignore_index: int = -100,
    token_weights: Float[Tensor, " N"] | None = None,
    selected: Bool[Tensor, " N"] | None = None,
    lm_head_bias: Float[Tensor, " V"] | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    teacher_lm_head_weight: Float[Tensor, "V H_T"] | None = None,
    teacher_lm_head_bias: Float[Tensor, " V"] | None = None,
    teacher_logit_scale: float | None = None,
    teacher_logit_softcap: float | None = None,
    vocab_size: int | None = None,
    reduction: str = "sequence_mean",
    denominator: float | Tensor | None = None,
    **options: Unpack[LossOptions],
) -> PaintLossOutput:
    """Computes the PAINT loss of hidden states (N, H), (N, H_T) and heads (V, H), (V, H_T)."""
    student_head = (lm_head_weight, lm_head_bias, logit_scale, logit_softcap)
    weight, bias, scale, softcap = student_head
    if teacher_lm_head_weight is not None:
        weight, bias, scale, softcap = teacher_lm_head_weight, None, 1.0, None
    teacher_head = (
        weight,
        bias if teacher_lm_head_bias is None else teacher_lm_head_bias,
        scale if teacher_logit_scale is None else teacher_logit_scale,
        softcap if teacher_logit_softcap is None else teacher_logit_softcap,
    )

    kept = torch.ones_like(student_hidden_states[..., 0], dtype=torch.bool)
    if labels is not None:
        kept = labels != ignore_index
        cu_seqlens = kept_bounds(kept, cu_seqlens)
    assert cu_seqlens is not None
    temperature = options.get("temperature", 1.0)
    if isinstance(temperature, Tensor):
        options["temperature"] = temperature[kept]
    if token_weights is not None:
        token_weights = token_weights[kept]
    output = paint_loss_from_logits(
        trained_logits(student_hidden_states[kept], student_head, token_weights),
        head_logits(teacher_hidden_states[kept], *teacher_head).detach(),
        cu_seqlens,
        token_weights=token_weights,
        selected=None if selected is None else selected[kept],
        vocab_size=vocab_size,
        reduction=reduction,
        denominator=denominator,
        **options,
    )
    return spread_rows(output, kept)


def spread_rows(output: PaintLossOutput, kept: Bool[Tensor, ...]) -> PaintLossOutput:
    """Returns the values of the kept rows at their places in the shape of `kept`, among 0."""

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(kept.shape).masked_scatter(kept, values)

    return PaintLossOutput(*(value if value.ndim == 0 else spread(value) for value in output))


def token_stats(
    hidden_states: Float[Tensor, "N H"],
    lm_head_weight: Float[Tensor, "V H"],
    *,
    temperature: float | Float[Tensor, " N"] = 1.0,
    lm_head_bias: Float[Tensor, " V"] | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    vocab_size: int | None = None,
) -> TokenStats:
    """Returns (N,) log-sum-exp and entropy of softmax(logits / temperature), with the logits of
    `head_logits`."""
    head = (lm_head_weight, lm_head_bias, logit_scale, logit_softcap)
    with torch.no_grad():
        logits = head_logits(hidden_states, *head)[:, :vocab_size]
        entropy = entropy_of(log_probabilities(logits, temperature))
        return TokenStats(torch.logsumexp(logits / per_row(temperature), dim=-1), entropy)


def token_logprobs(
    hidden_states: Float[Tensor, "N H"],
    lm_head_weight: Float[Tensor, "V H"],
    token_ids: Int[Tensor, " N"],
    *,
    temperature: float | Float[Tensor, " N"] = 1.0,
    lm_head_bias: Float[Tensor, " V"] | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    vocab_size: int | None = None,
) -> TokenLogprobs:
    """Returns (N,) log-probabilities of `token_ids`, and the detached entropy."""
    head = (lm_head_weight, lm_head_bias, logit_scale, logit_softcap)
    log_p = log_probabilities(head_logits(hidden_states, *head)[:, :vocab_size], temperature)
    logprobs = log_p.gather(1, token_ids.long()[:, None])[:, 0]
    return TokenLogprobs(logprobs, entropy_of(log_p.detach()))
