"""Which rows form a chunk. The logits of one chunk are all that exist at a time."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

CPU_CHUNK_ELEMENTS = 2**24
"""logits in one chunk, 64 MiB of float32 per model: smaller chunks read the head too often"""
GPU_MIN_CHUNK_ROWS, GPU_MAX_CHUNK_ROWS = 1024, 2048
GEMM_TILE = (128, 256)
"""rows and columns of the result that one multiprocessor computes in a large half-precision GEMM"""
UNKNOWN_MULTIPROCESSORS = 132
"""an H100's, assumed where there is no GPU to ask (Triton's interpreter)"""


class Chunk(NamedTuple):
    rows: slice
    rollouts: slice | None
    """the whole rollouts in the chunk, by their place in cu_seqlens; None for pieces of rollouts"""


def most_rows(vocab_size: int, hidden_size: int, device: torch.device) -> int:
    """Returns the largest number of rows in a chunk.

    On a GPU, the number with which the product back to (rows, hidden size) fills every
    multiprocessor once, or as often as it takes to reach the paper's rollouts of 1024 tokens. On an
    H100 that is 1024 for a hidden size of 4096, 1664 for 2560 and 2048 for 2048; on an A100 1536
    for 4096. More rows would only take more memory, 10 bytes per logit.
    """
    if device.type == "cpu":
        return max(1, CPU_CHUNK_ELEMENTS // vocab_size)
    tiles = max(1, _multiprocessors(device) // max(1, hidden_size // GEMM_TILE[1]))
    rows = tiles * GEMM_TILE[0]
    return min(rows * math.ceil(GPU_MIN_CHUNK_ROWS / rows), GPU_MAX_CHUNK_ROWS)


def _multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return UNKNOWN_MULTIPROCESSORS


def row_slices(num_rows: int, most: int) -> list[slice]:
    """Returns the fewest slices of at most `most` rows, all of about the same size."""
    if num_rows == 0:
        return []
    size = math.ceil(num_rows / math.ceil(num_rows / most))
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def plan_chunks(cu_seqlens: Tensor, num_rows: int, most: int, *, whole: bool) -> list[Chunk]:
    """Divides the rows into chunks of at most `most`.

    With `whole`, a chunk takes as many consecutive rollouts as fit, and only longer ones are split.
    That needs the values of the bounds, which are read on the CPU alone, where it does not wait.
    With bounds on a GPU the rows are split anywhere, unless one chunk takes them all.
    """
    num_rollouts = len(cu_seqlens) - 1
    if whole and num_rows <= most:
        return [Chunk(slice(0, num_rows), slice(0, num_rollouts))]
    if not whole or cu_seqlens.device.type != "cpu":
        return [Chunk(rows, None) for rows in row_slices(num_rows, most)]
    bounds = cu_seqlens.tolist()
    chunks: list[Chunk] = []
    first = 0
    for index, (start, end) in enumerate(itertools.pairwise(bounds)):
        if end - bounds[first] > most and index > first:
            chunks.append(Chunk(slice(bounds[first], start), slice(first, index)))
            first = index
        if end - start > most:
            for rows in row_slices(end - start, most):
                chunks.append(Chunk(slice(start + rows.start, start + rows.stop), None))
            first = index + 1
    if first < num_rollouts:
        chunks.append(Chunk(slice(bounds[first], num_rows), slice(first, num_rollouts)))
    return [chunk for chunk in chunks if chunk.rows.stop > chunk.rows.start]


def largest_chunk(chunks: list[Chunk]) -> int:
    return max((chunk.rows.stop - chunk.rows.start for chunk in chunks), default=0)
