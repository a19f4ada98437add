"""The running mean of an EMA teacher in checkpoints. At several ranks: test_teacher_ranks.py."""

from pathlib import Path

import pytest
import torch
from saved_runs import ALONE, Trained, build, take_step, trainable

from paint_engine.checkpoint.load import load_checkpoint
from paint_engine.checkpoint.save import save_checkpoint
from paint_engine.model.teachers import EmaTeacher


def test_a_running_mean_resumes_bit_for_bit_from_a_checkpoint(
    model_dir: Path, tmp_path: Path
) -> None:
    def train(trained: Trained, mean: EmaTeacher, seeds: tuple[int, ...]) -> None:
        for seed in seeds:
            take_step(*trained, seed)
            mean.update()

    trained = build(model_dir, lora=True)
    ema = EmaTeacher(trained[0], decay=0.75)
    train(trained, ema, (1, 2))
    save_checkpoint(tmp_path, *trained, {"step": 2}, keep=1, world=ALONE, teacher=ema)
    at_two = [mean.clone() for mean in ema.shadow]
    train(trained, ema, (3, 4))

    # Other initial adapters, so another initial mean.
    resumed = build(model_dir, lora=True, seed=5)
    its_ema = EmaTeacher(resumed[0], decay=0.75)
    assert not all(map(torch.equal, its_ema.shadow, at_two))
    state = load_checkpoint(tmp_path, *resumed, world=ALONE, warn=pytest.fail, teacher=its_ema)
    assert state == {"step": 2}
    assert all(map(torch.equal, its_ema.shadow, at_two))
    # The mean is not the adapters that it is of.
    assert not all(map(torch.equal, at_two, trainable(resumed[0]).values()))
    train(resumed, its_ema, (3, 4))
    assert all(map(torch.equal, its_ema.shadow, ema.shadow))


def test_a_mean_that_no_teacher_wants_is_left_in_the_checkpoint(
    model_dir: Path, tmp_path: Path
) -> None:
    model, optimizer = build(model_dir, lora=True)
    ema = EmaTeacher(model, decay=0.75)
    take_step(model, optimizer, 1)
    save_checkpoint(tmp_path, model, optimizer, {"step": 1}, keep=1, world=ALONE, teacher=ema)
    resumed, its_optimizer = build(model_dir, lora=True, seed=5)
    state = load_checkpoint(tmp_path, resumed, its_optimizer, world=ALONE, warn=pytest.fail)
    assert state == {"step": 1}
    assert all(torch.equal(t, trainable(model)[n]) for n, t in trainable(resumed).items())
    # Two moments and the count of steps, and no mean, for A and B in 14 linear maps.
    assert [set(s) for s in its_optimizer.state.values()] == [
        {"step", "exp_avg", "exp_avg_sq"}
    ] * 28


def test_a_checkpoint_without_the_mean_that_is_wanted_is_refused(
    model_dir: Path, tmp_path: Path
) -> None:
    saved = build(model_dir, lora=True)
    take_step(*saved, 1)
    save_checkpoint(tmp_path, *saved, {"step": 1}, keep=1, world=ALONE)
    model, optimizer = build(model_dir, lora=True, seed=5)
    ema, before = EmaTeacher(model, decay=0.75), trainable(model)
    with pytest.raises(ValueError, match=r"step-1 holds no running mean.*--teacher\.weights"):
        load_checkpoint(tmp_path, model, optimizer, world=ALONE, warn=pytest.fail, teacher=ema)
    # Before anything was restored.
    assert all(torch.equal(t, before[n]) for n, t in trainable(model).items())
