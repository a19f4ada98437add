"""The program that `test_checkpoint_ranks` starts: python checkpoint_ranks.py WORK_DIR MODEL_DIR

It imports once and forks the ranks; what they found goes into WORK_DIR/report.json.
"""

import errno
import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from forked_ranks import fork, on_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from paint_engine.checkpoint import directory
from paint_engine.checkpoint.directory import list_checkpoints
from paint_engine.checkpoint.load import load_checkpoint
from paint_engine.checkpoint.save import save_checkpoint
from paint_engine.checkpoint.weights import whole
from paint_engine.config.sections import LoraSection, ModelSection
from paint_engine.distributed import World, barrier, gather_objects
from paint_engine.files import ReadFailed, WriteFailed
from paint_engine.model.load import load_base
from paint_engine.model.lora import add_lora
from paint_engine.model.sharding import shard_model

CPU = torch.device("cpu")
# Rank 2 over 4 processes: two of them hold nothing. The vocabulary over 4: uneven.
MODELS = {"lora": 2, "full": None}
LAYOUTS = (
    (1, "replicate"),
    *((size, shard) for size in (2, 4) for shard in ("full", "replicate")),
    # Two copies of the weights, each over two ranks.
    (4, "hybrid"),
)
KILLS = 12

Trained = tuple[nn.Module, torch.optim.Optimizer]


def build(model_dir: Path, rank: int | None, world: World, shard: str, seed: int = 0) -> Trained:
    base = load_base(ModelSection(name_or_path=str(model_dir), dtype="float32"), CPU)
    model = add_lora(base, LoraSection(enabled=rank is not None, rank=rank or 1, alpha=8), seed)
    if shard != "replicate":
        shard_model(model, world, replicas=2 if shard == "hybrid" else 1)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int) -> None:
    for _ in range(num_steps):
        model(input_ids=torch.arange(12)[None]).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and moments, whole. A collective."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            held = {"weight": parameter.detach(), **optimizer.state.get(parameter, {})}
            tensors |= {f"{kind} {name}": whole(value).clone() for kind, value in held.items()}
    return tensors


def draw() -> list[float]:
    return [torch.rand(()).item(), random.random(), np.random.normal()]


def save_all(world: World, work: Path, model_dir: Path) -> None:
    """A run for each model and layout, with what it should restore beside it."""
    for name, rank in MODELS.items():
        for size, shard in LAYOUTS:
            if size != world.size:
                continue
            model, optimizer = build(model_dir, rank, world, shard)
            train(model, optimizer, 2)
            run_dir = work / f"{name}-{size}-{shard}"
            run_dir.mkdir(exist_ok=True)
            for generator in (torch.manual_seed, random.seed, np.random.seed):
                generator(world.rank + 1)
            save_checkpoint(run_dir, model, optimizer, {"step": 2}, keep=2, world=world)
            truth, draws = everything(model, optimizer), gather_objects(draw())
            if world.is_main:
                save_file(truth, run_dir / "truth.safetensors")
                (run_dir / "draws.json").write_text(json.dumps(draws))


def load_all(world: World, work: Path, model_dir: Path) -> dict[str, str]:
    """What came back differently, for each saved layout at this number of ranks; "" if nothing."""
    outcome: dict[str, str] = {}
    for shard in (shard for size, shard in LAYOUTS if size == world.size):
        for name, rank in MODELS.items():
            model, optimizer = build(model_dir, rank, world, shard, seed=5)
            for size, saved_shard in LAYOUTS:
                run_dir = work / f"{name}-{size}-{saved_shard}"
                state = load_checkpoint(run_dir, model, optimizer, world=world, warn=print)
                drawn = gather_objects(draw())
                tensors = everything(model, optimizer)
                truth = load_file(run_dir / "truth.safetensors")
                differing = [n for n in truth | tensors if n not in tensors or n not in truth]
                differing += [n for n in truth if not torch.equal(truth[n], tensors[n])]
                if not any("exp_avg_sq" in n and truth[n].any() for n in truth):
                    differing.append("no moments")
                if state != {"step": 2}:
                    differing.append("state")
                same_draws = drawn == json.loads((run_dir / "draws.json").read_text())
                if same_draws != (size == world.size):
                    differing.append("random generators")
                outcome[f"{run_dir.name} at {world.size}-{shard}"] = " ".join(differing)
    return outcome


def refuse_and_recover(world: World, work: Path, model_dir: Path) -> dict[str, Any]:
    """One rank of two may write only so many bytes a file: all hear of it, nothing hangs."""
    run_dir = work / "refused"
    run_dir.mkdir(exist_ok=True)
    errors: dict[str, Any] = {}
    model, optimizer = build(model_dir, None, world, "full")
    train(model, optimizer, 1)
    save_checkpoint(run_dir, model, optimizer, {"step": 1}, keep=2, world=world)
    train(model, optimizer, 1)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Too little for the generators' states; for the shards; for the whole model (by rank 0).
    for rank, limit in ((1, 4_096), (1, 50_000), (0, 60_000)):
        if world.rank == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
        try:
            save_checkpoint(run_dir, model, optimizer, {"step": 2}, keep=2, world=world)
            message = "saved"
        except WriteFailed as error:
            message = str(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        there = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
        errors[f"{rank} {limit}"] = [gather_objects(message), there]
    save_checkpoint(run_dir, model, optimizer, {"step": 2}, keep=2, world=world)
    errors["unreadable"] = gather_objects(refuse_to_read(run_dir, model, optimizer, world))
    newest = run_dir / "checkpoints/step-2"
    if world.is_main:
        shard = sorted((newest / "trainer").iterdir())[-1]
        shard.write_bytes(shard.read_bytes()[:-1])
    barrier()
    warned: list[str] = []
    state = load_checkpoint(run_dir, model, optimizer, world=world, warn=warned.append)
    errors["truncated"] = gather_objects([state, len(warned)])
    return errors


def refuse_to_read(
    run_dir: Path, model: nn.Module, optimizer: torch.optim.Optimizer, world: World
) -> str:
    """The last rank may not open its share of the files: the message of this rank."""

    def refuse(path: Path, flags: int) -> int:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    original = directory.open_regular
    if world.rank == world.size - 1:
        directory.open_regular = refuse
    try:
        load_checkpoint(run_dir, model, optimizer, world=world, warn=print)
        return "loaded"
    except ReadFailed as error:
        return str(error)
    finally:
        directory.open_regular = original


def save_for_ever(run_dir: Path, model_dir: Path) -> None:
    """Step after step, every weight and moment equal to the step's number."""
    alone = World(0, 1, 0, CPU)
    model, optimizer = build(model_dir, 2, alone, "replicate")
    state = load_checkpoint(run_dir, model, optimizer, world=alone, warn=print)
    step = 0 if state is None else state["step"]
    train(model, optimizer, 1)
    while True:
        step += 1
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.data.fill_(step)
            for moment in optimizer.state[parameter].values():
                moment.fill_(step)
        save_checkpoint(run_dir, model, optimizer, {"step": step}, keep=2, world=alone)


def kill_at_random(work: Path, model_dir: Path) -> list[Any]:
    """After each kill: the step restored, the values that came back, the warnings."""
    run_dir, rng, alone = work / "killed", random.Random(0), World(0, 1, 0, CPU)
    run_dir.mkdir()
    found: list[Any] = []
    for _ in range(KILLS):
        pid = fork(lambda: save_for_ever(run_dir, model_dir))
        before = len(list_checkpoints(run_dir)) and list_checkpoints(run_dir)[-1].name
        while not list_checkpoints(run_dir) or list_checkpoints(run_dir)[-1].name == before:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.1))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        model, optimizer = build(model_dir, 2, alone, "replicate", seed=9)
        warned: list[str] = []
        state = load_checkpoint(run_dir, model, optimizer, world=alone, warn=warned.append)
        assert state is not None
        tensors = everything(model, optimizer).values()
        values = sorted({value for tensor in tensors for value in tensor.unique().tolist()})
        found.append([state["step"], values, warned])
    return found


def main(work: Path, model_dir: Path) -> None:
    torch.set_num_threads(1)
    for size in (1, 2, 4):
        on_ranks(size, save_all, work, model_dir)
    restored: dict[str, str] = {}
    for size in (1, 2, 4):
        restored |= on_ranks(size, load_all, work, model_dir)
    report = {
        "restored": restored,
        "refused": on_ranks(2, refuse_and_recover, work, model_dir),
        "killed": kill_at_random(work, model_dir),
    }
    (work / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
