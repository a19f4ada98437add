"""`PaintLoss`: the loss as a module, for packed or padded hidden states."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack

from torch import Tensor, nn

from paint_kernels._checks import (
    REDUCTIONS,
    check_choice,
    check_positive,
    check_softcap,
    check_vocab_size,
    local_tensor,
)
from paint_kernels._inputs import mask_rows
from paint_kernels._settings import LossOptions, LossSettings, lists_options
from paint_kernels._types import PaintLossOutput
from paint_kernels.functional import paint_loss

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch.distributed import ProcessGroup


class PaintLoss(nn.Module):
    """`paint_loss` as a module without parameters.

    Args:
        logit_scale, logit_softcap, teacher_logit_scale, teacher_logit_softcap, vocab_size,
            reduction, chunk_rows, vocab_parallel_group, backend: as in `paint_loss`.
        options: the settings of the loss, described in `LossSettings`; the temperature is a number
            here.

    Raises:
        ValueError: for a setting out of its range, when the module is built.
    """

    @lists_options
    def __init__(
        self,
        *,
        logit_scale: float = 1.0,
        logit_softcap: float | None = None,
        teacher_logit_scale: float | None = None,
        teacher_logit_softcap: float | None = None,
        vocab_size: int | None = None,
        reduction: str = "sequence_mean",
        chunk_rows: int | None = None,
        vocab_parallel_group: ProcessGroup | None = None,
        backend: str = "auto",
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__()
        check_choice("reduction", reduction, REDUCTIONS)
        check_positive("logit_scale", logit_scale)
        if teacher_logit_scale is not None:
            check_positive("teacher_logit_scale", teacher_logit_scale)
        check_softcap("logit_softcap", logit_softcap)
        check_softcap("teacher_logit_softcap", teacher_logit_softcap)
        check_vocab_size(vocab_size)
        self.arguments: dict[str, Any] = {
            "logit_scale": logit_scale,
            "logit_softcap": logit_softcap,
            "teacher_logit_scale": teacher_logit_scale,
            "teacher_logit_softcap": teacher_logit_softcap,
            "vocab_size": vocab_size,
            "reduction": reduction,
            "vocab_parallel_group": vocab_parallel_group,
        }
        # Refuses a setting out of its range at once, and a temperature that is no number.
        self.settings = LossSettings(
            backend=backend,
            chunk_rows=chunk_rows,
            **options,  # pyright: ignore[reportArgumentType]
        )

    def forward(
        self,
        student_hidden_states: Float[Tensor, "*tokens H"],
        teacher_hidden_states: Float[Tensor, "*tokens H_T"],
        lm_head_weight: Float[Tensor, "V H"],
        cu_seqlens: Int[Tensor, " B+1"] | None = None,
        *,
        loss_mask: Bool[Tensor, "B T"] | None = None,
        labels: Int[Tensor, "*tokens"] | None = None,
        ignore_index: int = -100,
        token_weights: Float[Tensor, "*tokens"] | None = None,
        temperature: Float[Tensor, "*tokens"] | None = None,
        selected: Bool[Tensor, "*tokens"] | None = None,
        lm_head_bias: Float[Tensor, " V"] | None = None,
        teacher_lm_head_weight: Float[Tensor, "V H_T"] | None = None,
        teacher_lm_head_bias: Float[Tensor, " V"] | None = None,
        denominator: float | Tensor | None = None,
    ) -> PaintLossOutput:
        """Computes the loss of packed or of padded hidden states.

        Args:
            student_hidden_states: (N, H) with `cu_seqlens`, or (B, T, H) with `loss_mask` or
                `labels`.
            teacher_hidden_states: (N, H_T) or (B, T, H_T), likewise; constant.
            lm_head_weight: (V, H).
            cu_seqlens: (B+1,), the bounds of packed rollouts.
            loss_mask: (B, T) bool, True at the positions to keep, whatever their tokens. The kept
                positions, rollout after rollout, are the N rows of the result. On a GPU the host
                waits for their number.
            labels, ignore_index: as in `paint_loss`: like a mask, but the values per token have the
                shape of the labels.
            token_weights, selected: as in `paint_loss`, in the shape of the positions: (N,), or
                (B, T) with `loss_mask` or `labels`.
            temperature: one for each token, in that shape, in place of the module's.
            lm_head_bias, teacher_lm_head_weight, teacher_lm_head_bias, denominator: as in
                `paint_loss`.

        Returns:
            PaintLossOutput.

        Raises:
            ValueError: as `paint_loss`; without bounds, mask and labels; and with a mask beside one
                of the others.
        """
        settings = self.settings.keywords()
        if temperature is None:
            temperature = settings["temperature"]
        per_token: dict[str, Any] = {
            "token_weights": token_weights,
            "temperature": temperature,
            "selected": selected,
        }
        positions = (cu_seqlens, labels)
        if (loss_mask is None) == all(one is None for one in positions):
            raise ValueError(
                "PaintLoss needs cu_seqlens, with packed (N, H) hidden states, or loss_mask or "
                "labels, with padded (B, T, H) ones: got "
                f"{'neither' if loss_mask is None else 'both'}."
            )
        if loss_mask is not None:
            student = local_tensor("student_hidden_states", student_hidden_states)
            teacher = local_tensor("teacher_hidden_states", teacher_hidden_states)
            kept = mask_rows(loss_mask, student.device)
            student_hidden_states = kept.take("student_hidden_states", student)
            teacher_hidden_states = kept.take("teacher_hidden_states", teacher)
            per_token = {name: kept.take(name, values) for name, values in per_token.items()}
            cu_seqlens = kept.cu_seqlens
        return paint_loss(
            student_hidden_states,
            teacher_hidden_states,
            lm_head_weight,
            cu_seqlens,
            labels=labels,
            ignore_index=ignore_index,
            lm_head_bias=lm_head_bias,
            teacher_lm_head_weight=teacher_lm_head_weight,
            teacher_lm_head_bias=teacher_lm_head_bias,
            denominator=denominator,
            **self.arguments,
            **settings | per_token,
        )

    def extra_repr(self) -> str:
        kept = self.settings.keywords() | self.arguments
        return ", ".join(f"{name}={value!r}" for name, value in kept.items())
