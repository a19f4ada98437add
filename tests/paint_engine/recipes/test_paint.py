"""From rollouts to the loss of `paint`, against plain PyTorch on full logits in float64."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from paint_engine.config.command_line import load_config
from paint_engine.config.schema import Config
from paint_engine.config.sections import LoraSection, ModelSection, ObjectiveSection
from paint_engine.model.forward import causal_lm, hidden_states, lm_head_weight
from paint_engine.model.load import load_base
from paint_engine.model.lora import add_lora
from paint_engine.model.packing import build_batch
from paint_engine.model.teachers import FixedTeacher
from paint_engine.recipes import LossInputs, LossOutput, SecondPass, recipe_of
from paint_engine.recipes.paint import Paint
from paint_engine.training.microbatches import plan_microbatches
from paint_engine.training.record import metric_sums
from paint_engine.types import TrainExample

VOCAB_SIZE = 340
# OPSD's forward KL: nothing is clipped and nothing is interpolated.
OPSD = ObjectiveSection(pointwise_clip=None, interpolation_weight=0.0, temperature=1.1)


def engine_loss(
    model: nn.Module,
    items: Sequence[TrainExample],
    section: ObjectiveSection,
    *,
    teacher: FixedTeacher | None = None,
    attention: str = "padded",
    denominator: int | None = None,
) -> LossOutput:
    """One micro-batch as the training step runs it.

    teacher: None = that of the model as it is.
    """
    teacher, batch = teacher or FixedTeacher(model), build_batch(items)
    assert batch.teacher is not None
    with teacher.scoring() as scorer:
        teacher_states = hidden_states(scorer, batch.teacher, attention=attention)
        teacher_head = None if scorer is model else lm_head_weight(scorer)
    per_rollout = section.reduction == "sequence_mean"
    whole = len(items) if per_rollout else len(batch.completion_ids)
    inputs = LossInputs(
        student_hidden_states=hidden_states(model, batch.student, attention=attention),
        lm_head_weight=lm_head_weight(model),
        second_passes=(SecondPass(teacher_states, teacher_head),),
        completion_ids=batch.completion_ids,
        cu_seqlens=batch.cu_seqlens,
        examples=items,
        old_logprobs=None,
        vocab_size=VOCAB_SIZE,
        denominator=whole if denominator is None else denominator,
    )
    return Paint(Config(objective=section)).loss(inputs)


def gradients(model: nn.Module, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def opsd_by_hand(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    items: Sequence[TrainExample],
    temperature: float,
    *,
    reduction: str,
) -> Tensor:
    """KL(teacher, student) from full logits, one sequence at a time, by F.kl_div."""

    def log_p(model: PreTrainedModel, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
        logits = model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0]
        rows = logits[len(prompt) - 1 : -1, :VOCAB_SIZE]
        return F.log_softmax(rows / temperature, dim=-1)

    sums, counts = [], []
    for item in items:
        completion = item.rollout.completion_ids
        assert item.teacher_view is not None
        target = log_p(teacher, item.teacher_view.prompt_ids, completion).detach()
        own = log_p(student, item.rollout.prompt_ids, completion)
        sums.append(F.kl_div(own, target, reduction="sum", log_target=True))
        counts.append(len(completion))
    if reduction == "token_mean":
        return torch.stack(sums).sum() / sum(counts)
    return torch.stack([s / n for s, n in zip(sums, counts, strict=True)]).mean()


@pytest.fixture
def untrained(model_dir: Path) -> PreTrainedModel:
    """The base again, apart from the one that carries the adapters."""
    model = load_base(
        ModelSection(name_or_path=str(model_dir), dtype="float32"), torch.device("cpu")
    )
    nn.Module.to(model, torch.float64)
    return model


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
@pytest.mark.parametrize("attention", ["padded", "packed"])
def test_paint_without_clip_and_interpolation_is_opsds_forward_kl(
    attention: str,
    reduction: str,
    lora_model: PeftModel,
    untrained: PreTrainedModel,
    ragged: list[TrainExample],
    relative_error: Callable[[Tensor, Tensor], float],
) -> None:
    section = OPSD.model_copy(update={"reduction": reduction})
    output = engine_loss(lora_model, ragged, section, attention=attention)
    actual = gradients(lora_model, output.loss)
    student = causal_lm(lora_model)
    expected = opsd_by_hand(student, untrained, ragged, 1.1, reduction=reduction)
    assert output.loss.dtype == torch.float64
    assert expected.item() > 0.01
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-11)
    assert relative_error(actual, gradients(lora_model, expected)) < 1e-10
    # Only adapters are trained.
    assert len(actual) == sum(p.numel() for n, p in lora_model.named_parameters() if "lora_" in n)


def test_full_fine_tuning_has_opsds_gradients_in_every_weight_the_tied_head_included(
    base: PreTrainedModel,
    untrained: PreTrainedModel,
    ragged: list[TrainExample],
    relative_error: Callable[[Tensor, Tensor], float],
) -> None:
    model = add_lora(base, LoraSection(enabled=False), seed=0)
    output = engine_loss(model, ragged, OPSD)
    actual = gradients(model, output.loss)
    expected = opsd_by_hand(base, untrained, ragged, 1.1, reduction="sequence_mean")
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-11)
    assert relative_error(actual, gradients(model, expected)) < 1e-10
    assert len(actual) == sum(p.numel() for p in base.parameters())


def test_the_trained_heads_teacher_keeps_its_own_head(
    base: PreTrainedModel, ragged: list[TrainExample], untrained: PreTrainedModel
) -> None:
    teacher = FixedTeacher(base)
    with torch.no_grad():
        lm_head_weight(base).mul_(1.3)
        loss = engine_loss(base, ragged, OPSD, teacher=teacher).loss
        expected = opsd_by_hand(base, untrained, ragged, 1.1, reduction="sequence_mean")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-11)


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
@pytest.mark.parametrize("clip", [None, 0.06])
def test_micro_batches_add_up_to_the_whole_batch(
    clip: float | None,
    reduction: str,
    lora_model: PeftModel,
    examples: Callable[..., list[TrainExample]],
    relative_error: Callable[[Tensor, Tensor], float],
) -> None:
    items = examples((4, 9, 2, 6, 3), (8, 12, 5, 6, 15), (3, 20, 35, 1, 11), stop=0)
    section = ObjectiveSection.model_validate({"reduction": reduction, "pointwise_clip": clip})
    num_tokens = sum(len(item.rollout.completion_ids) for item in items)
    denominator = len(items) if reduction == "sequence_mean" else num_tokens

    def run(max_tokens: int) -> tuple[Tensor, Counter[str], int]:
        groups = plan_microbatches(items, max_tokens, 1, padded=True)[0]
        sums: Counter[str] = Counter()
        lora_model.zero_grad()
        for group in groups:
            output = engine_loss(lora_model, group, section, denominator=denominator)
            output.loss.backward()
            sums.update(metric_sums(output))
        grads = [p.grad.flatten() for p in lora_model.parameters() if p.grad is not None]
        return torch.cat(grads), sums, len(groups)

    whole, whole_sums, num_whole = run(10_000)
    single, single_sums, num_single = run(1)
    middle, middle_sums, num_middle = run(60)
    assert (num_whole, num_single) == (1, 5)
    assert 1 < num_middle < 5
    for grads, sums in ((single, single_sums), (middle, middle_sums)):
        assert relative_error(grads, whole) < 1e-11
        assert sums.keys() == whole_sums.keys()
        for name, value in whole_sums.items():
            assert sums[name] == pytest.approx(value, rel=1e-11), name


def test_reductions_differ_on_ragged_rollouts(
    lora_model: PeftModel, ragged: list[TrainExample]
) -> None:
    losses = [
        engine_loss(lora_model, ragged, OPSD.model_copy(update={"reduction": name})).loss.item()
        for name in ("sequence_mean", "token_mean")
    ]
    assert abs(losses[0] - losses[1]) > 1e-3


def test_every_setting_of_the_section_reaches_the_loss(
    lora_model: PeftModel, examples: Callable[..., list[TrainExample]]
) -> None:
    items = examples((4, 9), (8, 12), (12, 20))
    default = ObjectiveSection(top_fraction=0.25, interpolation_weight=0.5)
    changes: tuple[dict[str, object], ...] = (
        {"temperature": 0.8},
        {"pointwise_clip": 0.01},
        {"pointwise_clip": None},
        {"top_fraction": 0.5},
        {"interpolation_weight": 0.1},
        {"teacher_top_k": 5},
        {"reduction": "token_mean"},
        # Above the students' entropies, so that it decides the ranking.
        {"entropy_floor": 50.0},
        {"divergence": "reverse_kl"},
        {"divergence": "jsd"},
        {"divergence": "jsd", "jsd_weight": 0.2},
    )
    losses = [
        engine_loss(lora_model, items, default.model_copy(update=change)).loss.item()
        for change in ({}, *changes)
    ]
    for (one, first), (other, second) in combinations(enumerate(losses), 2):
        assert not math.isclose(first, second, rel_tol=1e-9), (one, other)


def test_interpolation_is_ranked_in_each_rollout(
    lora_model: PeftModel, examples: Callable[..., list[TrainExample]]
) -> None:
    items = examples((4, 9, 3), (8, 12, 5), (1, 40, 100))
    output = engine_loss(lora_model, items, ObjectiveSection(top_fraction=0.07))
    counts = [int(part.sum()) for part in output.per_token["selected"].split([1, 40, 100])]
    # ceil(0.07 n) computed exactly: 7 of 100, where floats give 8.
    assert counts == [1, 3, 7]


def test_padded_rows_of_the_head_are_outside_the_distribution(
    base: PreTrainedModel, ragged: list[TrainExample]
) -> None:
    with torch.no_grad():
        before = engine_loss(base, ragged, OPSD)
        lm_head_weight(base)[VOCAB_SIZE:] = 100.0
        after = engine_loss(base, ragged, OPSD)
    assert torch.equal(before.per_token["token_loss"], after.per_token["token_loss"])


def test_metric_sums_are_sums_over_the_tokens(
    lora_model: PeftModel, ragged: list[TrainExample]
) -> None:
    output = engine_loss(lora_model, ragged, ObjectiveSection(temperature=0.5))
    sums = metric_sums(output)
    per_token = output.per_token
    clipped = [mass > 0 for mass in per_token["clipped_mass"].tolist()]
    assert sum(clipped) > 0
    assert sums["clipped_token_share"] == sum(clipped)
    means = ("token_kl", "clipped_mass", "student_entropy", "teacher_entropy")
    assert sums.keys() == {"loss", "clipped_token_share", *means}
    for name in means:
        assert sums[name] == pytest.approx(math.fsum(per_token[name].tolist())), name
    assert sums["loss"] == output.loss.item()


@pytest.mark.parametrize(
    ("options", "has_note"),
    [
        ("", True),
        ("--objective.pointwise_clip none", False),
        ("--objective.divergence reverse_kl", False),
        # The loss of a token has the reward's part, too.
        ("--objective.name grpo_paint", False),
    ],
)
def test_the_report_explains_the_clip_of_the_forward_kl_alone(options: str, has_note: bool) -> None:
    config = load_config(["--preset", "paint-tiny", *options.split()]).config
    assert bool(recipe_of(config).display.kinds_note) is has_note
