"""Atomic, sharded checkpoints of a run, from which training resumes bit for bit.

`checkpoints/step-N/` holds

    adapter_model.safetensors, adapter_config.json    read by peft and vLLM; with LoRA off, the
                                                      model in transformers' format
    trainer/                                          trained weights, the optimizer's moments and
                                                      the running mean of an EMA teacher, float32,
                                                      each rank its own shards
    rng-RANK.safetensors                              the random generators of each rank
    trainer_state.json                                the step, the number of ranks
    manifest.json                                     every other file's size and checksum

Any number of ranks can load the shards, sharded or not. Data order, rollout seeds and the learning
rate are pure functions of the step, so nothing else is needed. Ranks on several nodes need a run
directory on a shared file system.
"""

import json
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import PositiveInt
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from paint_engine.checkpoint.directory import (
    Manifest,
    checkpoint_directory,
    checkpoint_step,
    file_names,
    find_damage,
    list_checkpoints,
    prune,
    seal,
)
from paint_engine.checkpoint.weights import gather_weights, write_weights
from paint_engine.distributed import World, gather_objects, raise_together, together
from paint_engine.files import (
    FILE_FAILURES,
    MANIFEST_FILE,
    STATE_FILE,
    BadFile,
    Record,
    WriteFailed,
    make_unfinished,
    publish_directory,
    read_json,
    reading,
    remove_at_once,
    remove_tree,
    unfinished_path,
    write_failure,
    write_json,
)
from paint_engine.model import EmaTeacher

_SHARDS = "trainer"
# A weight is filed as "weight/NAME", a moment as "exp_avg/NAME", a running mean as "ema/NAME".
_WEIGHT, _EMA = "weight", "ema"
# AdamW's; its count of steps has no dimension and is on the CPU.
_STEPS = "step"
_MOMENTS = {_STEPS, "exp_avg", "exp_avg_sq"}


class _Saved(Record):
    """`trainer_state.json`. What else `state` holds is checked by those who use it."""

    state: dict[str, Any]
    world_size: PositiveInt


# ---- the state of one rank -----------------------------------------------------------------------


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _means(model: nn.Module, ema: EmaTeacher | None) -> dict[str, Tensor]:
    """The EMA teacher's running means, by the names of their weights."""
    return {} if ema is None else dict(zip(_trained(model), ema.shadow, strict=True))


def _state_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, ema: EmaTeacher | None
) -> dict[str, Tensor]:
    """Weights, moments and running means: unsharded, or this rank's shards as DTensors."""
    tensors = {f"{_EMA}/{name}": mean for name, mean in _means(model, ema).items()}
    for name, parameter in _trained(model).items():
        tensors[f"{_WEIGHT}/{name}"] = parameter.detach()
        for moment, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{moment}/{name}"] = value
    return tensors


def _write_random_state(file: Path, device: torch.device) -> None:
    tensors = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    name, keys, *rest = np.random.get_state(legacy=True)
    numpy_state = [name, np.asarray(keys).tolist(), *rest]
    metadata = {"python": json.dumps(random.getstate()), "numpy": json.dumps(numpy_state)}
    save_file(tensors, file, metadata=metadata)


def _read_random_state(file: Path, device: torch.device) -> None:
    with safe_open(file, framework="pt") as stream:
        metadata = stream.metadata()
        torch.set_rng_state(stream.get_tensor("torch"))
        if device.type == "cuda" and "cuda" in stream.keys():  # noqa: SIM118 (no container)
            torch.cuda.set_rng_state(stream.get_tensor("cuda"), device)
    version, keys, gauss = json.loads(metadata["python"])
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(json.loads(metadata["numpy"])))


@contextmanager
def _shard_files() -> Iterator[None]:
    """Wraps torch.distributed.checkpoint: drops its warning that there is no process group, and
    raises the first rank's exception instead of CheckpointException."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as wrapped:
            failure, _ = next(iter(wrapped.failures.values()))
            raise failure from wrapped


# ---- saving --------------------------------------------------------------------------------------


def _damage(checkpoint: Path, world: World) -> str | None:
    """The damage that the lowest rank found; None if no rank found any. A collective: raises
    ReadFailed on every rank if the system refuses a file to any."""
    own = together(lambda: find_damage(checkpoint, world.rank, world.size), FILE_FAILURES)
    found = gather_objects(own)
    return next((damage for damage in found if damage is not None), None)


@dataclass(frozen=True)
class _Saving:
    """One checkpoint while it is written. If one rank fails, all ranks give it up."""

    target: Path
    unfinished: Path
    num_bytes: int
    free_bytes: int

    def attempt(self, write: Callable[[], object]) -> None:
        """Runs this rank's part. A collective; WriteFailed on every rank if any could not write."""
        error = None
        try:
            write()
        except Exception as failure:
            reason = failure if isinstance(failure, WriteFailed) else write_failure(failure)
            if reason is None:
                raise
            error = WriteFailed(
                f"{self.target.name} could not be saved in {self.target.parent} ({reason}): it "
                f"takes about {self.num_bytes / 1e6:.3g} MB, and {self.free_bytes / 1e6:.3g} MB "
                "were free; its files were removed, and earlier checkpoints are intact "
                "(--checkpoint.keep limits how many are kept)"
            )
        raise_together(error)

    def make_directory(self) -> None:
        (make_unfinished(self.target, self.unfinished) / _SHARDS).mkdir()

    def write_shards(self, tensors: dict[str, Tensor], world: World) -> None:
        """Writes this rank's shards; one rank writes a tensor that all ranks hold."""
        path = str(self.unfinished / _SHARDS)
        with _shard_files():
            save(
                {**tensors},
                storage_writer=HuggingFaceStorageWriter(path, save_distributed=True),
                no_dist=world.size == 1,
            )

    def finish(self, manifest: Manifest) -> None:
        write_json(self.unfinished / MANIFEST_FILE, manifest)
        if self.target.exists():
            remove_at_once(self.target)
        publish_directory(self.unfinished, self.target)


def save_checkpoint(
    run_dir: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    *,
    keep: int,
    world: World,
    ema: EmaTeacher | None = None,
) -> Path:
    """Writes `checkpoints/step-N` (N = state["step"]) under another name, then renames it.

    A collective: every rank calls it, with the same `state`. An intact checkpoint of that step is
    left as it is.
    state: JSON-serialisable, with the key `step`.
    keep: how many of the newest checkpoints are kept, in addition to the one marked as best.
    ema: the teacher whose running mean is saved with the weights.

    Raises WriteFailed, on every rank, where any rank cannot write, and ReadFailed where a
    checkpoint of that step is there and cannot be read.
    """
    target = checkpoint_directory(run_dir) / f"step-{int(state['step'])}"
    if gather_objects(target.is_dir())[0] and _damage(target, world) is None:
        # The process that has written it may have been killed before it deleted older ones.
        _prune(run_dir, target, keep, world)
        return target
    weights = gather_weights(model, keep=world.is_main)
    tensors = _state_tensors(model, optimizer, ema)
    # A DTensor counts all its shards, so this is the total over the ranks.
    num_bytes = sum(t.numel() * t.element_size() for t in (*weights.values(), *tensors.values()))
    unfinished, share = gather_objects(unfinished_path(target))[0], {}
    saving = _Saving(target, unfinished, num_bytes, shutil.disk_usage(run_dir).free)

    def write_small_files() -> None:
        if not unfinished.is_dir():
            raise WriteFailed(
                f"rank {world.rank} does not see the directory: use a --run.dir on a file system "
                "that all nodes share"
            )
        _write_random_state(unfinished / f"rng-{world.rank}.safetensors", world.device)
        if world.is_main:
            write_weights(model, weights, unfinished)
            record = {"state": state, "world_size": world.size}
            write_json(unfinished / STATE_FILE, record)

    try:
        saving.attempt(lambda: world.is_main and saving.make_directory())
        saving.attempt(write_small_files)
        saving.attempt(lambda: saving.write_shards(tensors, world))
        # All ranks' lists, since one rank's view of a shared directory may be outdated.
        listed = set().union(*gather_objects(set(file_names(unfinished))))
        names = sorted(listed)[world.rank :: world.size]
        saving.attempt(lambda: share.update(seal(unfinished, names)))
        manifest = {name: entry for part in gather_objects(share) for name, entry in part.items()}
        saving.attempt(lambda: world.is_main and saving.finish(manifest))
    except WriteFailed:
        if world.is_main:
            remove_tree(unfinished)
        raise
    _prune(run_dir, target, keep, world)
    return target


def _prune(run_dir: Path, newest: Path, keep: int, world: World) -> None:
    together(lambda: world.is_main and prune(run_dir, newest, keep), FILE_FAILURES)


# ---- loading -------------------------------------------------------------------------------------


def load_checkpoint(
    run_dir: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    world: World,
    warn: Callable[[str], object],
    ema: EmaTeacher | None = None,
    replace_it: str = "--run.overwrite true",
) -> dict[str, Any] | None:
    """Restores the newest intact checkpoint and returns the state saved with it; None if there is
    no checkpoint.

    A collective. Weights and moments are restored on any number of ranks, the random generators
    only on as many as saved them.
    warn: called on the main rank with a line about each damaged checkpoint that is skipped.
    ema: the teacher whose running mean is restored; without one, a saved mean is ignored.
    replace_it: the flags that start the run again, for the message.

    Raises ValueError where every checkpoint is damaged, or where the newest intact one is of
    another model, lacks the running mean or was not written by `save_checkpoint`; ReadFailed where
    the system refuses to read one, which may be intact.
    """
    checkpoints = gather_objects(together(lambda: list_checkpoints(run_dir), FILE_FAILURES))[0]
    for checkpoint in reversed(checkpoints):
        damage = _damage(checkpoint, world)
        if damage is None:
            return _restore(checkpoint, model, optimizer, world, ema)
        if world.is_main:
            warn(f"{checkpoint} is damaged ({damage}): trying the one before it")
    if checkpoints:
        names = ", ".join(path.name for path in checkpoints)
        raise ValueError(
            f"{run_dir} has no intact checkpoint: {names} are all damaged; restore one from a "
            f"copy, or start again with {replace_it}"
        )
    return None


def _restore(
    checkpoint: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    world: World,
    ema: EmaTeacher | None,
) -> dict[str, Any]:
    parameters, means = _trained(model), _means(model, ema)
    reader = HuggingFaceStorageReader(str(checkpoint / _SHARDS))

    def read() -> tuple[_Saved, dict[str, TensorStorageMetadata]]:
        saved = read_json(checkpoint / STATE_FILE, _Saved)
        step = saved.state.get("step")
        if type(step) is not int or step != checkpoint_step(checkpoint):
            raise BadFile(
                f"{checkpoint / STATE_FILE}: step: got {str(step)[:60]!r}; needs the step of "
                f"{checkpoint.name}; {_REMEDY}"
            )
        with _readable(checkpoint):
            stored: dict[str, Any] = reader.read_metadata().state_dict_metadata
        _check_same_model(checkpoint, stored, parameters)
        _check_has_means(checkpoint, stored, means)
        _check_entries(checkpoint, stored, parameters)
        return saved, stored

    saved, stored = together(read, (ValueError, *FILE_FAILURES))
    tensors: dict[str, Tensor] = {}
    optimizer.state.clear()
    for entry in stored:
        kind, _, name = entry.partition("/")
        parameter = parameters[name]
        if kind == _WEIGHT:
            tensors[entry] = parameter.detach()
        elif kind == _EMA:
            if name in means:
                tensors[entry] = means[name]
        else:
            moment = torch.zeros(()) if kind == _STEPS else torch.zeros_like(parameter.detach())
            tensors[entry] = optimizer.state[parameter][kind] = moment

    def load_all() -> None:
        with _readable(checkpoint), _shard_files():
            load({**tensors}, storage_reader=reader, no_dist=world.size == 1)
        if saved.world_size == world.size:
            with _readable(file := checkpoint / f"rng-{world.rank}.safetensors"):
                _read_random_state(file, world.device)

    together(load_all, FILE_FAILURES)
    return saved.state


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
    checkpoint: Path, stored: dict[str, Any], parameters: dict[str, nn.Parameter]
) -> None:
    """Raises BadFile unless every tensor has its place, its whole shape and its dtype, and each
    weight all of its moments or, before the first step, none."""
    kinds: dict[str, set[str]] = {}
    for entry, meta in stored.items():
        kind, _, name = entry.partition("/")
        known = name in parameters and kind in {_WEIGHT, _EMA, *_MOMENTS}
        shape = () if kind == _STEPS or not known else parameters[name].shape
        dtype = torch.float32 if kind == _STEPS or not known else parameters[name].dtype
        # A gap between the chunks of several ranks would keep what was there before.
        filled = sum(chunk.sizes.numel() for chunk in meta.chunks) == meta.size.numel()
        found = f"{tuple(meta.size)} of {meta.properties.dtype}"
        if not known or meta.size != shape or meta.properties.dtype != dtype or not filled:
            needed = f"{tuple(shape)} of {dtype}, whole" if known else "no such tensor"
            raise BadFile(
                f"{checkpoint / _SHARDS}: {entry!r} is {found}{'' if filled else ', in part'}; "
                f"needs {needed}; {_REMEDY}"
            )
        kinds.setdefault(name, set()).add(kind)
    for name, found in kinds.items():
        if missing := sorted(_MOMENTS - found) if found & _MOMENTS else []:
            raise BadFile(
                f"{checkpoint / _SHARDS}: {name!r} has no {', '.join(missing)}; needs all of "
                f"{', '.join(sorted(_MOMENTS))}; {_REMEDY}"
            )


def _check_same_model(
    checkpoint: Path, stored: dict[str, Any], parameters: dict[str, nn.Parameter]
) -> None:
    """Compares the shapes of unsharded tensors, so that every rank decides alike."""
    saved = {e.partition("/")[2]: m.size for e, m in stored.items() if e.startswith(_WEIGHT + "/")}
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


def _check_has_means(checkpoint: Path, stored: dict[str, Any], means: dict[str, Tensor]) -> None:
    missing = [name for name in means if f"{_EMA}/{name}" not in stored]
    if missing:
        raise ValueError(
            f"{checkpoint} holds no running mean of the adapters, which teacher.weights 'ema' "
            "needs: it was saved with another teacher; resume with the --teacher.weights that the "
            "run was started with, or start a new run"
        )
