"""`PaintTrainer` beside a loop over full logits, by Hugging Face's own Trainer."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    TrainingArguments,
)

from paint_engine.integrations.trainer import PaintTrainer
from paint_kernels import reference

NUM_STEPS = 3
NUM_ROLLOUTS = 4
LEARNING_RATE = 0.5
TOLERANCE = 1e-5
"""of the distance that the weights have moved; float32 rounding leaves up to 4e-6"""
RANK_CASES = [("token_mean", True), ("token_mean", False), ("sequence_mean", True)]
"""(reduction, tied) of what two ranks train"""


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
        batch[f"{name}input_ids"] = pad_sequence(ids, batch_first=True, padding_value=744)
        batch[f"{name}labels"] = pad_sequence(labels, batch_first=True, padding_value=-100)
        batch[f"{name}attention_mask"] = pad_sequence(ones, batch_first=True)
    return batch


def make_trainer(
    model: nn.Module,
    output_dir: Path,
    *,
    teacher: nn.Module | None = None,
    reduction: str = "token_mean",
    loss_settings: dict[str, Any] | None = None,
    batch_size: int = 2,
    **options: Any,
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
    return PaintTrainer(
        model=model,
        teacher=teacher,
        loss_settings={"reduction": reduction, **(loss_settings or {})},
        args=TrainingArguments(output_dir=str(output_dir), **(settings | options)),
        train_dataset=make_rows(),
        eval_dataset=make_rows(),
        data_collator=collate,
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


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_training_is_a_loop_over_full_logits(
    make_model, flat_weights, tmp_path, batch_size, tied, reduction
):
    student, teacher = make_model(0, tied=tied), make_model(1, hidden_size=48, tied=tied)
    start, teacher_start = flat_weights(student), flat_weights(teacher)
    options = {"batch_size": batch_size, "reduction": reduction}
    make_trainer(student, tmp_path, teacher=teacher, **options).train()

    by_hand = make_model(0, tied=tied)
    train_by_hand(by_hand, make_model(1, hidden_size=48, tied=tied), reduction)
    assert relative_gap(flat_weights(student), flat_weights(by_hand), start) < TOLERANCE
    assert torch.equal(flat_weights(teacher), teacher_start)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_an_incomplete_last_step_is_a_mean_over_what_it_holds(
    make_model, flat_weights, tmp_path, reduction
):
    """Micro-batches of 3 and 1 rollouts in one step."""
    student, by_hand = make_model(0), make_model(0)
    options = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    trainer = make_trainer(student, tmp_path, teacher=make_model(1), reduction=reduction, **options)
    trainer.train()
    train_by_hand(by_hand, make_model(1), reduction)
    start = flat_weights(make_model(0))
    assert relative_gap(flat_weights(student), flat_weights(by_hand), start) < TOLERANCE


@pytest.mark.parametrize(
    ("reduction", "eval_batch_size"), [("token_mean", 4), ("sequence_mean", 3)]
)
def test_evaluation_weights_batches_as_the_trainer_does(
    make_model, tmp_path, reduction, eval_batch_size
):
    """By rollouts: a mean over tokens is then exact within a batch."""
    student, teacher = make_model(0), make_model(1)
    options = {"reduction": reduction, "per_device_eval_batch_size": eval_batch_size}
    trainer = make_trainer(student, tmp_path, teacher=teacher, **options)
    expected = loss_by_hand(student, teacher, reduction).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_the_heads_run_on_one_position_of_the_student_and_none_of_the_teacher(make_model, tmp_path):
    student, teacher = make_model(0), make_model(1)
    shapes: dict[str, list[tuple[int, ...]]] = {"student": [], "teacher": []}
    for name, model in [("student", student), ("teacher", teacher)]:
        head = model.get_output_embeddings()
        head.register_forward_hook(
            lambda module, args, out, name=name: shapes[name].append(out.shape)
        )
    make_trainer(student, tmp_path, teacher=teacher).train()
    assert shapes["student"] == [(2, 1, 768)] * (2 * NUM_STEPS)
    assert shapes["teacher"] == []


def test_settings_reach_the_loss(make_model, flat_weights, tmp_path):
    trained = []
    for settings in [{}, {"temperature": 2.0, "pointwise_clip": None}]:
        student = make_model(0)
        make_trainer(student, tmp_path, teacher=make_model(1), loss_settings=settings).train()
        trained.append(flat_weights(student))
    assert relative_gap(trained[1], trained[0], flat_weights(make_model(0))) > 0.05


def test_mixed_precision_stays_near_float32(make_model, flat_weights, tmp_path):
    """bfloat16 keeps three digits; a tenth of the distance leaves room for three steps of them."""
    student = make_model(0)
    make_trainer(student, tmp_path, teacher=make_model(1), bf16=True).train()
    by_hand = make_model(0)
    train_by_hand(by_hand, make_model(1))
    gap = relative_gap(flat_weights(student), flat_weights(by_hand), flat_weights(make_model(0)))
    assert 1e-4 < gap < 0.1


def test_the_base_under_lora_is_its_own_teacher(make_model, flat_weights, tmp_path):
    def with_adapters() -> Any:
        base = make_model(0)
        torch.manual_seed(5)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
        return get_peft_model(base, config)

    student, by_hand = with_adapters(), with_adapters()
    start = flat_weights(student)
    make_trainer(student, tmp_path).train()
    train_by_hand(by_hand, make_model(0))

    assert relative_gap(flat_weights(student), flat_weights(by_hand), start) < TOLERANCE
    original = make_model(0).state_dict()
    for name, weight in student.get_base_model().state_dict().items():
        if "lora_" not in name:
            assert torch.equal(weight, original[name.replace(".base_layer", "")]), name


def test_completions_of_different_lengths_are_refused(make_model, tmp_path):
    trainer = make_trainer(make_model(0), tmp_path, teacher=make_model(1))
    batch = collate(make_rows()[:2])
    batch["teacher_labels"][0, -1] = -100
    with pytest.raises(
        ValueError, match=r"\[12, 1\] tokens in the loss and the teacher's \[11, 1\]"
    ):
        trainer.compute_loss(trainer.model, batch)


def other_head(kind: str, shape: dict[str, Any], seed: int) -> Any:
    """A model that caps its logits, scales them or has a bias."""
    torch.manual_seed(seed)
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    common = shape | layers | {"intermediate_size": 32, "pad_token_id": 0}
    if kind == "cap":
        model = Gemma2ForCausalLM(Gemma2Config(**common, final_logit_softcapping=0.5))
    elif kind == "scale":
        model = GraniteForCausalLM(GraniteConfig(**common, logits_scaling=4.0))
    else:
        del common["head_dim"]
        model = PhiForCausalLM(PhiConfig(**common))
        torch.nn.init.normal_(model.lm_head.bias)
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "teachers"), [("cap", "scale"), ("scale", "bias"), ("bias", "cap")]
)
def test_heads_that_cap_scale_and_shift(make_model, flat_weights, tmp_path, kind, teachers):
    shape = make_model(0).config
    shape = {name: getattr(shape, name) for name in ("vocab_size", "hidden_size", "head_dim")}
    student, by_hand = (other_head(kind, shape, 0) for _ in range(2))
    teacher = other_head(teachers, shape, 1)
    start = flat_weights(student)
    make_trainer(student, tmp_path, teacher=teacher).train()
    train_by_hand(by_hand.train(), teacher)
    assert relative_gap(flat_weights(student), flat_weights(by_hand), start) < TOLERANCE


def test_what_the_loss_would_get_wrong_is_refused(make_model, tmp_path):
    with pytest.raises(ValueError, match="asks the models for scales and caps"):
        make_trainer(make_model(0), tmp_path, loss_settings={"logit_softcap": 30.0})
    adapted_head = get_peft_model(make_model(0, tied=False), LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="a head of type Linear"):
        make_trainer(adapted_head, tmp_path)
    with pytest.raises(ValueError, match="Pass a PeftModel or a teacher"):
        make_trainer(make_model(0), tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"denominator": 4}, "'denominator'.*computes the denominator itself"),
        ({"clip": 0.06}, "has 'clip': it takes .*, temperature, divergence, jsd_weight"),
        ({"reduction": "sum"}, "Choose one of sequence_mean, token_mean"),
    ],
)
def test_settings_that_no_trainer_can_use_are_refused(make_model, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(make_model(0), tmp_path, teacher=make_model(1), loss_settings=settings)


def test_two_ranks_train_as_one_process(two_ranks, make_model, flat_weights, tmp_path):
    """This file run as a script by two processes, a rollout a micro-batch, gradients averaged."""
    two_ranks(__file__, tmp_path)

    for reduction, tied in RANK_CASES:
        by_hand = make_model(0, tied=tied)
        start = flat_weights(by_hand)
        train_by_hand(by_hand, make_model(1), reduction)
        for rank in range(2):
            got = torch.load(tmp_path / f"rank-{rank}-{reduction}-{tied}.pt")
            assert relative_gap(got, flat_weights(by_hand), start) < TOLERANCE


def train_one_rank(output_dir: Path) -> None:
    from conftest import (  # pyright: ignore[reportMissingImports]
        end_rank,
        random_model,
        weights_of,
    )

    for reduction, tied in RANK_CASES:
        student, teacher = random_model(0, tied=tied), random_model(1)
        options: dict[str, Any] = {"reduction": reduction, "ddp_backend": "gloo"}
        # Without it the count that Trainer hands over is that of one rank.
        options["average_tokens_across_devices"] = tied
        make_trainer(student, output_dir, teacher=teacher, batch_size=1, **options).train()
        name = f"rank-{os.environ['RANK']}-{reduction}-{tied}.pt"
        torch.save(weights_of(student), output_dir / name)
    end_rank()


if __name__ == "__main__":
    train_one_rank(Path(sys.argv[1]))
