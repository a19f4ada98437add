"""Fused output projection and distillation losses of PAINT: tensors in, tensors out.

`paint_loss` replaces the two (N, V) logit tensors, the softmaxes and the divergence of a
distillation loss by one differentiable call whose memory does not grow with N x V:

    output = paint_loss(student_hidden, teacher_hidden, model.lm_head.weight, cu_seqlens)
    output.loss.backward()

`reference` and `reference_topk` specify the same functions in plain PyTorch. Nothing here depends
on a configuration or a model library. A process group is used only if the caller gives one.
"""

from paint_kernels import reference, reference_topk
from paint_kernels._half_heads import forget_half_heads
from paint_kernels._settings import LossOptions, LossSettings
from paint_kernels._spinning import follow_load
from paint_kernels._types import PaintLossOutput, TokenLogprobs, TokenStats
from paint_kernels.functional import (
    paint_loss,
    paint_loss_from_logits,
    token_logprobs,
    token_stats,
)
from paint_kernels.module import PaintLoss
from paint_kernels.selection import entropy_ratio, select_top_fraction
from paint_kernels.topk import paint_loss_from_topk

__all__ = [
    "LossOptions",
    "LossSettings",
    "PaintLoss",
    "PaintLossOutput",
    "TokenLogprobs",
    "TokenStats",
    "entropy_ratio",
    "follow_load",
    "forget_half_heads",
    "paint_loss",
    "paint_loss_from_logits",
    "paint_loss_from_topk",
    "reference",
    "reference_topk",
    "select_top_fraction",
    "token_logprobs",
    "token_stats",
]
