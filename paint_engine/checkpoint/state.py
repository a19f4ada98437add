"""What a checkpoint holds of a run: tensors and their names, random generators, the small record.

A weight is filed as "weight/NAME", a moment of the optimizer as "exp_avg/NAME", what a teacher
keeps of it as "ema/NAME" (a running mean) or "refreshed/NAME" (the student of an earlier step).
"""

import json
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import PositiveInt
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from paint_engine.checkpoint.directory import find_damage
from paint_engine.checkpoint.generators import check_torch_state, numpy_state, python_state
from paint_engine.distributed import World, gather_objects, together
from paint_engine.files import FILE_FAILURES, Record
from paint_engine.model import Teacher
from paint_engine.model.teachers import STORED_AS

SHARDS = "trainer"
WEIGHT = "weight"
TEACHERS = frozenset(STORED_AS)
# AdamW's; its count of steps has no dimension and is on the CPU.
STEPS = "step"
MOMENTS = {STEPS, "exp_avg", "exp_avg_sq"}


class Saved(Record):
    """`trainer_state.json`. What else `state` holds is checked by those who use it."""

    state: dict[str, Any]
    world_size: PositiveInt


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def kept_by_teacher(model: nn.Module, teacher: Teacher | None) -> dict[str, Tensor]:
    """What the teacher keeps of each weight, by the name of its entry in the shards."""
    if teacher is None or not teacher.stored_as:
        return {}
    kept = zip(trained_parameters(model), teacher.kept, strict=True)
    return {f"{teacher.stored_as}/{name}": value for name, value in kept}


def state_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, teacher: Teacher | None
) -> dict[str, Tensor]:
    """Weights, moments and what the teacher keeps: unsharded, or this rank's shards as DTensors."""
    tensors = kept_by_teacher(model, teacher)
    for name, parameter in trained_parameters(model).items():
        tensors[f"{WEIGHT}/{name}"] = parameter.detach()
        for moment, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{moment}/{name}"] = value
    return tensors


def write_random_state(file: Path, device: torch.device) -> None:
    tensors = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    name, keys, *rest = np.random.get_state(legacy=True)
    numpy_state = [name, np.asarray(keys).tolist(), *rest]
    metadata = {"python": json.dumps(random.getstate()), "numpy": json.dumps(numpy_state)}
    save_file(tensors, file, metadata=metadata)


def read_random_state(file: Path, device: torch.device, remedy: str) -> None:
    """Sets this process's generators. Raises BadFile for a state that none of them can have."""
    with safe_open(file, framework="pt") as stream:
        metadata, on_cpu = stream.metadata(), stream.get_tensor("torch")
        python = python_state(metadata["python"], file, remedy)
        numpy = numpy_state(metadata["numpy"], file, remedy)
        check_torch_state(on_cpu, file, remedy)
        torch.set_rng_state(on_cpu)
        if device.type == "cuda" and "cuda" in stream.keys():  # noqa: SIM118 (no container)
            torch.cuda.set_rng_state(stream.get_tensor("cuda"), device)
    random.setstate(python)
    np.random.set_state(numpy)


@contextmanager
def shard_files() -> Iterator[None]:
    """Wraps torch.distributed.checkpoint: drops its warning that there is no process group, and
    raises the first rank's exception instead of CheckpointException."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as wrapped:
            failure, _ = next(iter(wrapped.failures.values()))
            raise failure from wrapped


def damage_of(checkpoint: Path, world: World) -> str | None:
    """The damage that the lowest rank found; None if no rank found any. A collective: raises
    ReadFailed on every rank if the system refuses a file to any."""
    own = together(lambda: find_damage(checkpoint, world.rank, world.size), FILE_FAILURES)
    found = gather_objects(own)
    return next((damage for damage in found if damage is not None), None)
