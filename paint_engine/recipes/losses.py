"""Objectives as pure functions of hidden states; the only place that imports paint_kernels.

Rows are the N packed completion tokens of B rollouts; `cu_seqlens` (B+1,) holds the rollouts'
bounds on the CPU. Logits are divided by `section.temperature` everywhere, and `vocab_size` counts
the rows of a head that are real tokens. `denominator` is the number of rollouts ("sequence_mean",
where a rollout without tokens counts as 0) or of tokens ("token_mean") of the whole step, so that
the micro-batches' losses and gradients add up to the step's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from paint_engine.config.sections import GrpoSection, ObjectiveSection
from paint_kernels import TokenLogprobs, paint_loss, token_logprobs

__all__ = [
    "ObjectiveOutput",
    "group_advantages",
    "grpo",
    "metric_sums",
    "paint",
    "sampled_token",
    "sft",
]

# Keeps the division finite where the rewards of a group hardly differ, as TRL's GRPO does.
_STD_FLOOR = 1e-4
# What each token has and no metric sums up.
_NOT_SUMMED = ("token_loss", "logprobs", "selected")


@dataclass(frozen=True)
class ObjectiveOutput:
    """What an objective says of one micro-batch.

    loss: 0-d, with the gradient. per_token: detached (N,) tensors by name, bool or float32 (float64
    for float64 inputs); log-probabilities, KL and entropies in nats.
    """

    loss: Float[Tensor, ""]
    per_token: dict[str, Tensor]


def paint(
    student_hidden_states: Float[Tensor, "N H"],
    teacher_hidden_states: Float[Tensor, "N H"],
    lm_head_weight: Float[Tensor, "V H"],
    cu_seqlens: Int[Tensor, " B+1"],
    section: ObjectiveSection,
    *,
    teacher_lm_head_weight: Float[Tensor, "V H"] | None,
    vocab_size: int,
    denominator: int,
) -> ObjectiveOutput:
    """Clipped divergence to the sparsely interpolated teacher (Eq. 3, 12, 14).

    teacher_lm_head_weight: None where the teacher has the student's head.
    """
    output = paint_loss(
        student_hidden_states,
        teacher_hidden_states,
        lm_head_weight,
        cu_seqlens,
        teacher_lm_head_weight=teacher_lm_head_weight,
        temperature=section.temperature,
        divergence=section.divergence,
        jsd_weight=section.jsd_weight,
        pointwise_clip=section.pointwise_clip,
        top_fraction=section.top_fraction,
        interpolation_weight=section.interpolation_weight,
        teacher_top_k=section.teacher_top_k,
        entropy_floor=section.entropy_floor,
        vocab_size=vocab_size,
        reduction=section.reduction,
        denominator=denominator,
    )
    per_token = {
        "token_loss": output.token_loss,
        "token_kl": output.token_kl,
        "clipped_mass": output.clipped_mass,
        "clipped_token_share": output.clipped_mass > 0,
        "student_entropy": output.student_entropy,
        "teacher_entropy": output.teacher_entropy,
        "selected": output.selected,
    }
    return ObjectiveOutput(output.loss, per_token)


def sampled_token(
    student_hidden_states: Float[Tensor, "N H"],
    teacher_hidden_states: Float[Tensor, "N H"],
    lm_head_weight: Float[Tensor, "V H"],
    token_ids: Int[Tensor, " N"],
    cu_seqlens: Int[Tensor, " B+1"],
    section: ObjectiveSection,
    *,
    teacher_lm_head_weight: Float[Tensor, "V H"] | None,
    rollout_logprobs: Float[Tensor, " N"],
    vocab_size: int,
    denominator: int,
) -> ObjectiveOutput:
    """Policy gradient by the log-ratio of the sampled tokens, A_t = log p_T(y_t) - log p_S(y_t).

    The token loss is w_t (log p_S - log p_T), a sample of the reverse KL; its gradient is
    -w_t A_t grad log p_S(y_t), whose mean over samples from p_S is the gradient of each token's
    reverse KL. Samples that top-p or top-k has cut, or of another temperature, are not from p_S,
    and their mean is another: it takes a sampler that cuts nothing off.
    w_t = min(p_S / p_sampler, importance_cap), or 1 where the cap is None.

    rollout_logprobs: the sampler's log-probabilities of `token_ids`, used with a cap only.
    """
    student = _logprobs(student_hidden_states, lm_head_weight, token_ids, section, vocab_size)
    teacher_head = lm_head_weight if teacher_lm_head_weight is None else teacher_lm_head_weight
    with torch.no_grad():
        teacher = _logprobs(teacher_hidden_states, teacher_head, token_ids, section, vocab_size)
    present = student.logprobs.detach()
    sampled_kl = present - teacher.logprobs
    weight = _importance_weight(present, rollout_logprobs, section.importance_cap)
    # The factor is 1 and carries the gradient of log p_S.
    token_loss = weight * sampled_kl * torch.exp(student.logprobs - present)
    per_token = {
        "token_loss": token_loss.detach(),
        "sampled_kl": sampled_kl,
        "importance_weight": weight,
        "student_entropy": student.entropy,
        "teacher_entropy": teacher.entropy,
    }
    return ObjectiveOutput(_reduced(token_loss, cu_seqlens, section, denominator), per_token)


def grpo(
    student_hidden_states: Float[Tensor, "N H"],
    base_hidden_states: Float[Tensor, "N H"] | None,
    lm_head_weight: Float[Tensor, "V H"],
    token_ids: Int[Tensor, " N"],
    cu_seqlens: Int[Tensor, " B+1"],
    advantages: Float[Tensor, " B"],
    section: ObjectiveSection,
    grpo_section: GrpoSection,
    *,
    base_lm_head_weight: Float[Tensor, "V H"] | None,
    old_logprobs: Float[Tensor, " N"] | None,
    rollout_logprobs: Float[Tensor, " N"],
    vocab_size: int,
    denominator: int,
) -> ObjectiveOutput:
    """GRPO with ratio r_t = p_S / p_old and advantage A of the token's rollout; a token's loss is

        -w_t min(r_t A, clip(r_t, 1 - low, 1 + high) A) + kl_weight (exp(d_t) - d_t - 1),

    d_t = log p_base - log p_S, w_t = min(p_old / p_sampler, importance_cap), or 1 without a cap.

    base_hidden_states: given with a kl_weight above 0. base_lm_head_weight: None where the base has
        the student's head.
    old_logprobs: `per_token["logprobs"]` of the first update on these rollouts, None in that one.
    rollout_logprobs: the sampler's log-probabilities of `token_ids`, used with a cap only.
    """
    student = _logprobs(student_hidden_states, lm_head_weight, token_ids, section, vocab_size)
    present = student.logprobs.detach()
    old = present if old_logprobs is None else old_logprobs
    ratio = torch.exp(student.logprobs - old)
    advantage = advantages.to(ratio)[_rollout_of_token(cu_seqlens).to(ratio.device)]
    policy_gain, clipped = _clipped_gain(ratio, advantage, grpo_section)
    weight = _importance_weight(old, rollout_logprobs, section.importance_cap)
    token_loss = -weight * policy_gain
    per_token = {
        "logprobs": present,
        "ratio": ratio.detach(),
        "ratio_clipped_share": clipped,
        "importance_weight": weight,
        "student_entropy": student.entropy,
    }
    if grpo_section.kl_weight > 0:
        assert base_hidden_states is not None
        base_head = lm_head_weight if base_lm_head_weight is None else base_lm_head_weight
        with torch.no_grad():
            base = _logprobs(base_hidden_states, base_head, token_ids, section, vocab_size)
        difference = base.logprobs - student.logprobs
        base_kl = torch.expm1(difference) - difference
        token_loss = token_loss + grpo_section.kl_weight * base_kl
        per_token["base_kl"] = base_kl.detach()
    per_token["token_loss"] = token_loss.detach()
    return ObjectiveOutput(_reduced(token_loss, cu_seqlens, section, denominator), per_token)


def sft(
    student_hidden_states: Float[Tensor, "N H"],
    lm_head_weight: Float[Tensor, "V H"],
    token_ids: Int[Tensor, " N"],
    cu_seqlens: Int[Tensor, " B+1"],
    section: ObjectiveSection,
    *,
    vocab_size: int,
    denominator: int,
) -> ObjectiveOutput:
    """Cross-entropy of the reference solutions, whose tokens `token_ids` are."""
    student = _logprobs(student_hidden_states, lm_head_weight, token_ids, section, vocab_size)
    token_loss = -student.logprobs
    per_token = {"token_loss": token_loss.detach(), "student_entropy": student.entropy}
    return ObjectiveOutput(_reduced(token_loss, cu_seqlens, section, denominator), per_token)


def group_advantages(
    rewards: Sequence[float], group_size: int, *, scale_by_std: bool
) -> list[float]:
    """Each reward minus its group's mean, divided by the group's sample standard deviation (n - 1)
    plus 1e-4 where asked. Groups are consecutive; one whose rewards are equal has exact zeros."""
    assert group_size >= 2 and len(rewards) % group_size == 0, (len(rewards), group_size)
    advantages: list[float] = []
    for start in range(0, len(rewards), group_size):
        group = rewards[start : start + group_size]
        if len(set(group)) == 1:
            advantages += [0.0] * group_size
            continue
        mean, scale = fmean(group), stdev(group) + _STD_FLOOR if scale_by_std else 1.0
        advantages += [(reward - mean) / scale for reward in group]
    return advantages


def metric_sums(output: ObjectiveOutput) -> dict[str, float]:
    """The micro-batch's share of the step's loss, and sums over its tokens of what is logged beside
    it: divided by the step's tokens they are means."""
    sums = {n: float(v.sum().item()) for n, v in output.per_token.items() if n not in _NOT_SUMMED}
    return {"loss": output.loss.item(), **sums}


def _logprobs(
    hidden_states: Float[Tensor, "N H"],
    lm_head_weight: Float[Tensor, "V H"],
    token_ids: Int[Tensor, " N"],
    section: ObjectiveSection,
    vocab_size: int,
) -> TokenLogprobs:
    return token_logprobs(
        hidden_states,
        lm_head_weight,
        token_ids,
        temperature=section.temperature,
        vocab_size=vocab_size,
    )


def _importance_weight(
    logprobs: Float[Tensor, " N"], rollout_logprobs: Float[Tensor, " N"], cap: float | None
) -> Float[Tensor, " N"]:
    """Truncated importance weights of tokens that a sampler of slightly other numbers has drawn."""
    if cap is None:
        return torch.ones_like(logprobs)
    return torch.exp(logprobs - rollout_logprobs).clamp(max=cap)


def _clipped_gain(
    ratio: Float[Tensor, " N"], advantage: Float[Tensor, " N"], section: GrpoSection
) -> tuple[Float[Tensor, " N"], Bool[Tensor, " N"]]:
    """min(r A, clip(r) A), and where the clip decides: there the gain has no gradient."""
    low, high = 1 - section.ratio_clip_low, 1 + section.ratio_clip_high
    gain = torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
    clipped = ((ratio > high) & (advantage > 0)) | ((ratio < low) & (advantage < 0))
    return gain, clipped


def _rollout_of_token(cu_seqlens: Int[Tensor, " B+1"]) -> Int[Tensor, " N"]:
    lengths = cu_seqlens.diff()
    return torch.repeat_interleave(torch.arange(len(lengths)), lengths)


def _reduced(
    token_loss: Float[Tensor, " N"],
    cu_seqlens: Int[Tensor, " B+1"],
    section: ObjectiveSection,
    denominator: int,
) -> Float[Tensor, ""]:
    if section.reduction == "token_mean":
        return token_loss.sum() / denominator
    lengths = cu_seqlens.diff()[_rollout_of_token(cu_seqlens)]
    return (token_loss / lengths.to(token_loss)).sum() / denominator
