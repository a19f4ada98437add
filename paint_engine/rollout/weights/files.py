"""Writes the trained weights to files that vLLM reads: a new directory and a new name at every
step.

vLLM's prefix cache is keyed by the adapter's name. A repeated name would return keys and values of
older weights.
"""

import hashlib
import os
import re
import secrets
import tempfile
import weakref
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn

from paint_engine.checkpoint.adapters.fit import vllm_obstacles
from paint_engine.checkpoint.weights import gather_weights, write_weights
from paint_engine.distributed import World, gather_objects, raise_together
from paint_engine.files import WriteFailed, is_ours, remove_tree, write_failure
from paint_engine.files.processes import is_alive, machine, start_of
from paint_engine.model import compute_dtype

_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class WrittenWeights:
    """WrittenWeights("paint-812-s96417-5d1ba3c0-9fc3e08b-7-v40", 7,
    Path("/dev/shm/paint-812-s96417-5d1ba3c0-9fc3e08b/7")): the seventh set that process 812 wrote,
    which started at 96417, with the weights after 40 steps."""

    name: str
    serial: int
    directory: Path


@dataclass(frozen=True)
class _Access:
    """Who may read the weights: the mode of a directory, and its group if it is another one."""

    mode: int
    group: int

    @classmethod
    def of(cls, directory: Path | None) -> "_Access":
        """As of this directory, which the user has made; None = only the user."""
        if directory is None:
            return cls(0o700, os.getegid())
        found = directory.stat()
        # A server that may not list the directory may not read what is in it.
        readers = sum(bits for bits in (0o050, 0o005) if found.st_mode & bits == bits)
        return cls(0o700 | readers, found.st_gid)

    def give(self, directory: Path) -> None:
        """Gives a directory and its files this access, the directory last."""
        for path in (*directory.iterdir(), directory):
            # With a file's own group, the bits of the group would be others' rights.
            if self.mode & 0o050 and path.stat().st_gid != self.group:
                os.chown(path, -1, self.group)
            path.chmod(self.mode if path.is_dir() else self.mode & 0o644)


class WeightFiles:
    """Hands one run's weights to vLLM as files.

    Only the newest set is kept. `close` deletes it, and so does an exception that ends the process.
    Sets of killed processes on this machine are deleted when the next process starts.

    model: the student. Its adapters are written, or the whole model if it has none.
    adapter_dir: an existing directory; None = shared memory, or the temporary directory of a system
        without it. Whoever may read adapter_dir may read the weights; in shared memory, the user.
    per_node: one rank of each node writes for that node; otherwise rank 0 writes for all.

    The constructor is a collective call. It raises ValueError if vLLM cannot load the adapters, or
    if adapter_dir cannot be used.
    """

    def __init__(
        self, model: nn.Module, world: World, adapter_dir: str | None, *, per_node: bool
    ) -> None:
        _check_adapters(model)
        self._model = model
        writer = world.rank - world.local_rank if per_node else 0
        self._writes = world.writes_for_node if per_node else world.is_main
        # Random digits make the name unique among nodes that share adapter_dir, and for a run that
        # returns to a server that has seen it before.
        writer_name = f"paint-{os.getpid()}-s{start_of(os.getpid())}-{_machine_digits()}"
        names = gather_objects(f"{writer_name}-{secrets.token_hex(4)}")
        self._name = names[writer]
        self._root = _parent(adapter_dir) / self._name
        self._serial = 0
        error = None
        if self._writes:
            try:
                _remove_orphans(self._root.parent)
                self._root.mkdir(0o700)
                self._access = _Access.of(None if adapter_dir is None else self._root.parent)
                self._access.give(self._root)
            except OSError as problem:
                error = (
                    f"cannot create the directory for the weights of vLLM ({problem}); needs an "
                    "existing directory that this process can write to; create it, or name "
                    "another with --rollout.adapter_dir"
                )
        raise_together(error)
        self._finalizer = weakref.finalize(self, _remove, self._root if self._writes else None)

    def write(self, weights_version: int) -> WrittenWeights:
        """Writes the student's current weights and deletes the previous set. A collective call.

        weights_version: the number of finished steps; it becomes part of the name.

        Raises WriteFailed, on every rank, if the directory has no room for them.
        """
        weights = gather_weights(self._model, keep=self._writes)
        self._serial += 1
        directory = self._root / str(self._serial)
        error = None
        if self._writes:
            # The trainer computes in this dtype, and so does vLLM: both would round to it. Adapters
            # are rounded by themselves, which keeps what their sum with the base would lose.
            dtype = compute_dtype(self._model)
            if dtype == torch.bfloat16 or not isinstance(self._model, PeftModel):
                weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
            num_bytes = sum(tensor.nbytes for tensor in weights.values())
            try:
                directory.mkdir(0o700)
                write_weights(self._model, weights, directory)
                self._access.give(directory)
            except Exception as problem:
                reason = write_failure(problem)
                if reason is None:
                    raise
                _remove(directory)
                error = WriteFailed(
                    f"the weights for vLLM could not be written to {directory} ({reason}); needs "
                    f"{2 * num_bytes / 1e9:.3g} GB there, for two sets of them; free space, or "
                    "name another directory with --rollout.adapter_dir"
                )
        # Every rank has reached this call, so no rank still reads the previous set.
        raise_together(error)
        if self._writes:
            _remove(self._root / str(self._serial - 1))
        name = f"{self._name}-{self._serial}-v{weights_version}"
        return WrittenWeights(name, self._serial, directory)

    def close(self) -> None:
        """Deletes every file."""
        self._finalizer()


def _check_adapters(model: nn.Module) -> None:
    if not isinstance(model, PeftModel):
        return
    names = [name for name, _ in model.named_parameters() if ".lora_" in name]
    if found := vllm_obstacles(model.peft_config["default"].to_dict(), names):
        raise ValueError(
            f"the student's adapters have {'; '.join(found)}, which vLLM does not load; needs LoRA "
            "matrices on linear layers alone; change --lora.target_modules, or use "
            "--rollout.engine builtin"
        )


def _parent(adapter_dir: str | None) -> Path:
    if adapter_dir is not None:
        return Path(adapter_dir).resolve()
    return _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())


def _machine_digits() -> str:
    """Returns eight digits that stand for the machine: of two containers with the same host name,
    one process id stands for two processes."""
    return hashlib.sha256(machine().encode()).hexdigest()[:8]


def _remove_orphans(parent: Path) -> None:
    """Deletes what killed processes of this machine left. SIGKILL runs no finalizer, and the files
    of a whole model occupy memory."""
    for directory in parent.glob("paint-*"):
        name = re.fullmatch(
            rf"paint-(\d+)-s(\d*)-{_machine_digits()}-[0-9a-f]{{8}}", directory.name
        )
        # Another user may have put a directory or a link of such a name there.
        if name is None or is_alive(int(name[1]), name[2]):
            continue
        with suppress(FileNotFoundError):
            if is_ours(directory):
                remove_tree(directory)


def _remove(directory: Path | None) -> None:
    if directory is not None:
        remove_tree(directory)
