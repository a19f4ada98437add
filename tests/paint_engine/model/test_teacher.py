"""The fixed teacher: the base bit for bit, whatever was trained; the student is left alone."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from paint_engine.config.sections import LoraSection, ModelSection
from paint_engine.model.forward import causal_lm, hidden_states, lm_head_weight
from paint_engine.model.load import load_base
from paint_engine.model.lora import add_lora
from paint_engine.model.packing import build_batch
from paint_engine.model.teachers import FixedTeacher
from paint_engine.types import TrainExample


def _states(model: nn.Module, items: list[TrainExample]) -> Tensor:
    return hidden_states(model, build_batch(items).teacher, attention="padded")


def _requires_grad(model: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters()}


def _adapters_off(model: nn.Module) -> set[bool]:
    return {m._disable_adapters for m in model.modules() if isinstance(m, BaseTunerLayer)}


def test_scoring_is_the_base_bit_for_bit_though_the_adapters_are_not_zero(
    base: PreTrainedModel, ragged: list[TrainExample]
) -> None:
    with torch.no_grad():
        expected = _states(base, ragged)
    model = add_lora(base, LoraSection(rank=4, alpha=8), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    with torch.no_grad():
        student = _states(model, ragged)
    with FixedTeacher(model).scoring() as scorer:
        teacher = _states(scorer, ragged)
    assert scorer is model
    assert torch.equal(teacher, expected)
    assert (student - expected).norm() > 0.1 * expected.norm()
    with torch.no_grad():
        assert torch.equal(_states(model, ragged), student)


def test_the_copy_of_a_model_that_trains_in_bfloat16_is_the_bfloat16_base_bit_for_bit(
    model_dir: Path, ragged: list[TrainExample]
) -> None:
    """Rotary frequencies are float32 in both: rounded, they would turn late positions elsewhere."""
    section = ModelSection(name_or_path=str(model_dir), dtype="bfloat16")
    trained = load_base(section, torch.device("cpu"), trains_base=True)
    assert {weight.dtype for weight in trained.parameters()} == {torch.float32}
    with FixedTeacher(trained).scoring() as scorer:
        copied = _states(scorer, ragged)
    assert scorer is not trained
    assert {weight.dtype for weight in scorer.parameters()} == {torch.bfloat16}
    assert not any(weight.requires_grad for weight in scorer.parameters())
    assert lm_head_weight(scorer) is causal_lm(scorer).get_input_embeddings().weight
    with torch.no_grad():
        base = _states(load_base(section, torch.device("cpu")), ragged)
    assert torch.equal(copied, base)


def test_scoring_takes_no_gradients_and_changes_no_requires_grad(
    lora_model: PeftModel, ragged: list[TrainExample]
) -> None:
    before = _requires_grad(lora_model)
    assert True in before.values() and False in before.values()
    teacher = FixedTeacher(lora_model)
    with teacher.scoring() as scorer:
        assert _requires_grad(lora_model) == before
        assert _adapters_off(lora_model) == {True}
        assert not _states(scorer, ragged).requires_grad
    assert _requires_grad(lora_model) == before
    assert _adapters_off(lora_model) == {False}
    assert _states(lora_model, ragged).requires_grad


def test_scoring_between_two_passes_leaves_the_students_gradients_alone(
    lora_model: PeftModel, ragged: list[TrainExample]
) -> None:
    def gradients(with_teacher: bool) -> list[Tensor]:
        lora_model.zero_grad()
        loss = _states(lora_model, ragged).square().sum()
        if with_teacher:
            with FixedTeacher(lora_model).scoring() as scorer:
                _states(scorer, ragged)
        loss.backward()
        return [p.grad.clone() for p in lora_model.parameters() if p.grad is not None]

    for expected, actual in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(actual, expected)


def test_an_error_inside_restores_the_adapters(lora_model: PeftModel) -> None:
    teacher = FixedTeacher(lora_model)
    with pytest.raises(KeyError), teacher.scoring():
        raise KeyError
    assert _adapters_off(lora_model) == {False}
    assert torch.is_grad_enabled()
    with teacher.scoring():
        assert _adapters_off(lora_model) == {True}


def test_a_context_inside_another_is_refused_and_the_outer_one_continues(
    lora_model: PeftModel,
) -> None:
    teacher = FixedTeacher(lora_model)
    with teacher.scoring():
        with pytest.raises(AssertionError, match="inside another"), teacher.scoring():
            pass
        assert _adapters_off(lora_model) == {True}
    assert _adapters_off(lora_model) == {False}


def test_without_adapters_the_teacher_is_a_copy_that_does_not_move(
    base: PreTrainedModel, ragged: list[TrainExample]
) -> None:
    model = add_lora(base, LoraSection(enabled=False), seed=0)
    with torch.no_grad():
        expected = _states(model, ragged)
    teacher = FixedTeacher(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _states(model, ragged).square().mean().backward()
    optimizer.step()
    with teacher.scoring() as scorer:
        assert scorer is not model
        assert not any(p.requires_grad for p in scorer.parameters())
        assert torch.equal(_states(scorer, ragged), expected)
    with torch.no_grad():
        assert not torch.equal(_states(model, ragged), expected)
    shared = {p.data_ptr() for p in scorer.parameters()} & {p.data_ptr() for p in base.parameters()}
    assert not shared
    # The copy keeps the tie between embeddings and head.
    copied = causal_lm(scorer)
    assert lm_head_weight(copied) is copied.get_input_embeddings().weight


@pytest.mark.parametrize("training", [True, False])
def test_dropout_never_reaches_the_teacher(
    training: bool, base: PreTrainedModel, ragged: list[TrainExample]
) -> None:
    with torch.no_grad():
        expected = _states(base, ragged)
    model = add_lora(base, LoraSection(rank=4, alpha=8, dropout=0.5), seed=0)
    for layer in base.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train(training)
    with FixedTeacher(model).scoring() as scorer:
        assert torch.equal(_states(scorer, ragged), expected)
    assert {module.training for module in model.modules()} == {training}
