"""Restores the newest intact checkpoint of a run. See `save` for what it holds."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.tensor import DTensor

from paint_engine.checkpoint.directory import checkpoint_step, list_checkpoints
from paint_engine.checkpoint.state import (
    MOMENTS,
    SHARDS,
    STEPS,
    TEACHERS,
    WEIGHT,
    Saved,
    damage_of,
    kept_by_teacher,
    read_random_state,
    shard_files,
    trained_parameters,
)
from paint_engine.distributed import World, gather_objects, together
from paint_engine.files import FILE_FAILURES, STATE_FILE, BadFile, read_json, reading
from paint_engine.model import Teacher
from paint_engine.model.teachers import STORED_AS


def load_checkpoint(
    run_dir: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    world: World,
    warn: Callable[[str], object],
    teacher: Teacher | None = None,
    replace_it: str = "--run.overwrite true",
) -> dict[str, Any] | None:
    """Restores the newest intact checkpoint and returns the state saved with it; None if there is
    no checkpoint.

    A collective. Weights and moments are restored on any number of ranks, the random generators
    only on as many as saved them.
    warn: called on the main rank with a line about each damaged checkpoint that is skipped.
    teacher: what it keeps is restored; without one, what was saved of a teacher is ignored.
    replace_it: the flags that start the run again, for the message.

    Raises ValueError where every checkpoint is damaged, or where the newest intact one is of
    another model, lacks what the teacher keeps or was not written by `save_checkpoint`; ReadFailed
    where the system refuses to read one, which may be intact.
    """
    checkpoints = gather_objects(together(lambda: list_checkpoints(run_dir), FILE_FAILURES))[0]
    for checkpoint in reversed(checkpoints):
        damage = damage_of(checkpoint, world)
        if damage is None:
            return _restore(checkpoint, model, optimizer, world, teacher)
        if world.is_main:
            warn(f"{checkpoint} is damaged ({damage}): trying the one before it")
    if checkpoints:
        names = ", ".join(path.name for path in checkpoints)
        raise ValueError(
            f"{run_dir} has no intact checkpoint: {names} are all damaged; restore one from a "
            f"copy, or start again with {replace_it}"
        )
    return None


def load_step(
    checkpoint: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    world: World,
    teacher: Teacher | None = None,
) -> None:
    """Restores one checkpoint of a run as `load_checkpoint` does, an older one than the newest.

    Raises BadFile where it is damaged, and what `load_checkpoint` raises. A collective call.
    """
    damage = damage_of(checkpoint, world)
    if damage is not None:
        raise BadFile(f"{checkpoint} is damaged ({damage}); restore it from a copy")
    _restore(checkpoint, model, optimizer, world, teacher)


def _restore(
    checkpoint: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    world: World,
    teacher: Teacher | None,
) -> dict[str, Any]:
    parameters, kept = trained_parameters(model), kept_by_teacher(model, teacher)
    reader = HuggingFaceStorageReader(str(checkpoint / SHARDS))
    saved, stored = together(
        lambda: _read_record(checkpoint, reader, parameters, kept), (ValueError, *FILE_FAILURES)
    )
    tensors = _destinations(stored, parameters, kept, optimizer)

    def load_all() -> None:
        with _readable(checkpoint), shard_files():
            load({**tensors}, storage_reader=reader, no_dist=world.size == 1)
        _check_values(checkpoint, tensors)
        if saved.world_size == world.size:
            with _readable(file := checkpoint / f"rng-{world.rank}.safetensors"):
                read_random_state(file, world.device, _REMEDY)

    together(load_all, FILE_FAILURES)
    return saved.state


def _read_record(
    checkpoint: Path,
    reader: HuggingFaceStorageReader,
    parameters: dict[str, nn.Parameter],
    kept: dict[str, Tensor],
) -> tuple[Saved, dict[str, Any]]:
    """The small record, and what the shards hold by entry, both checked against the model."""
    saved = read_json(checkpoint / STATE_FILE, Saved)
    step = saved.state.get("step")
    if type(step) is not int or step != checkpoint_step(checkpoint):
        raise BadFile(
            f"{checkpoint / STATE_FILE}: step: got {str(step)[:60]!r}; needs the step of "
            f"{checkpoint.name}; {_REMEDY}"
        )
    with _readable(checkpoint):
        stored: dict[str, Any] = reader.read_metadata().state_dict_metadata
    _check_same_model(checkpoint, stored, parameters)
    _check_has_teacher(checkpoint, stored, kept)
    _check_entries(checkpoint, stored, parameters, kept)
    return saved, stored


def _destinations(
    stored: Iterable[str],
    parameters: dict[str, nn.Parameter],
    kept: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> dict[str, Tensor]:
    """Where each entry of the shards is loaded to: the weights, what the teacher keeps, and new
    moments, which replace those that the optimizer has."""
    tensors: dict[str, Tensor] = {}
    optimizer.state.clear()
    for entry in stored:
        kind, _, name = entry.partition("/")
        parameter = parameters[name]
        if kind == WEIGHT:
            tensors[entry] = parameter.detach()
        elif kind in TEACHERS:
            if entry in kept:
                tensors[entry] = kept[entry]
        else:
            moment = torch.zeros(()) if kind == STEPS else torch.zeros_like(parameter.detach())
            tensors[entry] = optimizer.state[parameter][kind] = moment
    return tensors


_REMEDY = (
    "it was changed by hand, or another version has written it: restore it from a copy, or move "
    "that checkpoint away to resume from the one before it"
)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Around the libraries that read a checkpoint's tensors: whatever they raise is the file's
    fault, for its checksum is right. Raises BadFile and ReadFailed."""
    try:
        with reading(path):
            yield
    except FILE_FAILURES:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {str(error)[:200]}"
        raise BadFile(f"{path} cannot be read ({said}); {_REMEDY}") from error


def _check_entries(
    checkpoint: Path,
    stored: dict[str, Any],
    parameters: dict[str, nn.Parameter],
    kept: dict[str, Tensor],
) -> None:
    """Raises BadFile unless every tensor has its place, its whole shape and its dtype, and each
    weight all of its moments or, before the first step, none."""
    kinds: dict[str, set[str]] = {}
    for entry, meta in stored.items():
        kind, _, name = entry.partition("/")
        known = name in parameters and kind in {WEIGHT, *TEACHERS, *MOMENTS}
        shape = () if kind == STEPS or not known else parameters[name].shape
        dtype = torch.float32 if kind == STEPS or not known else parameters[name].dtype
        if kind in TEACHERS and known:
            # What no teacher wants is not read, so its dtype does not matter.
            dtype = kept[entry].dtype if entry in kept else meta.properties.dtype
        # A gap between the chunks of several ranks would keep what was there before.
        filled = sum(chunk.sizes.numel() for chunk in meta.chunks) == meta.size.numel()
        found = f"{tuple(meta.size)} of {meta.properties.dtype}"
        if not known or meta.size != shape or meta.properties.dtype != dtype or not filled:
            needed = f"{tuple(shape)} of {dtype}, whole" if known else "no such tensor"
            raise BadFile(
                f"{checkpoint / SHARDS}: {entry!r} is {found}{'' if filled else ', in part'}; "
                f"needs {needed}; {_REMEDY}"
            )
        kinds.setdefault(name, set()).add(kind)
    for name, found in kinds.items():
        if missing := sorted(MOMENTS - found) if found & MOMENTS else []:
            raise BadFile(
                f"{checkpoint / SHARDS}: {name!r} has no {', '.join(missing)}; needs all of "
                f"{', '.join(sorted(MOMENTS))}; {_REMEDY}"
            )


def _check_values(checkpoint: Path, tensors: dict[str, Tensor]) -> None:
    """Raises BadFile for values in this rank's shards that no run saves: the optimizer divides by
    what its count of steps gives, and takes the square root of the second moments."""
    for entry, tensor in tensors.items():
        kind = entry.partition("/")[0]
        values = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        wrong, needed = ~values.isfinite(), "finite values"
        if kind == STEPS:
            wrong, needed = wrong | (values < 0) | (values != values.floor()), "a count of steps"
        elif kind == "exp_avg_sq":
            wrong, needed = wrong | (values < 0), "finite values of at least 0"
        if wrong.any():
            raise BadFile(
                f"{checkpoint / SHARDS}: {entry!r} holds {values[wrong][0].item()}; needs "
                f"{needed}; {_REMEDY}"
            )


def _check_same_model(
    checkpoint: Path, stored: dict[str, Any], parameters: dict[str, nn.Parameter]
) -> None:
    """Compares the shapes of unsharded tensors, so that every rank decides alike."""
    saved = {e.partition("/")[2]: m.size for e, m in stored.items() if e.startswith(WEIGHT + "/")}
    present = {name: parameter.shape for name, parameter in parameters.items()}
    differing = sorted(n for n in saved | present if saved.get(n) != present.get(n))
    if differing:
        first = differing[0]
        sizes = [tuple(at[first]) if first in at else "absent" for at in (saved, present)]
        raise ValueError(
            f"{checkpoint} is of another model: {len(differing)} weights differ, among them "
            f"{first} ({sizes[0]} in the checkpoint, {sizes[1]} in this model); resume with the "
            "model and the lora settings that the run was started with, or start a new run"
        )


def _check_has_teacher(checkpoint: Path, stored: dict[str, Any], kept: dict[str, Tensor]) -> None:
    missing = [entry for entry in kept if entry not in stored]
    if missing:
        raise ValueError(
            f"{checkpoint} holds no {STORED_AS[missing[0].partition('/')[0]]}, which this run's "
            "teacher needs: it was saved with another teacher; resume with the --teacher.weights "
            "and --teacher.refresh_every that the run was started with, or start a new run"
        )
