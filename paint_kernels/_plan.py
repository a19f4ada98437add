"""Which rows form a chunk. The logits of one chunk are all that exist at a time."""

from __future__ import annotations

import bisect
import math
from typing import NamedTuple

import torch
from torch import Tensor

CPU_CHUNK_ELEMENTS = 2**24
"""logits of each of two models in one chunk, 64 MiB of float32: smaller chunks read the head too
often, and a product of 206 rows of 151,936 logits runs 1.3 times as fast as two of 103"""
CPU_ROWS_OF_ONE_MODEL = 7 / 3
"""as many rows has a chunk of one model: 257 of 151,936 logits, 156 MB. With twice as many, two
chunks of 256 rows would become three of 171, whose products take 1.1 times as long."""
BLOCK_ELEMENTS, BLOCK_BUFFERS = 2**20, 5
"""logits of a block of rows on a CPU, and the buffers of 4 MiB for it, which stay in the last
cache. With fewer rows, the calls for a row's few numbers take as long as those for its entries."""
GPU_MIN_CHUNK_ROWS, GPU_MAX_CHUNK_ROWS = 1024, 2048
GEMM_TILE = (128, 256)
"""rows and columns of the result that one multiprocessor computes in a large half-precision GEMM"""
HEAD_GROUP_ROWS = 8192
"""least rows of one half-precision product with the hidden states, where there are more. Each reads
and writes the head's whole gradient, 2.5 GB for Qwen3 8B; the float16 gradients of a group take as
much. Four groups of 32,768 rows are the smallest with which all bytes of the head's gradient take
less than 5% of four products' time on an H100. A float32 product itself takes longer than that."""
UNKNOWN_MULTIPROCESSORS = 132
"""an H100's, assumed where there is no GPU to ask (Triton's interpreter)"""


class Chunk(NamedTuple):
    rows: slice
    ended: slice | None
    """the rollouts whose last row is in the chunk, by their place in cu_seqlens; None where the
    bounds are not known on the host"""
    span: slice
    """the rows of those rollouts, which may begin in an earlier chunk; empty if there are none"""

    @property
    def early_rows(self) -> int:
        """The number of rows in `span` that lie in earlier chunks."""
        return max(0, min(self.rows.start, self.span.stop) - self.span.start)


def most_rows(vocab_size: int, hidden_size: int, device: torch.device, num_models: int = 2) -> int:
    """Returns the largest number of rows in a chunk with the logits of one or two models.

    On a GPU, the number with which the product back to (rows, hidden size) fills every
    multiprocessor once, or as often as it takes to reach the paper's rollouts of 1024 tokens. On an
    H100 that is 1024 for a hidden size of 4096, 1664 for 2560 and 2048 for 2048; on an A100 1536
    for 4096. More rows would only take more memory, 10 bytes per logit.
    """
    if device.type == "cpu":
        more = CPU_ROWS_OF_ONE_MODEL if num_models == 1 else 1
        return max(1, int(more * CPU_CHUNK_ELEMENTS / vocab_size))
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


def head_group_rows(rows_per_chunk: int, num_rows: int) -> int:
    """Returns the largest number of rows in a group of whole chunks."""
    chunks = math.ceil(HEAD_GROUP_ROWS / max(1, rows_per_chunk))
    return max(rows_per_chunk, min(chunks * rows_per_chunk, num_rows))


def plan_chunks(cu_seqlens: Tensor, num_rows: int, most: int, *, full: bool) -> list[Chunk]:
    """Divides the rows into chunks of at most `most`, wherever the rollouts begin and end.

    full: every chunk but the last has `most` rows, with which the product back to the hidden states
        keeps every multiprocessor busy, whatever the lengths. Otherwise all have about the same
        size. The bounds are read on the CPU alone, where that does not wait; with bounds on a GPU
        it is not known where rollouts end, unless one chunk has them all.
    """
    slices = row_slices(num_rows, most)
    if full:
        starts = range(0, num_rows, max(1, most))
        slices = [slice(start, min(start + most, num_rows)) for start in starts]
    if full and len(slices) == 1:
        return [Chunk(slices[0], slice(0, len(cu_seqlens) - 1), slices[0])]
    if not full or cu_seqlens.device.type != "cpu":
        return [Chunk(rows, None, slice(0, 0)) for rows in slices]
    bounds = cu_seqlens.tolist()
    chunks = []
    for rows in slices:
        first = bisect.bisect_right(bounds, rows.start, lo=1) - 1
        stop = bisect.bisect_right(bounds, rows.stop, lo=1) - 1
        chunks.append(Chunk(rows, slice(first, stop), slice(bounds[first], bounds[stop])))
    return chunks


def largest_chunk(chunks: list[Chunk]) -> int:
    return max((chunk.rows.stop - chunk.rows.start for chunk in chunks), default=0)
