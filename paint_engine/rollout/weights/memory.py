"""Hands a whole model to the vLLM engines of a node through memory that they share, without files.

One process of each node copies the trained weights there, tensor by tensor, in the dtype that vLLM
computes in. Each engine reads them from there, now and whenever it needs them again: after a
restart, or after it has sampled from the base.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from paint_engine.checkpoint.weights import trained_weights, whole
from paint_engine.distributed import World, barrier, gather_objects, raise_together
from paint_engine.files import WriteFailed, write_failure
from paint_engine.model import compute_dtype

# Each tensor begins at a multiple of so many bytes.
_ALIGNMENT = 64


@dataclass(frozen=True)
class SharedWeights:
    """A model's weights in shared memory.

    SharedWeights("/proc/812/fd/9", 16381470720, 40, torch.bfloat16,
                  ("model.embed_tokens.weight", ...), ((151936, 4096), ...), (0, ...))

    path: where the processes of the node open the memory, as long as its owner lives.
    weights_version: the number of finished steps.
    offsets: the first byte of each tensor.
    """

    path: str
    num_bytes: int
    weights_version: int
    dtype: torch.dtype
    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    offsets: tuple[int, ...]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the names of the weights and views of them, which the next sync changes."""
        memory = torch.from_file(self.path, shared=True, size=self.num_bytes, dtype=torch.uint8)
        for name, shape, offset in zip(self.names, self.shapes, self.offsets, strict=True):
            num_bytes = shape.numel() * self.dtype.itemsize
            yield name, memory[offset : offset + num_bytes].view(self.dtype).view(shape)


def has_shared_memory() -> bool:
    """Returns whether this system has memory without a name, which others open by a process's
    number: Linux."""
    return hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd")


class WeightMemory:
    """Hands one run's whole model to vLLM, with one copy of it on each node. The system frees the
    memory when the process that owns it ends, in whatever way.

    model: the student, without adapters.

    The constructor is a collective call.
    """

    def __init__(self, model: nn.Module, world: World) -> None:
        self._model = model
        self._writes = world.writes_for_node
        dtype = compute_dtype(model)
        shapes = {name: tensor.shape for name, tensor in trained_weights(model).items()}
        ends = accumulate(
            -(-shape.numel() * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
            for shape in shapes.values()
        )
        *offsets, self._num_bytes = (0, *ends)
        self._handle = os.memfd_create("paint-weights") if self._writes else None
        # Only the first sync takes the memory.
        self._is_reserved = False
        paths = gather_objects(f"/proc/{os.getpid()}/fd/{self._handle}")
        self._placed = SharedWeights(
            path=paths[world.rank - world.local_rank],
            num_bytes=self._num_bytes,
            weights_version=-1,
            dtype=dtype,
            names=tuple(shapes),
            shapes=tuple(shapes.values()),
            offsets=tuple(offsets),
        )

    def write(self, weights_version: int) -> SharedWeights:
        """Copies the student's current weights to the memory, in place of the previous ones. A
        collective call.

        Raises WriteFailed, on every rank, if a node has no room for them.
        """
        raise_together(self._reserve())
        # Every engine is idle from here on: none reads the previous weights any more.
        barrier()
        places = self._placed.tensors() if self._writes else None
        for name, tensor in trained_weights(self._model).items():
            full = whole(tensor.detach())
            if places is not None:
                placed, memory = next(places)
                assert placed == name, (placed, name)
                memory.copy_(full.to(self._placed.dtype))
        # No engine reads before the last rank has written.
        barrier()
        return SharedWeights(**{**vars(self._placed), "weights_version": weights_version})

    def _reserve(self) -> WriteFailed | None:
        """Takes the memory now: a page that cannot be had later would end the process."""
        if self._handle is None or self._is_reserved:
            return None
        try:
            os.posix_fallocate(self._handle, 0, self._num_bytes)
        except OSError as problem:
            return WriteFailed(
                f"the weights for vLLM have no room in this node's memory "
                f"({write_failure(problem)}); needs {self._num_bytes / 1e9:.3g} GB of it; free "
                "some, or name a directory for them with --rollout.adapter_dir"
            )
        self._is_reserved = True
        return None

    def close(self) -> None:
        """Frees the memory, once no engine reads it. A second call does nothing."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
