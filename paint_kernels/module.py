"""`PaintLoss`: the loss as a module, for packed or padded hidden states."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import torch
from torch import Tensor, nn

from paint_kernels._settings import LossOptions, LossSettings, lists_options
from paint_kernels._types import PaintLossOutput
from paint_kernels.functional import paint_loss

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class PaintLoss(nn.Module):
    """`paint_loss` as a module without parameters.

    Args:
        vocab_size, reduction, backend: as in `paint_loss`.
        options: the settings of the loss, described in `LossSettings`.

    Raises:
        ValueError: for a setting out of its range, when the module is built.
    """

    @lists_options
    def __init__(
        self,
        *,
        vocab_size: int | None = None,
        reduction: str = "sequence_mean",
        backend: str = "auto",
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__()
        self.vocab_size, self.reduction = vocab_size, reduction
        self.settings = LossSettings(backend=backend, **options)

    def forward(
        self,
        student_hidden_states: Float[Tensor, "*tokens H"],
        teacher_hidden_states: Float[Tensor, "*tokens H_T"],
        lm_head_weight: Float[Tensor, "V H"],
        cu_seqlens: Int[Tensor, " B+1"] | None = None,
        *,
        loss_mask: Bool[Tensor, "B T"] | None = None,
        teacher_lm_head_weight: Float[Tensor, "V H_T"] | None = None,
        denominator: float | Tensor | None = None,
    ) -> PaintLossOutput:
        """Computes the loss of packed or of padded hidden states.

        Args:
            student_hidden_states: (N, H) with `cu_seqlens`, or (B, T, H) with `loss_mask`.
            teacher_hidden_states: (N, H_T) or (B, T, H_T), likewise; constant.
            lm_head_weight: (V, H).
            cu_seqlens: (B+1,), the bounds of packed rollouts.
            loss_mask: (B, T) bool, True at the positions to keep, whatever their tokens. The kept
                positions, rollout after rollout, are the N rows of the result. On a GPU the host
                waits for their number.
            teacher_lm_head_weight, denominator: as in `paint_loss`.

        Returns:
            PaintLossOutput.

        Raises:
            ValueError: as `paint_loss`, and without exactly one of `cu_seqlens` and `loss_mask`.
        """
        if (cu_seqlens is None) == (loss_mask is None):
            raise ValueError(
                "PaintLoss needs cu_seqlens, with packed (N, H) hidden states, or loss_mask, "
                f"with padded (B, T, H) ones: got {'neither' if loss_mask is None else 'both'}."
            )
        if loss_mask is not None:
            student_hidden_states, cu_seqlens = pack(
                "student_hidden_states", student_hidden_states, loss_mask
            )
            teacher_hidden_states, _ = pack(
                "teacher_hidden_states", teacher_hidden_states, loss_mask
            )
        assert cu_seqlens is not None
        return paint_loss(
            student_hidden_states,
            teacher_hidden_states,
            lm_head_weight,
            cu_seqlens,
            teacher_lm_head_weight=teacher_lm_head_weight,
            vocab_size=self.vocab_size,
            reduction=self.reduction,
            denominator=denominator,
            **self.settings.keywords(),
        )

    def extra_repr(self) -> str:
        kept = {"vocab_size": self.vocab_size, "reduction": self.reduction}
        kept = self.settings.keywords() | kept
        return ", ".join(f"{name}={value!r}" for name, value in kept.items())


def pack(
    name: str, hidden_states: Float[Tensor, "B T H"], loss_mask: Bool[Tensor, "B T"]
) -> tuple[Float[Tensor, "N H"], Int[Tensor, " B+1"]]:
    """Returns the kept positions, rollout after rollout, and their bounds."""
    if loss_mask.dtype != torch.bool or hidden_states.shape[:-1] != loss_mask.shape:
        raise ValueError(
            f"loss_mask is {loss_mask.dtype} of shape {tuple(loss_mask.shape)}, {name} has shape "
            f"{tuple(hidden_states.shape)}: they must be bool (B, T) and (B, T, H), True on kept "
            "positions."
        )
    # Indexing by a mask waits for the number of rows anyway, and with bounds on the host the loss
    # knows where rollouts end.
    lengths = loss_mask.sum(dim=1).cpu()
    cu_seqlens = nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    return hidden_states[loss_mask], cu_seqlens
