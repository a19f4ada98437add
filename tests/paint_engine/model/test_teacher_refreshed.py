"""The refreshed teacher: the base at first, then the student of every N-th step, bit for bit."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from saved_runs import ALONE, build, take_step, trainable
from torch import Tensor, nn

from paint_engine.checkpoint.load import load_checkpoint
from paint_engine.checkpoint.save import save_checkpoint
from paint_engine.config.sections import TeacherSection
from paint_engine.model.forward import hidden_states
from paint_engine.model.packing import pack_sequences
from paint_engine.model.teachers import (
    FixedTeacher,
    RefreshedAdapters,
    RefreshedCopy,
    Teacher,
    make_teacher,
)

PROBE = pack_sequences([(5, 6, 7), (9,)], [(1, 2), (3, 4, 5, 6)])
KINDS = {True: RefreshedAdapters, False: RefreshedCopy}


def refreshed(model: nn.Module, every: int) -> Teacher:
    section = TeacherSection(refresh_every=every)
    return make_teacher(section, model, FixedTeacher(model))


def scored(teacher: Teacher) -> Tensor:
    with teacher.scoring() as scorer:
        return hidden_states(scorer, PROBE, attention="padded")


def states(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return hidden_states(model, PROBE, attention="padded")


@pytest.mark.parametrize("lora", [True, False])
def test_after_n_steps_the_teacher_is_the_student_of_that_step(lora: bool, model_dir: Path) -> None:
    model, optimizer = build(model_dir, lora=lora)
    teacher = refreshed(model, every=2)
    assert isinstance(teacher, KINDS[lora])
    students = [states(model)]
    seen = [scored(teacher)]
    for step in range(1, 6):
        take_step(model, optimizer, step)
        teacher.update()
        teacher.finish_step(step)
        students.append(states(model))
        seen.append(scored(teacher))
        # The student is left alone.
        assert torch.equal(states(model), students[-1])
    # Of the base before step 2, then of the students of the steps 2 and 4.
    for got, step in zip(seen, (0, 0, 2, 2, 4, 4), strict=True):
        assert torch.equal(got, students[step])
    assert not any(torch.equal(one, next_one) for one, next_one in pairwise(students))


@pytest.mark.parametrize("lora", [True, False])
def test_a_step_without_an_update_counts(lora: bool, model_dir: Path) -> None:
    """A skipped optimizer step at a refresh: the teacher becomes the student as it is."""
    model, optimizer = build(model_dir, lora=lora)
    teacher = refreshed(model, every=2)
    take_step(model, optimizer, 1)
    teacher.finish_step(1)
    teacher.finish_step(2)
    assert torch.equal(scored(teacher), states(model))


@pytest.mark.parametrize("lora", [True, False])
def test_it_resumes_bit_for_bit_from_a_checkpoint(
    lora: bool, model_dir: Path, tmp_path: Path
) -> None:
    model, optimizer = build(model_dir, lora=lora)
    teacher = refreshed(model, every=2)

    def train(steps: range) -> None:
        for step in steps:
            take_step(model, optimizer, step)
            teacher.finish_step(step)

    train(range(1, 4))
    # Between two refreshes: the teacher is neither the base nor the student.
    save_checkpoint(tmp_path, model, optimizer, {"step": 3}, keep=1, world=ALONE, teacher=teacher)
    at_three = [value.clone() for value in teacher.kept]
    before = scored(teacher)
    train(range(4, 6))
    after, student = scored(teacher), trainable(model)

    model, optimizer = build(model_dir, lora=lora, seed=5)
    teacher = refreshed(model, every=2)
    state = load_checkpoint(
        tmp_path, model, optimizer, world=ALONE, warn=pytest.fail, teacher=teacher
    )
    assert state == {"step": 3}
    assert all(map(torch.equal, teacher.kept, at_three))
    assert torch.equal(scored(teacher), before)
    assert not torch.equal(before, states(model))
    train(range(4, 6))
    assert torch.equal(scored(teacher), after)
    assert all(torch.equal(tensor, student[name]) for name, tensor in trainable(model).items())


def test_a_checkpoint_of_another_teacher_is_refused(model_dir: Path, tmp_path: Path) -> None:
    model, optimizer = build(model_dir, lora=True)
    take_step(model, optimizer, 1)
    save_checkpoint(tmp_path, model, optimizer, {"step": 1}, keep=1, world=ALONE)
    with pytest.raises(
        ValueError,
        match=r"step-1 holds no weights of the last refresh, which this run's teacher needs: .*"
        r"--teacher\.refresh_every",
    ):
        load_checkpoint(
            *(tmp_path, model, optimizer),
            world=ALONE,
            warn=pytest.fail,
            teacher=refreshed(model, every=2),
        )


@pytest.mark.parametrize("lora", [True, False])
def test_a_copy_that_moves_is_no_base(lora: bool, model_dir: Path) -> None:
    """With adapters, the base is the model without them; a copy of all weights is given away."""
    model, _ = build(model_dir, lora=lora)
    base = FixedTeacher(model)
    assert base.exists
    make_teacher(TeacherSection(refresh_every=2), model, base)
    assert base.exists == lora
    if not lora:
        with pytest.raises(AssertionError, match="no copy of the base"), base.scoring():
            pass
