"""Hugging Face's `Trainer` with `paint_loss`: a student, and a teacher with a prompt of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from paint_engine.integrations.heads import head_settings
from paint_engine.integrations.padded import padded_paint_loss, resolve_loss_settings

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


def predicts_completion(labels: Int[Tensor, "B T"]) -> Bool[Tensor, "B T-1"]:
    """Returns True where the hidden state predicts a completion token: state i predicts the label
    at i + 1."""
    return labels[:, 1:] != -100


def count_step(
    trainer: Trainer, micro_batches: list[Any], reduction: str, device: torch.device
) -> Tensor:
    """Returns the denominator of the losses of one step's micro-batches: rollouts or tokens of the
    step over all ranks, divided by the number of ranks, since data parallelism averages their
    gradients."""
    masks = [predicts_completion(batch["labels"]) for batch in micro_batches]
    if reduction == "sequence_mean":
        masks = [mask.any(1) for mask in masks]
    count = sum(int(mask.sum()) for mask in masks)
    counts: Any = trainer.accelerator.gather(torch.tensor([count], device=device))
    return counts.sum() / trainer.accelerator.num_processes


def student_states(
    model: Any, input_ids: Int[Tensor, "B T"], attention_mask: Int[Tensor, "B T"]
) -> Float[Tensor, "B T H"]:
    """Computes the final hidden states by the wrapped model's own forward.

    DistributedDataParallel reduces gradients only if its forward ran, so the base model cannot be
    called past it. One position is projected, since transformers computes one logit or more.
    """
    outputs = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        use_cache=False,
        output_hidden_states=True,
        logits_to_keep=1,
    )
    return outputs.hidden_states[-1]


class PaintTrainer(Trainer):
    """`transformers.Trainer` whose loss is `paint_loss`.

    Batches hold `input_ids`, `attention_mask` and `labels` (B, T), which are -100 outside the
    completion. They also hold `teacher_input_ids`, `teacher_attention_mask` and `teacher_labels`
    (B, S), with the same completions after the teacher's prompt. Set `remove_unused_columns=False`
    in the arguments, or the teacher's columns are dropped.

    teacher: a causal language model with the student's vocabulary; it is frozen. If it is None, the
    teacher is the student's own base: the model must then be a PeftModel, and its adapters are off
    during the teacher's pass. (Under FSDP pass a copy of the base: `disable_adapter` toggles
    requires_grad, which FSDP does not support.)
    loss_settings: keyword arguments of `paint_loss`, such as {"divergence": "jsd"}. `reduction` is
    "sequence_mean" (the default: the mean over the rollouts of the step) or "token_mean". Both are
    exact over micro-batches and ranks.

    Raises ValueError if the logits of a model are not made of its hidden states and its head alone,
    if there is neither a teacher nor an adapter, or if a setting is unknown.
    """

    # The denominator counts the whole step: do not divide by the number of micro-batches again.
    loss_is_scaled_for_ga = True
    model: Any
    teacher: Any

    def __init__(
        self,
        *args: Any,
        teacher: PreTrainedModel | None = None,
        loss_settings: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.loss_settings = resolve_loss_settings(loss_settings)
        super().__init__(*args, **kwargs)
        self.loss_settings |= head_settings(self.model, "student")
        self.teacher = teacher
        if teacher is not None:
            self.loss_settings |= head_settings(teacher, "teacher")
            self.teacher.requires_grad_(False).eval().to(self.args.device)
        elif not hasattr(self.model, "disable_adapter"):  # peft need not be installed
            raise ValueError(
                f"teacher is None and the model is a {type(self.model).__name__}: without a "
                "teacher the model's own base teaches, adapters off. Pass a PeftModel or a teacher."
            )

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
        student = student_states(model, inputs["input_ids"], inputs["attention_mask"])
        teacher, teacher_head = self.teacher_states(
            inputs["teacher_input_ids"], inputs["teacher_attention_mask"]
        )
        head = self.model.get_output_embeddings()
        # Trainer enables autocast only inside the model.
        with self.accelerator.autocast():
            output = padded_paint_loss(
                student[:, :-1],
                predicts_completion(inputs["labels"]),
                head.weight,
                teacher[:, :-1],
                predicts_completion(inputs["teacher_labels"]),
                None if teacher_head is None else teacher_head.weight,
                student_bias=head.bias,
                teacher_bias=None if teacher_head is None else teacher_head.bias,
                # In evaluation Trainer weights micro-batches itself.
                denominator=num_items_in_batch if self.model.training else None,
                **self.loss_settings,
            )
        return (output.loss, {}) if return_outputs else output.loss

    @torch.no_grad()
    def teacher_states(
        self, input_ids: Int[Tensor, "B S"], attention_mask: Int[Tensor, "B S"]
    ) -> tuple[Float[Tensor, "B S H_T"], nn.Linear | None]:
        """Returns the teacher's final hidden states, and its head if it is not the student's."""
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        with self.accelerator.autocast():
            if self.teacher is not None:
                outputs = self.teacher.base_model(**batch)
                return outputs.last_hidden_state, self.teacher.get_output_embeddings()
            with self.model.disable_adapter():
                outputs = self.model.get_base_model().base_model(**batch)
        return outputs.last_hidden_state, None
