"""Counts the work of `paint_loss` on a GPU and predicts its time.

    python -m bench.floor --output bench/results/floor.json

Nothing runs. The chunks are those that `paint_loss` would compute, at several mixtures of rollout
lengths. Matrix products are counted in floating-point operations by tiles of the result, so that
multiprocessors without a tile count as lost time; everything else in bytes through device memory.
Both are divided by published rates. `python -m bench.kernels` measures a GPU. The last line of
stdout is JSON.
"""

import argparse
import itertools
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import measure
from bench.losses import QWEN3_HIDDEN, QWEN3_VOCAB_SIZE
from paint_kernels import LossSettings
from paint_kernels._loss import most_early
from paint_kernels._plan import (
    GEMM_TILE,
    HEAD_GROUP_ROWS,
    UNKNOWN_MULTIPROCESSORS,
    Chunk,
    largest_chunk,
    most_rows,
    plan_chunks,
    row_slices,
)
from paint_kernels._triton_backend import GROUPS

NUM_TOKENS = 32768
EQUAL = "all 1,024"
SETTINGS = LossSettings(backend="triton")
LOGIT_BYTES = 4
GRADIENT_BYTES = 2
ROW_BYTES = 2 * LOGIT_BYTES + 2 * LOGIT_BYTES + GRADIENT_BYTES
"""per vocabulary entry: both logits are read for the statistics, and again for loss and gradient"""
REPEATED_ROW_BYTES = 2 * LOGIT_BYTES + GRADIENT_BYTES
"""additional, per entry of a row whose clipped mass was predicted wrong: it is read once more"""
REPEATED_SHARE = 0.01
"""of rows with a clipped entry: two clipped entries of a row share a group of columns in one of 256
rows, and few rows have more than two"""
CANDIDATE_BYTES = GROUPS * (4 + 4 + 2 * LOGIT_BYTES)
"""per row: the teacher's candidates are written, read, and their two logits read"""
INTERPOLATED_ROW_BYTES = 2 * LOGIT_BYTES
HEAD_COPY_BYTES = 2 + 2 + 2
"""per entry of the head: read to find the largest, read again, written in float16"""
GRAD_HIDDEN_BYTES = (4 + 4) + (4 + 2)
"""per entry of the hidden states' gradient: accumulated, then scaled into the result"""
GRAD_HEAD_BYTES = 4 + 4
"""per entry of a trainable head's gradient and product: read and written"""
CLIPPED_SHARES = (0.02, 0.6)
"""of rows with a clipped entry: random logits of the tests, and a real model (33 to 63%)"""
SMALL_KERNELS_PER_CHUNK, SMALL_KERNEL_S = 30, 3e-6
"""selection and bookkeeping: about the number in a trace on a CPU, at the time of one launch"""


class Device(NamedTuple):
    name: str
    flops_per_s: float
    """rate of the three bare products at N = 8192, H = 4096: 42 ms on an H100 (TRL, issue 7244)"""
    bytes_per_s: float
    """rate of a large device-to-device copy, counting bytes read and written"""


DEVICES = (Device("H100", 7.28e14, 3.0e12), Device("H200", 7.28e14, 4.3e12))


def drawn_lengths(name: str) -> Iterator[int]:
    """Yields the rollout lengths of a case, without end."""
    generator = random.Random(0)
    while True:
        yield {
            EQUAL: lambda: 1024,
            "all 1,100": lambda: 1100,
            "uniform 200 to 1,024": lambda: generator.randint(200, 1024),
            "lognormal around 1,500": lambda: round(generator.lognormvariate(math.log(1500), 0.6)),
            "one of 32,768": lambda: NUM_TOKENS,
        }[name]()


CASES = (EQUAL, "all 1,100", "uniform 200 to 1,024", "lognormal around 1,500", "one of 32,768")


def bounds_of(name: str) -> torch.Tensor:
    """Returns the case's cu_seqlens, the last rollout cut to end at NUM_TOKENS."""
    ends = itertools.accumulate(drawn_lengths(name))
    inside = list(itertools.takewhile(lambda end: end < NUM_TOKENS, ends))
    return torch.tensor([0, *inside, NUM_TOKENS])


def product_s(rows: int, columns: int, inner: int, device: Device) -> float:
    """Predicts a product's time: the tiles of its result in waves over the multiprocessors."""
    tiles = math.ceil(rows / GEMM_TILE[0]) * math.ceil(columns / GEMM_TILE[1])
    waves = math.ceil(tiles / UNKNOWN_MULTIPROCESSORS)
    flops = 2 * math.prod(GEMM_TILE) * inner * UNKNOWN_MULTIPROCESSORS
    return waves * flops / device.flops_per_s


def head_groups(chunks: list[Chunk], again: list[int]) -> list[int]:
    """Returns the rows of each product to a trainable head's gradient: as many whole chunks as make
    a group, and each piece that is computed again."""
    largest = max(1, HEAD_GROUP_ROWS // largest_chunk(chunks))
    groups = [chunks[first : first + largest] for first in range(0, len(chunks), largest)]
    rows = [group[-1].rows.stop - group[0].rows.start for group in groups]
    return rows + again


def count(
    model: str, device: Device, case: str, *, trainable: bool = False, clipped_share: float
) -> dict[str, Any]:
    """Counts one case with the chunks that `paint_loss` plans for it."""
    hidden, vocab = QWEN3_HIDDEN[model], QWEN3_VOCAB_SIZE
    most, bounds = most_rows(vocab, hidden, torch.device("meta")), bounds_of(case)
    chunks = plan_chunks(bounds, NUM_TOKENS, most, full=True)
    redone = most_early(chunks, bounds, NUM_TOKENS, SETTINGS)
    again = [rows.stop - rows.start for rows in row_slices(redone, most)]
    pieces = [chunk.rows.stop - chunk.rows.start for chunk in chunks] + again
    # For a trainable head, the logits of these rows are needed once more: for what it has of them.
    forward = pieces + again * trainable
    products_s = sum(product_s(2 * rows, vocab, hidden, device) for rows in forward)
    products_s += sum(product_s(rows, hidden, vocab, device) for rows in pieces)
    groups = head_groups(chunks, again) if trainable else []
    products_s += sum(product_s(vocab, hidden, rows, device) for rows in groups)
    num_products = 3 + trainable
    gemms_s = num_products * 2 * NUM_TOKENS * hidden * vocab / device.flops_per_s
    per_entry = ROW_BYTES + clipped_share * REPEATED_SHARE * REPEATED_ROW_BYTES
    per_entry += SETTINGS.top_fraction * INTERPOLATED_ROW_BYTES
    rows_s = sum(forward) * (per_entry * vocab + CANDIDATE_BYTES) / device.bytes_per_s
    other_bytes = HEAD_COPY_BYTES * vocab * hidden + GRAD_HIDDEN_BYTES * NUM_TOKENS * hidden
    other_bytes += GRAD_HEAD_BYTES * len(groups) * vocab * hidden
    other_s = other_bytes / device.bytes_per_s
    other_s += len(forward) * SMALL_KERNELS_PER_CHUNK * SMALL_KERNEL_S
    predicted_s = products_s + rows_s + other_s
    kept_rows = max(groups, default=largest_chunk(chunks))
    buffer_bytes = vocab * (2 * LOGIT_BYTES * largest_chunk(chunks) + GRADIENT_BYTES * kept_rows)
    if trainable:
        buffer_bytes += LOGIT_BYTES * vocab * hidden
    return {
        "model": model,
        "device": device.name,
        "case": case,
        "trainable": trainable,
        "clipped_share": clipped_share,
        "hidden": hidden,
        "num_products": num_products,
        "num_rollouts": len(bounds) - 1,
        "rows_per_chunk": largest_chunk(chunks),
        "rows_redone": redone,
        "gemms_s": gemms_s,
        "products_s": products_s,
        "rows_s": rows_s,
        "other_s": other_s,
        "predicted_s": predicted_s,
        "ratio_to_floor": predicted_s / gemms_s,
        "extra_bytes": buffer_bytes + 2 * vocab * hidden + 4 * NUM_TOKENS * hidden,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.floor", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args()
    grid = itertools.product(DEVICES, QWEN3_HIDDEN, (False, True), CLIPPED_SHARES, CASES)
    rows = [
        count(model, device, case, trainable=trainable, clipped_share=share)
        for device, model, trainable, share, case in grid
    ]
    result = {
        "name": "floor",
        "num_tokens": NUM_TOKENS,
        "vocab_size": QWEN3_VOCAB_SIZE,
        "cases": CASES,
        "devices": [device._asdict() for device in DEVICES],
        "rows": rows,
    }
    for row in rows:
        head = "trainable" if row["trainable"] else "frozen"
        print(
            f"{row['device']} {row['model']:5} {head:9} {row['clipped_share']:3.0%} clipped, "
            f"{row['case']:22}: {row['rows_per_chunk']} rows per chunk, {row['rows_redone']} rows "
            f"again, products {row['products_s'] * 1e3:.0f} ms, rows {row['rows_s'] * 1e3:.0f} ms, "
            f"other {row['other_s'] * 1e3:.1f} ms, {row['ratio_to_floor']:.2f} times "
            f"{row['num_products']} products, {row['extra_bytes'] / 1e9:.1f} GB"
        )
    measure.emit(result, arguments.output)


if __name__ == "__main__":
    main()
