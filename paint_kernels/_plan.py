"""Which rows are computed together: a chunk's logits are all the logits there are at one time."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

CPU_CHUNK_ELEMENTS = 2**24
"""logits in one chunk, 64 MiB of float32 a model: fewer rows read the head too often"""
GPU_MIN_CHUNK_ROWS, GPU_MAX_CHUNK_ROWS = 1024, 2048
GEMM_TILE = (128, 256)
"""rows and columns of the result that one multiprocessor works on in a large half-precision GEMM"""
UNKNOWN_MULTIPROCESSORS = 132
"""an H100's, where no GPU says otherwise (Triton's interpreter)"""


class Chunk(NamedTuple):
    rows: slice
    rollouts: slice | None
    """of cu_seqlens, where the chunk holds whole rollouts: selection is local to it then"""


def most_rows(vocab_size: int, hidden_size: int, device: torch.device) -> int:
    """The most rows of a chunk.

    On a GPU, as many as let the product that goes back to (rows, hidden size) fill every
    multiprocessor once, or more often up to the paper's rollouts of 1024 tokens: on an H100 1024
    for a hidden size of 4096, 1664 for 2560, 2048 for 2048; 1536 for 4096 on an A100. More rows
    would only take more memory, 10 bytes a logit.
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
    """As few slices of at most `most` rows as there can be, all of about one size."""
    if num_rows == 0:
        return []
    size = math.ceil(num_rows / math.ceil(num_rows / most))
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def plan_chunks(cu_seqlens: Tensor, num_rows: int, most: int, *, whole: bool) -> list[Chunk]:
    """With `whole`, consecutive rollouts together while they fit into `most` rows, longer ones in
    pieces; otherwise pieces alone.

    The bounds are read only on the CPU, where that makes nobody wait. Bounds on a GPU are as good
    where one chunk takes all rows, and otherwise leave pieces of unknown rollouts.
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
