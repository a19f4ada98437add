"""What a checkpoint holds: random generators that continue where they were, tensors, no pickle."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from saved_runs import Trained, build, load, save, take_step

from paint_engine.checkpoint.load import load_checkpoint
from paint_engine.checkpoint.save import save_checkpoint
from paint_engine.distributed import World


def test_random_generators_continue_where_they_were(model_dir: Path, tmp_path: Path) -> None:
    def draw() -> list[float]:
        # gauss() and normal() keep the second number of a pair for the next call.
        return [torch.rand(()).item(), random.random(), random.gauss(), np.random.normal()]

    model, optimizer = build(model_dir, lora=True)
    draw()
    save(tmp_path, model, optimizer, 1)
    expected = [draw(), draw()]
    assert load(tmp_path, model, optimizer) == (1, [])
    assert [draw(), draw()] == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_its_generator_and_moments_come_back(model_dir: Path, tmp_path: Path) -> None:
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cuda", 0))
    model, optimizer = build(model_dir, lora=True, device=world.device)
    take_step(model, optimizer, 1)
    save_checkpoint(tmp_path, model, optimizer, {"step": 1}, keep=1, world=world)
    drawn = torch.rand(4, device=world.device)
    resumed, its_optimizer = build(model_dir, lora=True, seed=5, device=world.device)
    load_checkpoint(tmp_path, resumed, its_optimizer, world=world, warn=pytest.fail)
    assert torch.equal(torch.rand(4, device=world.device), drawn)
    states = zip(optimizer.state.values(), its_optimizer.state.values(), strict=True)
    for moments, restored in states:
        for name, moment in moments.items():
            assert torch.equal(moment, restored[name])
            assert moment.device == restored[name].device
    take_step(resumed, its_optimizer, 2)


def test_a_checkpoint_holds_no_pickle(tmp_path: Path, trained: Trained) -> None:
    target = tmp_path / "checkpoints/step-2"
    files = [path for path in target.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    record = json.loads((target / "trainer_state.json").read_text())
    assert record["state"]["step"] == 2 and record["world_size"] == 1
    (shard,) = (target / "trainer").iterdir()
    tensors = load_file(shard)
    # A and B in 14 linear maps: the weight, two moments and the count of steps.
    assert len(tensors) == 28 * 4
    assert {t.dtype for t in tensors.values()} == {torch.float32}
