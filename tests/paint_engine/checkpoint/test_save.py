"""Saving: whole or absent, in formats that others read, the newest and the best kept. At several
ranks: test_checkpoint_ranks.py."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from saved_runs import CPU, Trained, build, flip_bit, load, save, take_step, trainable
from transformers import AutoModelForCausalLM

from paint_engine.checkpoint import directory as checkpoint_files
from paint_engine.checkpoint import save as checkpoint
from paint_engine.checkpoint.directory import best_checkpoint, list_checkpoints, mark_best
from paint_engine.config.sections import ModelSection
from paint_engine.files import WriteFailed, unfinished_path
from paint_engine.model.load import load_base


def test_the_adapter_loads_with_peft_alone(
    model_dir: Path, tmp_path: Path, trained: Trained
) -> None:
    base = load_base(ModelSection(name_or_path=str(model_dir), dtype="float32"), CPU)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "checkpoints/step-2"))
    ids = torch.arange(15)[None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, trained[0](input_ids=ids).logits)


def test_the_whole_model_loads_with_transformers_alone(model_dir: Path, tmp_path: Path) -> None:
    model, optimizer = build(model_dir, lora=False)
    take_step(model, optimizer, 1)
    target = save(tmp_path, model, optimizer, 1)
    loaded = AutoModelForCausalLM.from_pretrained(target)
    ids = torch.arange(15)[None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_the_newest_and_the_best_stay(model_dir: Path, tmp_path: Path) -> None:
    model, optimizer = build(model_dir, lora=True)
    kept = []
    assert best_checkpoint(tmp_path) is None
    for step in (1, 2, 9, 10, 11, 12):
        save(tmp_path, model, optimizer, step)
        if step in (2, 11):
            mark_best(tmp_path, step)
        kept.append([checkpoint_files.checkpoint_step(path) for path in list_checkpoints(tmp_path)])
    assert kept == [[1], [1, 2], [2, 9], [2, 9, 10], [2, 10, 11], [11, 12]]
    link = tmp_path / "checkpoints/best"
    # Relative, so that the run's directory can be moved.
    assert str(link.readlink()) == "step-11"
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert best_checkpoint(moved) == moved / "checkpoints/step-11"
    assert load(moved, model, optimizer) == (12, [])


def test_a_checkpoint_cut_short_is_ignored_and_replaced(
    model_dir: Path, tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = trained
    before = trainable(model)
    take_step(model, optimizer, 3)

    def power_cut(unfinished: Path, names: list[str]) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        # Weights and moments are written; the manifest and the rename are yet to come.
        patch.setattr(checkpoint, "seal", power_cut)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, model, optimizer, 3)
    (unfinished,) = (tmp_path / "checkpoints").glob(".step-3.*.unfinished")
    assert (unfinished / "adapter_model.safetensors").exists()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-1", "step-2"]
    resumed, its_optimizer = build(model_dir, lora=True)
    assert load(tmp_path, resumed, its_optimizer) == (2, [])
    assert all(torch.equal(t, before[n]) for n, t in trainable(resumed).items())

    (unfinished / "left-over").write_text("x")
    stale = unfinished_path(tmp_path / "checkpoints/step-1")
    stale.mkdir()
    target = save(tmp_path, model, optimizer, 3)
    assert not unfinished.exists() and not stale.exists()
    assert not (target / "left-over").exists()
    assert load(tmp_path, resumed, its_optimizer) == (3, [])


def test_every_file_is_on_the_disk_before_the_rename(
    tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    # By inode, which a rename keeps.
    flushed: list[tuple[int, bool]] = []
    target = tmp_path / "checkpoints/step-3"
    original = os.fsync

    def spy(descriptor: int) -> None:
        flushed.append((os.fstat(descriptor).st_ino, target.exists()))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    save(tmp_path, *trained, 3)
    written = {path.stat().st_ino for path in (target, *target.rglob("*"))}
    assert {file for file, renamed in flushed if not renamed} == written
    assert [file for file, renamed in flushed if renamed] == [target.parent.stat().st_ino]


def test_saving_a_step_twice_keeps_the_first(tmp_path: Path, trained: Trained) -> None:
    take_step(*trained, 3)
    content = (tmp_path / "checkpoints/step-2/adapter_model.safetensors").read_bytes()
    target = save(tmp_path, *trained, 2)
    assert (target / "adapter_model.safetensors").read_bytes() == content


def test_a_damaged_checkpoint_is_written_again_when_its_step_comes(
    model_dir: Path, tmp_path: Path, trained: Trained
) -> None:
    expected = trainable(trained[0])
    flip_bit(tmp_path / "checkpoints/step-2/adapter_model.safetensors")
    model, optimizer = build(model_dir, lora=True)
    assert load(tmp_path, model, optimizer)[0] == 1
    # Of the damaged one nothing is counted: with room for one, the present step is the one.
    save(tmp_path, model, optimizer, 1, keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-1", "step-2"]
    take_step(model, optimizer, 2)
    save(tmp_path, model, optimizer, 2, keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-2"]
    resumed, its_optimizer = build(model_dir, lora=True, seed=3)
    assert load(tmp_path, resumed, its_optimizer) == (2, [])
    assert all(torch.equal(t, expected[n]) for n, t in trainable(resumed).items())


def test_a_full_disk_is_one_clear_error_and_older_checkpoints_stay_intact(
    small_disk: Path, model_dir: Path
) -> None:
    model, optimizer = build(model_dir, lora=True)
    take_step(model, optimizer, 1)
    save(small_disk, model, optimizer, 1)
    ballast = small_disk / "ballast"
    # Full at once, in the small files, in the shards, and when the adapter is written.
    for room in (0, 12_288, 32_768, 65_536, 98_304):
        ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - room))
        with pytest.raises(WriteFailed, match=r"step-2 could not be saved.*[Nn]o space.*intact"):
            save(small_disk, model, optimizer, 2)
        assert [p.name for p in (small_disk / "checkpoints").iterdir()] == ["step-1"]
        ballast.unlink()
    assert load(small_disk, model, optimizer) == (1, [])
    save(small_disk, model, optimizer, 2, keep=1)
    assert load(small_disk, model, optimizer) == (2, [])
