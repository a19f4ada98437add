"""Atomic, sharded checkpoints of a run, from which training resumes bit for bit.

`checkpoints/step-N/` holds

    adapter_model.safetensors, adapter_config.json    read by peft and vLLM; with LoRA off, the
                                                      model in transformers' format
    trainer/                                          trained weights, the optimizer's moments and
                                                      what a moving teacher keeps, float32 (the
                                                      copy of a whole model in its own dtype), each
                                                      rank its own shards
    rng-RANK.safetensors                              the random generators of each rank
    trainer_state.json                                the step, the number of ranks
    manifest.json                                     every other file's size and checksum

Any number of ranks can load the shards, sharded or not. Data order, rollout seeds and the learning
rate are pure functions of the step, so nothing else is needed. Ranks on several nodes need a run
directory on a shared file system.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import save

from paint_engine.checkpoint.directory import (
    Manifest,
    checkpoint_directory,
    file_names,
    prune,
    seal,
)
from paint_engine.checkpoint.state import (
    SHARDS,
    damage_of,
    shard_files,
    state_tensors,
    write_random_state,
)
from paint_engine.checkpoint.weights import gather_weights, write_weights
from paint_engine.distributed import World, gather_objects, raise_together, together
from paint_engine.files import (
    FILE_FAILURES,
    MANIFEST_FILE,
    STATE_FILE,
    WriteFailed,
    make_unfinished,
    publish_directory,
    remove_at_once,
    remove_tree,
    unfinished_path,
    write_failure,
    write_json,
)
from paint_engine.model import Teacher


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
        (make_unfinished(self.target, self.unfinished) / SHARDS).mkdir()

    def write_shards(self, tensors: dict[str, Tensor], world: World) -> None:
        """Writes this rank's shards; one rank writes a tensor that all ranks hold."""
        path = str(self.unfinished / SHARDS)
        with shard_files():
            save(
                {**tensors},
                storage_writer=HuggingFaceStorageWriter(path, save_distributed=True),
                no_dist=world.size == 1,
            )

    def write_small_files(
        self, model: nn.Module, weights: dict[str, Tensor], state: dict[str, Any], world: World
    ) -> None:
        if not self.unfinished.is_dir():
            raise WriteFailed(
                f"rank {world.rank} does not see the directory: use a --run.dir on a file system "
                "that all nodes share"
            )
        write_random_state(self.unfinished / f"rng-{world.rank}.safetensors", world.device)
        if world.is_main:
            write_weights(model, weights, self.unfinished)
            record = {"state": state, "world_size": world.size}
            write_json(self.unfinished / STATE_FILE, record)

    def seal(self, world: World) -> Manifest:
        """Makes this rank's share of the files durable; returns the entries of all. A
        collective."""
        # All ranks' lists, since one rank's view of a shared directory may be outdated.
        listed = set().union(*gather_objects(set(file_names(self.unfinished))))
        share: Manifest = {}
        names = sorted(listed)[world.rank :: world.size]
        self.attempt(lambda: share.update(seal(self.unfinished, names)))
        return {name: entry for part in gather_objects(share) for name, entry in part.items()}

    def publish(self, manifest: Manifest) -> None:
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
    teacher: Teacher | None = None,
) -> Path:
    """Writes `checkpoints/step-N` (N = state["step"]) under another name, then renames it.

    A collective: every rank calls it, with the same `state`. An intact checkpoint of that step is
    left as it is.
    state: JSON-serialisable, with the key `step`.
    keep: how many of the newest checkpoints are kept, in addition to the one marked as best.
    teacher: what it keeps, such as a running mean, is saved with the weights.

    Raises WriteFailed, on every rank, where any rank cannot write, and ReadFailed where a
    checkpoint of that step is there and cannot be read.
    """
    target = checkpoint_directory(run_dir) / f"step-{int(state['step'])}"
    if gather_objects(target.is_dir())[0] and damage_of(target, world) is None:
        # The process that has written it may have been killed before it deleted older ones.
        _prune(run_dir, target, keep, world)
        return target
    weights = gather_weights(model, keep=world.is_main)
    tensors = state_tensors(model, optimizer, teacher)
    # A DTensor counts all its shards, so this is the total over the ranks.
    num_bytes = sum(t.numel() * t.element_size() for t in (*weights.values(), *tensors.values()))
    unfinished = gather_objects(unfinished_path(target))[0]
    saving = _Saving(target, unfinished, num_bytes, shutil.disk_usage(run_dir).free)
    try:
        saving.attempt(lambda: world.is_main and saving.make_directory())
        saving.attempt(lambda: saving.write_small_files(model, weights, state, world))
        saving.attempt(lambda: saving.write_shards(tensors, world))
        manifest = saving.seal(world)
        saving.attempt(lambda: world.is_main and saving.publish(manifest))
    except WriteFailed:
        if world.is_main:
            remove_tree(unfinished)
        raise
    _prune(run_dir, target, keep, world)
    return target


def _prune(run_dir: Path, newest: Path, keep: int, world: World) -> None:
    together(lambda: world.is_main and prune(run_dir, newest, keep), FILE_FAILURES)
