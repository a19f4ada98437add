"""TRL's `DistillationTrainer`, which samples from the student as it trains, with `paint_loss`."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from paint_engine.integrations.heads import head_settings
from paint_engine.integrations.padded import padded_paint_loss, resolve_loss_settings

if importlib.util.find_spec("trl") is None:
    raise ImportError("paint_engine.integrations.trl needs TRL: pip install 'trl>=1.16'")

from trl.trainer.distillation_trainer import DistillationTrainer

if TYPE_CHECKING:
    from jaxtyping import Float, Int

_IMAGE_INPUTS = ("pixel_values", "image_grid_thw", "image_position_ids", "mm_token_type_ids")


class PaintDistillationTrainer(DistillationTrainer):
    """`trl.DistillationTrainer` whose loss is `paint_loss`; sampling and the teacher stay TRL's.

    loss_settings: keyword arguments of `paint_loss`, such as {"divergence": "jsd"}. `reduction` is
    "sequence_mean" (the default: the mean over the rollouts of the step) or "token_mean".
    `temperature` is by default `args.temperature`, which is also that of sampling. `args.beta` has
    no effect; `divergence` and `jsd_weight` select the divergence.

    The hook that is overridden, `_compute_loss`, and the helpers that it calls are private in TRL:
    pin its version.

    Raises ValueError for a model whose logits are not hidden states times head, for an unknown
    setting, and for batches with images.
    """

    teacher_model: Any

    def __init__(
        self, *args: Any, loss_settings: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        resolved = resolve_loss_settings(loss_settings)
        super().__init__(*args, **kwargs)
        self.loss_settings = {
            "temperature": self.temperature,
            **resolved,
            **head_settings(self.model, "student"),
            **head_settings(self.accelerator.unwrap_model(self.teacher_model), "teacher"),
        }

    def _compute_loss(
        self, unwrapped_student: Any, inputs: dict[str, Tensor], num_items_in_batch: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Runs inside the wrapped student's forward, where sharded weights of the root module are
        whole. Returns the loss, the sum of the student's entropies in nats, and the number of
        tokens that it covers."""
        if images := [name for name in _IMAGE_INPUTS if name in inputs]:
            raise ValueError(
                f"the batch has {', '.join(images)}: PaintDistillationTrainer takes only text. "
                "Leave the images out of the data set."
            )
        teacher_model = self.accelerator.unwrap_model(self.teacher_model).eval()
        sequences = (
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].shape[1],
        )
        kept = (inputs["completion_mask"] * inputs.get("tool_mask", 1)).bool()
        head, teacher_head = (
            one.get_output_embeddings() for one in (unwrapped_student, teacher_model)
        )
        # Trainer enables autocast only inside the model.
        with self.accelerator.autocast():
            student = self._get_last_hidden_state(unwrapped_student, *sequences)
            output = padded_paint_loss(
                student,
                kept,
                head.weight,
                self._teacher_states(teacher_model, *sequences),
                kept,
                teacher_head.weight,
                student_bias=head.bias,
                teacher_bias=teacher_head.bias,
                denominator=self._denominator(num_items_in_batch, len(kept)),
                **self.loss_settings,
            )
        return output.loss, output.student_entropy.sum(), kept.sum()

    @torch.no_grad()
    def _teacher_states(
        self,
        teacher_model: Any,
        input_ids: Int[Tensor, "B L"],
        attention_mask: Int[Tensor, "B L"],
        num_completion_columns: int,
    ) -> Float[Tensor, "B T H_T"]:
        """Computes hidden states through the teacher's wrapper, which gathers sharded weights."""
        return self._forward_redirection(
            self.teacher_model,
            teacher_model,
            self._get_last_hidden_state,
            teacher_model,
            input_ids,
            attention_mask,
            num_completion_columns,
        )

    def _denominator(self, num_tokens: Tensor | None, num_rollouts: int) -> Tensor | float | None:
        """Returns the denominator of a micro-batch's loss. `num_tokens` is the number sampled in
        this step by all ranks, divided by the number of ranks, or None in evaluation, where the
        micro-batch's own count is used."""
        if num_tokens is None or self.loss_settings["reduction"] == "token_mean":
            return num_tokens
        # TRL samples for a whole step and splits the rollouts evenly over its micro-batches.
        return float(num_rollouts * self.args.gradient_accumulation_steps)
