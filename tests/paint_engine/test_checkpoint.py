"""Checkpoints: whole or absent, the newest kept, and everything restored bit for bit."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from paint_engine import checkpoint
from paint_engine.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from paint_engine.config import LoraSection, ModelSection, OptimSection
from paint_engine.model import add_lora, load_base
from paint_engine.setup import build_optimizer

CPU = torch.device("cpu")
OPTIM = OptimSection(learning_rate=0.01)


def build(model_dir: Path, *, lora: bool, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    base = load_base(ModelSection(name_or_path=str(model_dir), dtype="float32"), CPU)
    model = add_lora(base, LoraSection(enabled=lora, rank=4, alpha=8), seed)
    return model, build_optimizer(model, OPTIM)


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """One step on a loss that reaches every trainable weight."""
    ids = torch.randint(0, 300, (1, 12), generator=torch.Generator().manual_seed(seed))
    model(input_ids=ids).logits.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def save(run_dir: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> Path:
    return save_checkpoint(run_dir, model, optimizer, {"step": step, "seconds_train": 0.1}, keep=2)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_training_goes_on_bit_for_bit_from_a_checkpoint(
    tied: bool, lora: bool, model_dir: Path, untied_model_dir: Path, tmp_path: Path
) -> None:
    directory = model_dir if tied else untied_model_dir
    model, optimizer = build(directory, lora=lora)
    for seed in (1, 2):
        take_step(model, optimizer, seed)
    save(tmp_path, model, optimizer, 2)
    at_two = trainable(model)
    for seed in (3, 4):
        take_step(model, optimizer, seed)
    expected = trainable(model)

    # Other initial adapters: they must all come from the checkpoint.
    resumed, its_optimizer = build(directory, lora=lora, seed=5)
    state = load_checkpoint(tmp_path, resumed, its_optimizer)
    assert state == {"step": 2, "seconds_train": 0.1}
    for name, tensor in trainable(resumed).items():
        assert torch.equal(tensor, at_two[name]), name
    for seed in (3, 4):
        take_step(resumed, its_optimizer, seed)
    for name, tensor in trainable(resumed).items():
        assert torch.equal(tensor, expected[name]), name
    assert not all(torch.equal(expected[name], at_two[name]) for name in expected)
    moments = [s for s in its_optimizer.state.values() if s["exp_avg_sq"].any()]
    assert len(moments) > len(expected) // 2
    assert {s["step"].item() for s in moments} == {4.0}


def test_without_its_moments_training_would_not_go_on_the_same(
    model_dir: Path, tmp_path: Path
) -> None:
    model, optimizer = build(model_dir, lora=True)
    for seed in (1, 2):
        take_step(model, optimizer, seed)
    save(tmp_path, model, optimizer, 2)
    resumed, fresh = build(model_dir, lora=True)
    load_checkpoint(tmp_path, resumed, torch.optim.SGD(resumed.parameters(), lr=0.1))
    take_step(model, optimizer, 3)
    take_step(resumed, fresh, 3)
    pairs = zip(trainable(model).values(), trainable(resumed).values(), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)


def test_a_checkpoint_before_the_first_step_has_no_moments(model_dir: Path, tmp_path: Path) -> None:
    model, optimizer = build(model_dir, lora=True)
    save(tmp_path, model, optimizer, 0)
    resumed, its_optimizer = build(model_dir, lora=True, seed=7)
    assert load_checkpoint(tmp_path, resumed, its_optimizer)["step"] == 0
    assert not its_optimizer.state
    for model_of_run, optimizer_of_run in ((model, optimizer), (resumed, its_optimizer)):
        take_step(model_of_run, optimizer_of_run, 1)
    for name, tensor in trainable(resumed).items():
        assert torch.equal(tensor, trainable(model)[name]), name


def test_the_adapter_loads_with_peft_alone(model_dir: Path, tmp_path: Path) -> None:
    model, optimizer = build(model_dir, lora=True)
    take_step(model, optimizer, 1)
    target = save(tmp_path, model, optimizer, 1)
    base = load_base(ModelSection(name_or_path=str(model_dir), dtype="float32"), CPU)
    loaded = PeftModel.from_pretrained(base, str(target))
    ids = torch.arange(15)[None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_the_whole_model_loads_with_transformers_alone(model_dir: Path, tmp_path: Path) -> None:
    model, optimizer = build(model_dir, lora=False)
    take_step(model, optimizer, 1)
    target = save(tmp_path, model, optimizer, 1)
    loaded = AutoModelForCausalLM.from_pretrained(target)
    ids = torch.arange(15)[None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_only_the_newest_stay_in_the_order_of_their_steps(model_dir: Path, tmp_path: Path) -> None:
    model, optimizer = build(model_dir, lora=True)
    kept = []
    for step in (1, 2, 9, 10, 11):
        save(tmp_path, model, optimizer, step)
        kept.append([path.name for path in list_checkpoints(tmp_path)])
    assert kept == [
        ["step-1"],
        ["step-1", "step-2"],
        ["step-2", "step-9"],
        ["step-9", "step-10"],
        ["step-10", "step-11"],
    ]
    assert load_checkpoint(tmp_path, model, optimizer)["step"] == 11


def test_a_checkpoint_cut_short_is_ignored_and_replaced(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = build(model_dir, lora=True)
    take_step(model, optimizer, 1)
    save(tmp_path, model, optimizer, 1)
    before = trainable(model)
    take_step(model, optimizer, 2)

    def power_cut(directory: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        # Weights and moments are written; the rename is yet to come.
        patch.setattr(checkpoint, "_sync_to_disk", power_cut)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, model, optimizer, 2)
    unfinished = tmp_path / "checkpoints" / ".step-2.unfinished"
    assert (unfinished / "adapter_model.safetensors").exists()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-1"]
    resumed, its_optimizer = build(model_dir, lora=True)
    assert load_checkpoint(tmp_path, resumed, its_optimizer)["step"] == 1
    assert all(torch.equal(t, before[n]) for n, t in trainable(resumed).items())

    (unfinished / "left-over").write_text("x")
    target = save(tmp_path, model, optimizer, 2)
    assert not unfinished.exists()
    assert not (target / "left-over").exists()
    assert load_checkpoint(tmp_path, resumed, its_optimizer)["step"] == 2


def test_every_file_is_flushed_before_the_rename(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = build(model_dir, lora=True)
    flushed: list[tuple[str, bool]] = []
    original = checkpoint._sync_to_disk

    def spy(directory: Path) -> None:
        flushed.append((directory.name, (tmp_path / "checkpoints" / "step-3").exists()))
        original(directory)

    monkeypatch.setattr(checkpoint, "_sync_to_disk", spy)
    save(tmp_path, model, optimizer, 3)
    assert flushed == [(".step-3.unfinished", False), ("checkpoints", True)]


def test_saving_a_step_twice_keeps_the_first(model_dir: Path, tmp_path: Path) -> None:
    model, optimizer = build(model_dir, lora=True)
    first = save(tmp_path, model, optimizer, 3)
    content = (first / "adapter_model.safetensors").read_bytes()
    assert save(tmp_path, model, optimizer, 3) == first
    assert (first / "adapter_model.safetensors").read_bytes() == content


def test_a_checkpoint_holds_no_pickle(model_dir: Path, tmp_path: Path) -> None:
    model, optimizer = build(model_dir, lora=True)
    take_step(model, optimizer, 1)
    target = save(tmp_path, model, optimizer, 1)
    assert {path.suffix for path in target.iterdir()} <= {".safetensors", ".json", ".md"}
    assert json.loads((target / "trainer_state.json").read_text())["step"] == 1
    moments = load_file(target / "optimizer.safetensors")
    # Three tensors for each of A and B in 14 linear maps.
    assert len(moments) == 3 * 28


def test_a_run_without_a_checkpoint_says_how_to_start_again(
    model_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "checkpoints" / ".step-1.unfinished").mkdir(parents=True)
    model, optimizer = build(model_dir, lora=True)
    with pytest.raises(ValueError, match=r"no complete checkpoint.*--run\.overwrite true"):
        load_checkpoint(tmp_path, model, optimizer)
