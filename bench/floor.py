"""Counts the work of `paint_loss` on a GPU and predicts its time.

    python -m bench.floor --output bench/results/floor.json

Nothing runs. Matrix products are counted in floating-point operations, everything else in bytes
through device memory, and both are divided by published rates. `python -m bench.kernels` measures a
GPU. The last line of stdout is JSON.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import measure
from bench.losses import QWEN3_HIDDEN, QWEN3_VOCAB_SIZE
from paint_kernels._plan import most_rows

NUM_TOKENS, ROLLOUT_TOKENS = 32768, 1024
LOGIT_BYTES = 4
GRADIENT_BYTES = 2
ROW_BYTES = 2 * LOGIT_BYTES + 2 * LOGIT_BYTES + GRADIENT_BYTES
"""per vocabulary entry: both logits are read for the statistics, and again for loss and gradient"""
CLIPPED_ROW_BYTES = 2 * LOGIT_BYTES + GRADIENT_BYTES
"""additional, per entry of a row with a clipped entry"""
INTERPOLATED_ROW_BYTES = 2 * LOGIT_BYTES
HEAD_COPY_BYTES = 2 + 2 + 2
"""per entry of the head: read to find the largest, read again, written in float16"""
GRAD_HIDDEN_BYTES = (4 + 4) + (4 + 2)
"""per entry of the hidden states' gradient: accumulated, then scaled into the result"""
CLIPPED_SHARE, TOP_FRACTION = 0.02, 0.03
SMALL_KERNELS_PER_CHUNK, SMALL_KERNEL_S = 30, 3e-6
"""selection and bookkeeping: about the number in a trace on a CPU, at the time of one launch"""


class Device(NamedTuple):
    name: str
    flops_per_s: float
    """rate of the three bare products at N = 8192, H = 4096: 42 ms on an H100 (TRL, issue 7244)"""
    bytes_per_s: float
    """rate of a large device-to-device copy, counting bytes read and written"""


DEVICES = (Device("H100", 7.28e14, 3.0e12), Device("H200", 7.28e14, 4.3e12))


def count(model: str, device: Device) -> dict[str, Any]:
    hidden = QWEN3_HIDDEN[model]
    rows = most_rows(QWEN3_VOCAB_SIZE, hidden, torch.device("meta"))
    rows -= rows % ROLLOUT_TOKENS
    logits, states = NUM_TOKENS * QWEN3_VOCAB_SIZE, NUM_TOKENS * hidden
    gemms_s = 3 * 2 * states * QWEN3_VOCAB_SIZE / device.flops_per_s
    per_entry = ROW_BYTES + CLIPPED_SHARE * CLIPPED_ROW_BYTES
    per_entry += TOP_FRACTION * INTERPOLATED_ROW_BYTES
    rows_s = per_entry * logits / device.bytes_per_s
    other_bytes = HEAD_COPY_BYTES * QWEN3_VOCAB_SIZE * hidden + GRAD_HIDDEN_BYTES * states
    chunks = NUM_TOKENS // rows
    other_s = other_bytes / device.bytes_per_s + chunks * SMALL_KERNELS_PER_CHUNK * SMALL_KERNEL_S
    chunk_bytes = rows * QWEN3_VOCAB_SIZE * (2 * LOGIT_BYTES + GRADIENT_BYTES)
    return {
        "model": model,
        "device": device.name,
        "hidden": hidden,
        "rows_per_chunk": rows,
        "gemms_s": gemms_s,
        "rows_s": rows_s,
        "other_s": other_s,
        "predicted_s": gemms_s + rows_s + other_s,
        "ratio_to_floor": (gemms_s + rows_s + other_s) / gemms_s,
        "extra_bytes": chunk_bytes + 2 * QWEN3_VOCAB_SIZE * hidden + 4 * states,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.floor", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args()
    result = {
        "name": "floor",
        "num_tokens": NUM_TOKENS,
        "vocab_size": QWEN3_VOCAB_SIZE,
        "rollout_tokens": ROLLOUT_TOKENS,
        "devices": [device._asdict() for device in DEVICES],
        "rows": [count(model, device) for device in DEVICES for model in QWEN3_HIDDEN],
    }
    for row in result["rows"]:
        print(
            f"{row['device']} {row['model']:5} {row['rows_per_chunk']} rows per chunk: products "
            f"{row['gemms_s'] * 1e3:.0f} ms, rows {row['rows_s'] * 1e3:.0f} ms, other "
            f"{row['other_s'] * 1e3:.1f} ms, {row['ratio_to_floor']:.2f} times the products, "
            f"{row['extra_bytes'] / 1e9:.1f} GB"
        )
    measure.emit(result, arguments.output)


if __name__ == "__main__":
    main()
