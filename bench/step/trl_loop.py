"""TRL's SDFT trainer on fixed rollouts, with its own loop, batches, forward passes and loss."""

# pyright: reportMissingImports=false
# TRL is optional.

import importlib.util
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
)

from bench.step.cases import teacher_prompt_ids
from bench.step.loops import synchronize
from paint_engine.config.schema import Config
from paint_engine.model.lora import peft_targets
from paint_engine.types import TrainExample

LACKS = ("clip", "selection", "interpolation", "token losses", "entropies")
TEACHER_MARK = "\n\n"
"""TRL's separator between a prompt and its privileged context"""


def reason_against() -> str:
    """Returns why TRL cannot run here; empty if it can."""
    missing = [name for name in ("trl", "datasets") if importlib.util.find_spec(name) is None]
    return f"not installed (pip install {' '.join(missing)})" if missing else ""


class Clock(TrainerCallback):
    """Measures the seconds of each trainer step; `between` runs before each, untimed."""

    def __init__(self, device: torch.device, between: Callable[[], None]) -> None:
        self.device, self.between = device, between
        self.begin, self.seconds = 0.0, []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.between()
        synchronize(self.device)
        self.begin = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        synchronize(self.device)
        self.seconds.append(time.perf_counter() - self.begin)


def trainer_class(rollouts: Sequence[TrainExample]) -> Any:
    """Returns an SDFTTrainer that takes prompts and completions from the rollouts' token ids.

    It keeps the losses and sends no telemetry.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are importing from 'trl.experimental'")
        from trl.experimental.sdft import SDFTTrainer

    class FixedRollouts(SDFTTrainer):
        micro_losses: list[torch.Tensor]

        def _tokenize_prompts(self, prompts: list[str]) -> list[list[int]]:
            found = []
            for prompt in prompts:
                item = rollouts[int(prompt.partition(TEACHER_MARK)[0])]
                of_teacher = TEACHER_MARK in prompt
                ids = teacher_prompt_ids(item) if of_teacher else item.rollout.prompt_ids
                found.append(list(ids))
            return found

        def _generate(self, prompt_ids: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
            assert prompt_ids == [list(p.rollout.prompt_ids) for p in rollouts]
            return prompt_ids, [list(p.rollout.completion_ids) for p in rollouts]

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any) -> Any:
            loss = super().training_step(model, inputs, num_items_in_batch)
            self.micro_losses.append(loss.detach())
            return loss

        def _send_telemetry(self) -> None:
            pass

    return FixedRollouts


def rows_a_batch(num_rollouts: int, most: int) -> int:
    """Returns the largest number of rows up to `most` that divides `num_rollouts`.

    TRL's batches all have one size.
    """
    return max(rows for rows in range(1, most + 1) if num_rollouts % rows == 0)


class TrlLoop:
    """One training run with `SDFTTrainer`.

    Base, LoRA, optimizer and temperature follow our configuration. The teacher is the base, and the
    loss is the forward KL over the full logits.

    most_rows: largest number of rows per forward pass.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: Config,
        rollouts: Sequence[TrainExample],
        most_rows: int,
        directory: Path,
    ) -> None:
        self.base, self.tokenizer, self.config = base, tokenizer, config
        self.rollouts, self.directory = list(rollouts), directory
        self.rows = rows_a_batch(len(rollouts), most_rows)
        self.losses: list[float] = []

    def settings(self, number: int) -> Any:
        from trl.experimental.sdft import SDFTConfig

        optim, on_gpu = self.config.optim, self.base.device.type == "cuda"
        return SDFTConfig(
            output_dir=str(self.directory),
            max_steps=number,
            per_device_train_batch_size=self.rows,
            gradient_accumulation_steps=len(self.rollouts) // self.rows,
            num_generations=1,
            shuffle_dataset=False,
            max_prompt_length=None,
            max_completion_length=self.config.rollout.max_new_tokens,
            temperature=self.config.objective.temperature,
            distillation_mode="full_logits",
            distillation_alpha=0.0,
            distillation_is_clip=None,
            teacher_model_kind="base",
            learning_rate=optim.learning_rate,
            lr_scheduler_type="constant",
            adam_beta1=optim.beta1,
            adam_beta2=optim.beta2,
            adam_epsilon=optim.eps,
            weight_decay=optim.weight_decay,
            max_grad_norm=optim.max_grad_norm,
            gradient_checkpointing=self.config.parallel.activation_checkpointing,
            bf16=on_gpu,
            use_cpu=not on_gpu,
            dataloader_pin_memory=on_gpu,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )

    def steps(self, number: int, between: Callable[[], None]) -> list[float]:
        """Trains for `number` steps. The trainer runs only once: a second call fails."""
        assert not self.losses, "the trainer has already run"
        lora = self.config.lora
        clock = Clock(self.base.device, between)
        trainer = trainer_class(self.rollouts)(
            model=self.base,
            args=self.settings(number),
            train_dataset=[
                {"prompt": str(i), "privileged_context": ""} for i in range(len(self.rollouts))
            ],
            processing_class=self.tokenizer,
            callbacks=[clock],
            peft_config=LoraConfig(
                r=lora.rank,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                target_modules=peft_targets(self.base, lora.target_modules).names,
                task_type="CAUSAL_LM",
            ),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.micro_losses = []
        trainer.train()
        count = len(self.rollouts) // self.rows
        micro = [loss.item() for loss in trainer.micro_losses]
        self.losses = [sum(micro[i : i + count]) for i in range(0, len(micro), count)]
        return clock.seconds
