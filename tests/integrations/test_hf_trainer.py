"""The section on Hugging Face's Trainer in docs/integrations.md, run with the real Trainer."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import TrainingArguments

from paint_kernels import reference

NUM_STEPS = 3
NUM_ROLLOUTS = 4
LEARNING_RATE = 0.5
TOLERANCE = 1e-5
"""of the distance that the weights have moved; float32 rounding leaves up to 4e-6"""


def make_rows() -> list[dict[str, Tensor]]:
    """Rollouts of 1 to 19 tokens; the teacher's prompts are longer than the student's."""
    generator = torch.Generator().manual_seed(3)

    def draw(length: int) -> Tensor:
        return torch.randint(0, 760, (length,), generator=generator)

    rows = []
    for prompt, longer, completion in [(3, 5, 12), (6, 9, 1), (2, 8, 19), (4, 5, 7)]:
        ids = draw(completion)
        row = {}
        for name, length in [("", prompt), ("teacher_", longer)]:
            row[f"{name}input_ids"] = torch.cat([draw(length), ids])
            row[f"{name}labels"] = torch.cat([torch.full((length,), -100), ids])
        rows.append(row)
    return rows


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    batch = {}
    for name in ("", "teacher_"):
        ids = [row[f"{name}input_ids"] for row in rows]
        labels = [row[f"{name}labels"] for row in rows]
        ones = [torch.ones_like(row) for row in ids]
        batch[f"{name}input_ids"] = pad_sequence(ids, batch_first=True, padding_value=763)
        batch[f"{name}labels"] = pad_sequence(labels, batch_first=True, padding_value=-100)
        batch[f"{name}attention_mask"] = pad_sequence(ones, batch_first=True)
    return batch


def make_trainer(
    trainer_class: Any, model: nn.Module, output_dir: Path, *, batch_size: int = 2, **options: Any
) -> Any:
    """Every step sees all rollouts, so that the order in which they are drawn does not matter."""
    num_accumulated = NUM_ROLLOUTS // (batch_size * int(os.environ.get("WORLD_SIZE", "1")))
    settings: dict[str, Any] = {
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": 3,
        "gradient_accumulation_steps": num_accumulated,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
    }
    teacher = {"teacher": options.pop("teacher")} if "teacher" in options else {}
    return trainer_class(
        model=model,
        args=TrainingArguments(output_dir=str(output_dir), **(settings | options)),
        train_dataset=make_rows(),
        eval_dataset=make_rows(),
        data_collator=collate,
        **teacher,
    )


def loss_by_hand(student: nn.Module, teacher: nn.Module, reduction: str = "token_mean") -> Tensor:
    """Of all rollouts, one by one, from full logits."""
    losses = []
    for row in make_rows():
        logits = {}
        for model, name in [(student, ""), (teacher, "teacher_")]:
            of_all = model(row[f"{name}input_ids"][None]).logits[0, :-1]
            logits[name] = of_all[row[f"{name}labels"][1:] != -100]
        bounds = torch.tensor([0, len(logits[""])])
        output = reference.paint_loss_from_logits(
            logits[""], logits["teacher_"], bounds, reduction="none"
        )
        losses.append(output.loss)
    if reduction == "token_mean":
        return torch.cat(losses).mean()
    return torch.stack([of_rollout.mean() for of_rollout in losses]).mean()


def train_by_hand(student: nn.Module, teacher: nn.Module, reduction: str = "token_mean") -> None:
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=LEARNING_RATE)
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        loss_by_hand(student, teacher, reduction).backward()
        optimizer.step()


def relative_gap(got: Tensor, expected: Tensor, start: Tensor) -> float:
    """|got - expected| / |expected - start|, and a check that there is a distance at all."""
    moved = (expected - start).norm()
    assert moved > 1e-3 * start.norm()
    return ((got - expected).norm() / moved).item()


@pytest.fixture
def docs(docs_code: Callable[[str], SimpleNamespace]) -> SimpleNamespace:
    return docs_code("Hugging Face Trainer")


@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_training_is_a_loop_over_full_logits(
    docs, make_model, flat_weights, tmp_path, batch_size, tied
):
    student, teacher = make_model(0, tied=tied), make_model(1, hidden_size=48, tied=tied)
    start, teacher_start = flat_weights(student), flat_weights(teacher)
    trainer = make_trainer(
        docs.PaintTrainer, student, tmp_path, batch_size=batch_size, teacher=teacher
    )
    trainer.train()

    by_hand = make_model(0, tied=tied)
    train_by_hand(by_hand, make_model(1, hidden_size=48, tied=tied))
    assert relative_gap(flat_weights(student), flat_weights(by_hand), start) < TOLERANCE
    assert torch.equal(flat_weights(teacher), teacher_start)


def test_evaluation_weights_batches_as_the_trainer_does(docs, make_model, tmp_path):
    student, teacher = make_model(0), make_model(1)
    trainer = make_trainer(
        docs.PaintTrainer, student, tmp_path, teacher=teacher, per_device_eval_batch_size=4
    )
    expected = loss_by_hand(student, teacher).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_the_heads_run_on_one_position_of_the_student_and_none_of_the_teacher(
    docs, make_model, tmp_path
):
    student, teacher = make_model(0), make_model(1)
    shapes: dict[str, list[tuple[int, ...]]] = {"student": [], "teacher": []}
    for name, model in [("student", student), ("teacher", teacher)]:
        head = model.get_output_embeddings()
        head.register_forward_hook(
            lambda module, args, out, name=name: shapes[name].append(out.shape)
        )
    make_trainer(docs.PaintTrainer, student, tmp_path, teacher=teacher).train()
    assert shapes["student"] == [(2, 1, 768)] * (2 * NUM_STEPS)
    assert shapes["teacher"] == []


def test_the_mean_over_rollouts_is_two_settings(docs, make_model, flat_weights, tmp_path):
    student, by_hand = make_model(0), make_model(0)
    start = flat_weights(student)
    trainer = make_trainer(docs.PaintTrainer, student, tmp_path, teacher=make_model(1))
    num_rollouts = (
        trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
    )
    trainer.loss_settings = {"reduction": "sequence_mean", "denominator": num_rollouts}
    trainer.train()
    train_by_hand(by_hand, make_model(1), "sequence_mean")
    assert relative_gap(flat_weights(student), flat_weights(by_hand), start) < TOLERANCE


def test_settings_reach_the_loss(docs, make_model, flat_weights, tmp_path):
    trained = []
    for settings in [{}, {"temperature": 2.0, "pointwise_clip": None}]:
        student = make_model(0)
        trainer = make_trainer(docs.PaintTrainer, student, tmp_path, teacher=make_model(1))
        trainer.loss_settings = settings
        trainer.train()
        trained.append(flat_weights(student))
    assert relative_gap(trained[1], trained[0], flat_weights(make_model(0))) > 0.05


def test_mixed_precision_stays_near_float32(docs, make_model, flat_weights, tmp_path):
    """bfloat16 keeps three digits; a tenth of the distance leaves room for three steps of them."""
    student = make_model(0)
    trainer = make_trainer(docs.PaintTrainer, student, tmp_path, teacher=make_model(1), bf16=True)
    trainer.train()
    by_hand = make_model(0)
    train_by_hand(by_hand, make_model(1))
    gap = relative_gap(flat_weights(student), flat_weights(by_hand), flat_weights(make_model(0)))
    assert 1e-4 < gap < 0.1


def test_the_base_under_lora_is_its_own_teacher(docs, make_model, flat_weights, tmp_path):
    def with_adapters() -> Any:
        base = make_model(0)
        torch.manual_seed(5)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
        return get_peft_model(base, config)

    student, by_hand = with_adapters(), with_adapters()
    start = flat_weights(student)
    make_trainer(docs.PaintLoraTrainer, student, tmp_path).train()
    train_by_hand(by_hand, make_model(0))

    assert relative_gap(flat_weights(student), flat_weights(by_hand), start) < TOLERANCE
    original = make_model(0).state_dict()
    for name, weight in student.get_base_model().state_dict().items():
        if "lora_" not in name:
            assert torch.equal(weight, original[name.replace(".base_layer", "")]), name


def test_two_ranks_train_as_one_process(two_ranks, make_model, flat_weights, tmp_path):
    """This file run as a script by two processes, a rollout a micro-batch, gradients averaged."""
    two_ranks(__file__, tmp_path)

    for tied in (True, False):
        by_hand = make_model(0, tied=tied)
        start = flat_weights(by_hand)
        train_by_hand(by_hand, make_model(1))
        for rank in range(2):
            got = torch.load(tmp_path / f"rank-{rank}-{tied}.pt")
            assert relative_gap(got, flat_weights(by_hand), start) < TOLERANCE


def train_one_rank(output_dir: Path) -> None:
    from conftest import (  # pyright: ignore[reportMissingImports]
        code_of,
        end_rank,
        random_model,
        weights_of,
    )

    trainer_class = code_of("Hugging Face Trainer").PaintTrainer
    for tied in (True, False):
        student, teacher = random_model(0, tied=tied), random_model(1)
        options: dict[str, Any] = {"teacher": teacher, "ddp_backend": "gloo"}
        make_trainer(trainer_class, student, output_dir, batch_size=1, **options).train()
        torch.save(weights_of(student), output_dir / f"rank-{os.environ['RANK']}-{tied}.pt")
    end_rank()


if __name__ == "__main__":
    train_one_rank(Path(sys.argv[1]))
