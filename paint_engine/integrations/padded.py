"""What the trainers share: the settings of the loss, and the loss of one padded micro-batch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.functional import pad

from paint_engine.integrations.heads import whole_head
from paint_kernels import PaintLoss, PaintLossOutput, paint_loss

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

REDUCTIONS = ("sequence_mean", "token_mean")


def resolve_loss_settings(settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the keyword arguments of `paint_loss` that stay the same from batch to batch.

    Settings that are not given keep the defaults of `paint_loss`, which are the paper's.

    Raises ValueError for an unknown name and for a reduction that no trainer can average.
    """
    resolved = {"reduction": "sequence_mean", **(settings or {})}
    known = [name for name in inspect.signature(PaintLoss).parameters if "logit_" not in name]
    if unknown := [name for name in resolved if name not in known]:
        raise ValueError(
            f"loss_settings has {', '.join(map(repr, unknown))}: it takes {', '.join(known)}. The "
            "trainer computes the denominator itself, and asks the models for scales and caps."
        )
    if resolved["reduction"] not in REDUCTIONS:
        raise ValueError(
            f"loss_settings has reduction {resolved['reduction']!r}: a trainer needs a mean over "
            f"micro-batches and ranks. Choose one of {', '.join(REDUCTIONS)}."
        )
    return resolved


def padded_paint_loss(
    student_hidden_states: Float[Tensor, "B T H"],
    student_mask: Bool[Tensor, "B T"],
    student_head: Float[Tensor, "V H"],
    teacher_hidden_states: Float[Tensor, "B S H_T"],
    teacher_mask: Bool[Tensor, "B S"],
    teacher_head: Float[Tensor, "V H_T"] | None,
    *,
    denominator: float | Tensor | None,
    student_bias: Float[Tensor, " V"] | None = None,
    teacher_bias: Float[Tensor, " V"] | None = None,
    **settings: Any,
) -> PaintLossOutput:
    """Computes `paint_loss` of one padded micro-batch.

    The masks are True on the positions whose hidden states predict the tokens of the loss; each row
    has the same number of them for the student and the teacher.
    teacher_head: None if it is the student's, and then its bias is too.
    denominator: rollouts or tokens of the whole step, by the reduction, divided by the number of
    ranks; None is this micro-batch's own count.
    """
    # Selecting rows by a mask waits for their number anyway, and bounds on the host let the loss
    # keep whole rollouts together.
    lengths = student_mask.sum(1).cpu()
    if (teacher_lengths := teacher_mask.sum(1).cpu()).tolist() != lengths.tolist():
        raise ValueError(
            f"the student's rows have {lengths.tolist()} tokens in the loss and the teacher's "
            f"{teacher_lengths.tolist()}: both must hold the same completions. Check the labels."
        )
    return paint_loss(
        student_hidden_states[student_mask],
        teacher_hidden_states[teacher_mask],
        whole_head(student_head),
        pad(lengths.cumsum(0), (1, 0)).int(),
        lm_head_bias=None if student_bias is None else whole_head(student_bias),
        teacher_lm_head_weight=None if teacher_head is None else whole_head(teacher_head),
        teacher_lm_head_bias=None if teacher_bias is None else whole_head(teacher_bias),
        denominator=denominator,
        **settings,
    )
