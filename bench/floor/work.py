"""What is counted of a loss on a GPU, and the time that follows from it.

Matrix products are counted in floating-point operations by tiles of the result, so that
multiprocessors without a tile count as lost time. Row kernels take the largest of three times: of
their bytes through device memory, of their instructions, and of those in special-function units
(bench.kernels.limits). Everything else is counted in bytes and launches. All are divided by
published rates.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from bench.kernels.limits import Counts, Device
from paint_kernels._plan import GEMM_TILE, UNKNOWN_MULTIPROCESSORS

NUM_TOKENS = 32768
LOGIT_BYTES, GRADIENT_BYTES = 4, 2
FLOAT_BYTES, HALF_BYTES = 4, 2
HEAD_COPY_BYTES = HALF_BYTES + HALF_BYTES + HALF_BYTES
"""per entry of a bfloat16 head: read to find the largest, read again, written in float16. The copy
of a frozen one is kept."""
SMALL_KERNEL_S = 3e-6
"""one launch"""


class Work(NamedTuple):
    """What one call does beside its products."""

    rows: Sequence[tuple[Counts, float]] = ()
    """what a row kernel does per logit, and the number of logits"""
    row_bytes: float = 0
    """of rows, counted by the row and not by the logit"""
    head_gradient_bytes: float = 0
    other_bytes: float = 0
    num_small_kernels: int = 0


def product_s(rows: int, columns: int, inner: int, device: Device) -> float:
    """Predicts a product's time: the tiles of its result in waves over the multiprocessors."""
    tiles = math.ceil(rows / GEMM_TILE[0]) * math.ceil(columns / GEMM_TILE[1])
    waves = math.ceil(tiles / UNKNOWN_MULTIPROCESSORS)
    flops = 2 * math.prod(GEMM_TILE) * inner * UNKNOWN_MULTIPROCESSORS
    return waves * flops / device.flops_per_s


def bare_products_s(num_products: int, hidden: int, vocab: int, device: Device) -> float:
    return num_products * 2 * NUM_TOKENS * hidden * vocab / device.flops_per_s


def head_gradient_bytes(num_products: int, *, from_zeros: bool = False) -> int:
    """Returns the bytes per entry of the head's float32 gradient: the first product writes it,
    every other reads and writes it, the scale is divided out, and the result is rounded.

    from_zeros: it is set to 0 first, and every product reads and writes it.
    """
    products = FLOAT_BYTES + 2 * FLOAT_BYTES * (num_products - 1)
    if from_zeros:
        products = FLOAT_BYTES + 2 * FLOAT_BYTES * num_products
    return products + 2 * FLOAT_BYTES + FLOAT_BYTES + HALF_BYTES


def predict(products_s: float, work: Work, device: Device) -> dict[str, Any]:
    """Returns the predicted times. Those of the row kernels by each limit are what they would take
    if the others were none."""
    by_limit = [(counts.seconds(device), logits) for counts, logits in work.rows]
    by_row_s = work.row_bytes / device.bytes_per_s
    limits = {
        name: sum(times[name] * logits for times, logits in by_limit)
        for name in Counts(0, 0, 0).seconds(device)
    }
    limits["memory"] += by_row_s
    rows_s = sum(max(times.values()) * logits for times, logits in by_limit) + by_row_s
    head_gradient_s = work.head_gradient_bytes / device.bytes_per_s
    other_s = work.other_bytes / device.bytes_per_s + work.num_small_kernels * SMALL_KERNEL_S
    return {
        "products_s": products_s,
        "rows_s": rows_s,
        "rows_by_limit_s": limits,
        "head_gradient_s": head_gradient_s,
        "other_s": other_s,
        "predicted_s": products_s + rows_s + head_gradient_s + other_s,
    }
