"""Objectives as pure functions of hidden states; the only place that imports paint_kernels."""

from jaxtyping import Float, Int
from torch import Tensor

from paint_engine.config_sections import ObjectiveSection
from paint_kernels import PaintLossOutput, paint_loss

__all__ = ["PaintLossOutput", "metric_sums", "paint"]


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
) -> PaintLossOutput:
    """Clipped forward KL to the sparsely interpolated teacher (Eq. 3, 12, 14) of one micro-batch.

    denominator: rollouts ("sequence_mean") or tokens ("token_mean") of the whole step, so that the
    micro-batches' losses and gradients add up to the step's.
    """
    return paint_loss(
        student_hidden_states,
        teacher_hidden_states,
        lm_head_weight,
        cu_seqlens,
        teacher_lm_head_weight=teacher_lm_head_weight,
        temperature=section.temperature,
        pointwise_clip=section.pointwise_clip,
        top_fraction=section.top_fraction,
        interpolation_weight=section.interpolation_weight,
        teacher_top_k=section.teacher_top_k,
        entropy_floor=section.entropy_floor,
        vocab_size=vocab_size,
        reduction=section.reduction,
        denominator=denominator,
    )


def metric_sums(output: PaintLossOutput) -> dict[str, float]:
    """The micro-batch's share of the step's loss, and sums over its tokens of what is logged beside
    it: divided by the step's tokens they are means."""
    return {
        "loss": output.loss.item(),
        "token_kl": output.token_kl.sum().item(),
        "clipped_mass": output.clipped_mass.sum().item(),
        "clipped_token_share": (output.clipped_mass > 0).sum().item(),
        "student_entropy": output.student_entropy.sum().item(),
        "teacher_entropy": output.teacher_entropy.sum().item(),
    }
