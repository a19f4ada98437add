"""The moving teachers: a running mean of the adapters, by hand and by closed form, and the student
itself; neither leaves a trace in the student. At several ranks: test_teacher_ranks.py."""

from collections.abc import Callable

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from paint_engine.config.sections import LoraSection, TeacherSection
from paint_engine.model.forward import hidden_states
from paint_engine.model.lora import add_lora
from paint_engine.model.packing import build_batch
from paint_engine.model.teachers import EmaTeacher, FixedTeacher, LiveTeacher, Teacher, make_teacher
from paint_engine.types import TrainExample


def _states(model: nn.Module, items: list[TrainExample]) -> Tensor:
    return hidden_states(model, build_batch(items).teacher, attention="padded")


def _scored(teacher: Teacher, items: list[TrainExample]) -> Tensor:
    with teacher.scoring() as scorer:
        return _states(scorer, items)


def _adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _fill(model: nn.Module, value: float) -> None:
    for parameter in _adapters(model).values():
        parameter.data.fill_(value)


def _move(model: nn.Module, seed: int) -> None:
    """Stands for an optimizer step: a large one, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in _adapters(model).values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def _copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in _adapters(model).items()}


# ---- the mean ------------------------------------------------------------------------------------


def test_the_mean_of_a_few_steps_by_hand(lora_model: PeftModel) -> None:
    """decay 3/4, from 0: 4, 8, 0 give 1/4 * 4 = 1, 3/4 * 1 + 1/4 * 8 = 2.75, and 3/4 * 2.75."""
    _fill(lora_model, 0.0)
    teacher = EmaTeacher(lora_model, decay=0.75)
    for value, expected in ((4.0, 1.0), (8.0, 2.75), (0.0, 2.0625)):
        _fill(lora_model, value)
        teacher.update()
        assert {mean.unique().item() for mean in teacher.shadow} == {expected}


def test_the_mean_after_n_steps_is_the_closed_form(lora_model: PeftModel) -> None:
    """decay^n x_0 + (1 - decay) sum_i decay^(n-i) x_i, x_0 being what the adapters began with."""
    decay, num_steps = 0.9, 25
    teacher = EmaTeacher(lora_model, decay)
    seen = [_copies(lora_model)]
    for step in range(num_steps):
        _move(lora_model, seed=step)
        teacher.update()
        seen.append(_copies(lora_model))
    for place, name in enumerate(seen[0]):
        mean = decay**num_steps * seen[0][name]
        for i in range(1, num_steps + 1):
            mean += (1 - decay) * decay ** (num_steps - i) * seen[i][name]
        assert teacher.shadow[place].dtype == torch.float32
        error = (teacher.shadow[place].double() - mean).norm() / mean.norm()
        assert error < 4 * torch.finfo(torch.float32).eps, name


def test_adapters_that_stand_still_leave_the_mean_bit_for_bit(lora_model: PeftModel) -> None:
    """Also where decay and 1 - decay, rounded, do not add up to 1."""
    lora_model.float()
    teacher = EmaTeacher(lora_model, decay=0.9999)
    before = [mean.clone() for mean in teacher.shadow]
    for _ in range(200):
        teacher.update()
    assert all(map(torch.equal, teacher.shadow, before))


def test_the_mean_starts_as_the_base(base: PreTrainedModel, ragged: list[TrainExample]) -> None:
    with torch.no_grad():
        expected = _states(base, ragged)
    model = add_lora(base, LoraSection(rank=4, alpha=8), seed=0)
    teacher = EmaTeacher(model, decay=0.5)
    assert torch.equal(_scored(teacher, ragged), expected)
    # Only an update moves it.
    _move(model, seed=0)
    assert torch.equal(_scored(teacher, ragged), expected)
    teacher.update()
    assert not torch.equal(_scored(teacher, ragged), expected)


# ---- scoring with it -----------------------------------------------------------------------------


def test_scoring_is_the_model_with_the_means_of_a_and_b_each(
    lora_model: PeftModel, ragged: list[TrainExample]
) -> None:
    """A = B = 0.1, then 0.3: both means are 0.2, so the update is that of 0.2 * 0.2, not the mean
    of 0.1 * 0.1 and 0.3 * 0.3."""
    states = {}
    for value in (0.1, 0.2, 0.3, 0.05**0.5):
        _fill(lora_model, value)
        with torch.no_grad():
            states[value] = _states(lora_model, ragged)
    _fill(lora_model, 0.1)
    teacher = EmaTeacher(lora_model, decay=0.5)
    _fill(lora_model, 0.3)
    teacher.update()
    scored = _scored(teacher, ragged)
    # 0.2 in float32.
    assert (scored - states[0.2]).norm() < 1e-6 * states[0.2].norm()
    for other in (0.1, 0.3, 0.05**0.5):
        assert (scored - states[other]).norm() > 1e-2 * states[other].norm()


def test_scoring_equals_a_model_that_has_the_mean_loaded(
    lora_model: PeftModel, ragged: list[TrainExample]
) -> None:
    teacher = EmaTeacher(lora_model, decay=0.8)
    for step in range(3):
        _move(lora_model, seed=step)
        teacher.update()
    scored = _scored(teacher, ragged)
    with torch.no_grad():
        student = _states(lora_model, ragged)
        for parameter, mean in zip(_adapters(lora_model).values(), teacher.shadow, strict=True):
            parameter.copy_(mean)
        assert torch.equal(scored, _states(lora_model, ragged))
    assert (scored - student).norm() > 0.01 * student.norm()


def test_each_teacher_follows_the_student_as_it_should(
    lora_model: PeftModel, ragged: list[TrainExample]
) -> None:
    """The base never, the live one at once, the mean by a fraction."""
    _fill(lora_model, 0.0)
    fixed, live = FixedTeacher(lora_model), LiveTeacher(lora_model)
    teachers: list[Teacher] = [fixed, EmaTeacher(lora_model, decay=0.5), live]
    start = [_scored(teacher, ragged) for teacher in teachers]
    assert torch.equal(start[0], start[1]) and torch.equal(start[0], start[2])
    for value in (0.1, 0.2):
        _fill(lora_model, value)
        for teacher in teachers:
            teacher.update()
        base, mean, own = (_scored(teacher, ragged) for teacher in teachers)
        with torch.no_grad():
            assert torch.equal(own, _states(lora_model, ragged))
        assert torch.equal(base, start[0])
        assert 0 < (mean - base).norm() < (own - base).norm()


# ---- what it leaves of the student ---------------------------------------------------------------


MOVING: list[Callable[[PeftModel], Teacher]] = [lambda model: EmaTeacher(model, 0.5), LiveTeacher]


@pytest.fixture(params=MOVING, ids=["ema", "live"])
def moving(request: pytest.FixtureRequest, lora_model: PeftModel) -> Teacher:
    """A teacher whose weights, where they are a mean, are not the student's."""
    teacher = request.param(lora_model)
    _move(lora_model, seed=1)
    teacher.update()
    return teacher


@pytest.mark.parametrize("training", [True, False])
def test_the_student_comes_back_bit_for_bit_after_an_error_too(
    training: bool, moving: Teacher, lora_model: PeftModel, ragged: list[TrainExample]
) -> None:
    lora_model.train(training)
    before, places = _copies(lora_model), [p.data_ptr() for p in lora_model.parameters()]
    needed = {name: p.requires_grad for name, p in lora_model.named_parameters()}
    for error in (None, KeyError):
        try:
            with moving.scoring() as scorer:
                assert scorer is lora_model
                assert not any(module.training for module in scorer.modules())
                assert {n: p.requires_grad for n, p in scorer.named_parameters()} == needed
                assert not _states(scorer, ragged).requires_grad
                if error is not None:
                    raise error
        except KeyError:
            assert error is KeyError
        assert torch.is_grad_enabled()
        assert {module.training for module in lora_model.modules()} == {training}
        assert {n: p.requires_grad for n, p in lora_model.named_parameters()} == needed
        assert all(torch.equal(p, before[n]) for n, p in _adapters(lora_model).items())
        # In place: the optimizer, and sharding, hold on to the very storage.
        assert [p.data_ptr() for p in lora_model.parameters()] == places


def test_scoring_inside_a_students_pass_leaves_its_gradients_alone(
    moving: Teacher, lora_model: PeftModel, ragged: list[TrainExample]
) -> None:
    def gradients(with_teacher: bool) -> list[Tensor]:
        lora_model.zero_grad()
        loss = _states(lora_model, ragged).square().sum()
        if with_teacher:
            _scored(moving, ragged)
        loss.backward()
        return [p.grad.clone() for p in lora_model.parameters() if p.grad is not None]

    expected = gradients(False)
    assert len(expected) == len(_adapters(lora_model))
    assert all(map(torch.equal, gradients(True), expected))


@pytest.mark.parametrize("make", MOVING, ids=["ema", "live"])
def test_dropout_never_reaches_a_moving_teacher(
    make: Callable[[PeftModel], Teacher], base: PreTrainedModel, ragged: list[TrainExample]
) -> None:
    model = add_lora(base, LoraSection(rank=4, alpha=8, dropout=0.5), seed=0)
    assert isinstance(model, PeftModel)
    _move(model, seed=0)
    with torch.no_grad():
        expected = _states(model, ragged)
        model.train()
        assert not torch.equal(_states(model, ragged), expected)
    teacher = make(model)
    # Its mean is rounded to float32.
    scored = _scored(teacher, ragged)
    assert (scored - expected).norm() < 1e-6 * expected.norm()
    assert torch.equal(_scored(teacher, ragged), scored)


def test_the_live_teacher_needs_no_adapters(
    base: PreTrainedModel, ragged: list[TrainExample]
) -> None:
    model = add_lora(base, LoraSection(enabled=False), seed=0)
    teacher = LiveTeacher(model)
    before = _scored(teacher, ragged)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _states(model, ragged).square().mean().backward()
    optimizer.step()
    teacher.update()
    with torch.no_grad():
        expected = _states(model, ragged)
    assert torch.equal(_scored(teacher, ragged), expected)
    assert not torch.equal(before, expected)


# ---- misuse --------------------------------------------------------------------------------------


ALL: list[Callable[[PeftModel], Teacher]] = [FixedTeacher, *MOVING]


@pytest.mark.parametrize("inner", ALL, ids=["fixed", "ema", "live"])
@pytest.mark.parametrize("outer", ALL, ids=["fixed", "ema", "live"])
def test_no_teacher_scores_inside_another(
    outer: Callable[[PeftModel], Teacher],
    inner: Callable[[PeftModel], Teacher],
    lora_model: PeftModel,
    ragged: list[TrainExample],
) -> None:
    teacher, other = outer(lora_model), inner(lora_model)
    _move(lora_model, seed=1)
    expected = _scored(teacher, ragged)
    with teacher.scoring() as scorer:
        with pytest.raises(AssertionError, match="inside another"), other.scoring():
            pass
        assert torch.equal(_states(scorer, ragged), expected)
    assert torch.equal(_scored(teacher, ragged), expected)


def test_the_mean_is_not_updated_from_itself(lora_model: PeftModel) -> None:
    teacher = EmaTeacher(lora_model, decay=0.5)
    with teacher.scoring(), pytest.raises(AssertionError, match="inside a teacher's context"):
        teacher.update()


@pytest.mark.parametrize(
    ("weights", "kind"), [("fixed", FixedTeacher), ("ema", EmaTeacher), ("live", LiveTeacher)]
)
def test_the_configuration_picks_the_teacher(
    weights: str, kind: type, lora_model: PeftModel
) -> None:
    section = TeacherSection.model_validate({"weights": weights, "ema_decay": 0.75})
    base = FixedTeacher(lora_model)
    teacher = make_teacher(section, lora_model, base)
    assert type(teacher) is kind
    assert (teacher is base) == (weights == "fixed")
    if isinstance(teacher, EmaTeacher):
        _fill(lora_model, 0.0)
        before = [mean.clone() for mean in teacher.shadow]
        teacher.update()
        # 1 - decay of the way to zero.
        for mean, start in zip(teacher.shadow, before, strict=True):
            torch.testing.assert_close(mean, 0.75 * start)
