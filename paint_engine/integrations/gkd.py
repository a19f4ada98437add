"""TRL's `GKDTrainer`, of `trl.experimental`, with `paint_loss`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from paint_engine.integrations.heads import head_settings
from paint_engine.integrations.padded import padded_paint_loss, resolve_loss_settings
from paint_engine.integrations.trainer import count_step, predicts_completion, student_states

if importlib.util.find_spec("trl") is None:
    raise ImportError("paint_engine.integrations.gkd needs TRL: pip install 'trl>=1.16'")

from trl.experimental.gkd import GKDTrainer


class PaintGKDTrainer(GKDTrainer):
    """`trl.experimental.gkd.GKDTrainer` whose loss is `paint_loss`.

    TRL's own loss holds the (B, T, V) logits of both models and two or three more tensors of that
    size. Sampling, collation and the teacher stay TRL's.

    loss_settings: keyword arguments of `paint_loss`, such as {"divergence": "jsd"}. `reduction` is
    "sequence_mean" (the default: the mean over the rollouts of the step) or "token_mean", which
    divides by the tokens of the data set's completions, as TRL's loss does. With `lmbda` above 0,
    the student samples other completions, and the loss is then a mean only up to a factor.
    `args.temperature` is that of sampling only, and `args.beta` has no effect.

    Raises ValueError for a model whose logits are not hidden states times head, and for an unknown
    setting.
    """

    # The denominator counts the whole step: do not divide by the number of micro-batches again.
    loss_is_scaled_for_ga = True
    model: Any

    def __init__(
        self, *args: Any, loss_settings: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        self.loss_settings = resolve_loss_settings(loss_settings)
        super().__init__(*args, **kwargs)
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        self.loss_settings |= head_settings(self.model, "student")
        self.loss_settings |= head_settings(teacher, "teacher")

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, count_step(self, batches, self.loss_settings["reduction"], device)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        student = student_states(model, ids, mask)
        teacher_model = self.accelerator.unwrap_model(self.teacher_model).eval()
        kept = predicts_completion(inputs["labels"])
        head, teacher_head = (one.get_output_embeddings() for one in (self.model, teacher_model))
        # Trainer enables autocast only inside the model.
        with self.accelerator.autocast():
            with torch.no_grad():
                teacher = teacher_model.base_model(ids, attention_mask=mask, use_cache=False)
            output = padded_paint_loss(
                student[:, :-1],
                kept,
                head.weight,
                teacher.last_hidden_state[:, :-1],
                kept,
                teacher_head.weight,
                student_bias=head.bias,
                teacher_bias=teacher_head.bias,
                # In evaluation Trainer weights micro-batches itself.
                denominator=num_items_in_batch if self.model.training else None,
                **self.loss_settings,
            )
        return (output.loss, {}) if return_outputs else output.loss
