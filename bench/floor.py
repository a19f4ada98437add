"""Counts the work of `paint_loss` on a GPU and predicts its time.

    python -m bench.floor --output bench/results/floor.json

Nothing runs. The chunks are those that `paint_loss` would compute, at several mixtures of rollout
lengths. Matrix products are counted in floating-point operations by tiles of the result, so that
multiprocessors without a tile count as lost time. The row kernels take the largest of three times:
of their bytes through device memory, of their instructions, and of those in special-function units
(bench.kernels.limits). Everything else is counted in bytes. All are divided by published rates.
`python -m bench.kernels` measures a GPU. The last line of stdout is JSON.
"""

import argparse
import itertools
import math
from pathlib import Path
from typing import Any

import torch

from bench import measure
from bench.kernels.limits import DEVICES, Counts, Device, committed, counts_by_row
from bench.losses import MIXTURES, QWEN3_HIDDEN, QWEN3_VOCAB_SIZE, bounds_of
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
SETTINGS = LossSettings(backend="triton")
LOGIT_BYTES = 4
GRADIENT_BYTES = 2
REPEATED_SHARE = 0.01
"""of rows with a clipped entry: two clipped entries of a row share a group of columns in one of 256
rows, and few rows have more than two"""
SECTOR_BYTES = 32
"""least that a load takes from memory"""
CANDIDATE_BYTES = GROUPS * (4 * SECTOR_BYTES + 4 + 4 + 2 * SECTOR_BYTES)
"""per row at most: one logit in four of the teacher's lanes is read again, its column is written
and read, and both logits of that column are read"""
DIVERGENCES = ("forward_kl", "jsd")
ARCHITECTURE = "sm_90"
HEAD_COPY_BYTES = 2 + 2 + 2
"""per entry of a trainable head: read to find the largest, read again, written in float16. The copy
of a frozen one is kept."""
GRAD_HIDDEN_BYTES = (4 + 4) + (4 + 2)
"""per entry of the hidden states' gradient: accumulated, then scaled into the result"""
GRAD_HEAD_BYTES = 4 + 4
"""per entry of a trainable head's gradient and product: read and written"""
CLIPPED_SHARES = (0.02, 0.6)
"""of rows with a clipped entry: random logits of the tests, and a real model (33 to 63%)"""
SMALL_KERNELS_PER_CHUNK, SMALL_KERNEL_S = 30, 3e-6
"""selection and bookkeeping: about the number in a trace on a CPU, at the time of one launch"""


def product_s(rows: int, columns: int, inner: int, device: Device) -> float:
    """Predicts a product's time: the tiles of its result in waves over the multiprocessors."""
    tiles = math.ceil(rows / GEMM_TILE[0]) * math.ceil(columns / GEMM_TILE[1])
    waves = math.ceil(tiles / UNKNOWN_MULTIPROCESSORS)
    flops = 2 * math.prod(GEMM_TILE) * inner * UNKNOWN_MULTIPROCESSORS
    return waves * flops / device.flops_per_s


def row_kernels_s(divergence: str, clipped_share: float, device: Device) -> float:
    """Predicts the time of both row kernels per logit of a model."""
    counts = counts_by_row(committed(), ARCHITECTURE)
    # What a row has once is counted by CANDIDATE_BYTES, for the length that rows have here.
    found = {key: own._replace(bytes=round(own.bytes)) for key, own in counts.items()}
    variant = f"{divergence}, fp32 logits, fp16 gradient"

    def of(row: str) -> Counts:
        return found["loss_kernel", variant, row]

    plain = of("plain")
    shares = [(SETTINGS.top_fraction, of("interpolated"), plain)]
    if divergence == "forward_kl":
        again = clipped_share * REPEATED_SHARE
        shares.append((again, of("clipped and missed"), of("clipped")))
    loss = Counts(
        *(
            own + sum(share * (more[i] - less[i]) for share, more, less in shares)
            for i, own in enumerate(plain)
        )
    )
    statistics = found["stats_kernel", "fp32 logits", "plain"]
    return 2 * max(statistics.seconds(device).values()) + max(loss.seconds(device).values())


def head_groups(chunks: list[Chunk], again: list[int]) -> list[int]:
    """Returns the rows of each product to a trainable head's gradient: as many whole chunks as make
    a group, and each piece that is computed again."""
    largest = max(1, HEAD_GROUP_ROWS // largest_chunk(chunks))
    groups = [chunks[first : first + largest] for first in range(0, len(chunks), largest)]
    rows = [group[-1].rows.stop - group[0].rows.start for group in groups]
    return rows + again


def count(
    model: str,
    device: Device,
    case: str,
    divergence: str,
    *,
    trainable: bool = False,
    clipped_share: float,
) -> dict[str, Any]:
    """Counts one case with the chunks that `paint_loss` plans for it."""
    hidden, vocab = QWEN3_HIDDEN[model], QWEN3_VOCAB_SIZE
    most, bounds = most_rows(vocab, hidden, torch.device("meta")), bounds_of(case, NUM_TOKENS)
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
    per_logit_s = row_kernels_s(divergence, clipped_share, device)
    rows_s = sum(forward) * (vocab * per_logit_s + CANDIDATE_BYTES / device.bytes_per_s)
    other_bytes = HEAD_COPY_BYTES * trainable * vocab * hidden
    other_bytes += GRAD_HIDDEN_BYTES * NUM_TOKENS * hidden
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
        "divergence": divergence,
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
    grid = itertools.product(
        DEVICES, QWEN3_HIDDEN, DIVERGENCES, (False, True), CLIPPED_SHARES, MIXTURES
    )
    rows = [
        count(model, device, case, divergence, trainable=trainable, clipped_share=share)
        for device, model, divergence, trainable, share, case in grid
    ]
    result = {
        "name": "floor",
        "num_tokens": NUM_TOKENS,
        "vocab_size": QWEN3_VOCAB_SIZE,
        "cases": MIXTURES,
        "devices": [device._asdict() for device in DEVICES],
        "rows": rows,
    }
    for row in rows:
        head = "trainable" if row["trainable"] else "frozen"
        print(
            f"{row['device']} {row['model']:5} {row['divergence']:10} {head:9} "
            f"{row['clipped_share']:3.0%} clipped, "
            f"{row['case']:22}: {row['rows_per_chunk']} rows per chunk, {row['rows_redone']} rows "
            f"again, products {row['products_s'] * 1e3:.0f} ms, rows {row['rows_s'] * 1e3:.0f} ms, "
            f"other {row['other_s'] * 1e3:.1f} ms, {row['ratio_to_floor']:.2f} times "
            f"{row['num_products']} products, {row['extra_bytes'] / 1e9:.1f} GB"
        )
    measure.emit(result, arguments.output)


if __name__ == "__main__":
    main()
