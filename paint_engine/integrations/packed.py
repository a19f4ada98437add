"""`paint_loss` of packed batches without padding, as in verl and similar trainers.

A packed batch is one row of `input_ids` (1, total), `position_ids` that restart with each sequence,
and `cu_seqlens` over prompt and response. The loss takes only the rows of the responses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor
from torch.nn.functional import pad

from paint_engine.integrations.heads import whole_head
from paint_kernels import PaintLossOutput, paint_loss

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class PackedStates(NamedTuple):
    """One model's final hidden states over B packed sequences, total tokens in all.

    cu_seqlens: the bounds of prompt and response together. response_mask: True on the tokens of
    the loss, never on the first of a sequence.
    """

    hidden_states: Float[Tensor, "total H"]
    cu_seqlens: Int[Tensor, " B+1"]
    response_mask: Bool[Tensor, " total"]


def packed_paint_loss(
    student: PackedStates,
    teacher: PackedStates,
    student_head: Float[Tensor, "V H"],
    teacher_head: Float[Tensor, "V H_T"] | None = None,
    *,
    denominator: float | Tensor | None = None,
    **loss_settings: Any,
) -> PaintLossOutput:
    """Computes `paint_loss` of one packed micro-batch: the same responses after the prompts of each
    side.

    teacher_head: None if it is the student's. Heads sharded by FSDP2 are gathered.
    denominator: the rollouts of the whole step, over all micro-batches and ranks, divided by the
    number of ranks (tokens, with reduction="token_mean"); None is this micro-batch's own count.
    loss_settings: further keyword arguments of `paint_loss`.

    Call backward on each micro-batch's loss and do not divide by their number. Ranks may hold
    different numbers of rollouts: sum the counts over ranks first.

    Raises ValueError if the responses of the two sides have different lengths.
    """
    student_rows, bounds = completion_rows(student)
    teacher_rows, teacher_bounds = completion_rows(teacher)
    if bounds.tolist() != teacher_bounds.tolist():
        raise ValueError(
            f"the student's responses have {bounds.diff().tolist()} tokens and the teacher's "
            f"{teacher_bounds.diff().tolist()}: both must hold the same responses. Check the masks."
        )
    return paint_loss(
        student_rows,
        teacher_rows,
        whole_head(student_head),
        bounds,
        teacher_lm_head_weight=None if teacher_head is None else whole_head(teacher_head),
        denominator=denominator,
        **loss_settings,
    )


def completion_rows(
    packed: PackedStates,
) -> tuple[Float[Tensor, "N H"], Int[Tensor, " B+1"]]:
    """Returns the N rows that predict tokens of the loss, and the rollouts' bounds in them, on the
    CPU."""
    rows = packed.response_mask.nonzero().squeeze(1) - 1  # the state before a token predicts it
    num_before = pad(packed.response_mask.cumsum(0), (1, 0))  # tokens of the loss before each token
    return packed.hidden_states[rows], num_before[packed.cu_seqlens.long()].int().cpu()


def packed_response_mask(
    attention_mask: Int[Tensor, "B L"], response_mask: Int[Tensor, "B R"]
) -> Bool[Tensor, " total"]:
    """Returns the `response_mask` of `PackedStates` from verl's padded batch: prompts padded on the
    left; responses, the last R columns, padded on the right."""
    num_prompt_columns = attention_mask.shape[1] - response_mask.shape[1]
    return pad(response_mask, (num_prompt_columns, 0))[attention_mask.bool()].bool()
