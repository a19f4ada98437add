"""Counts the work of the losses on a GPU and predicts their time.

    python -m bench.floor --output bench/results/floor.json

Nothing runs. bench.floor.work says what is counted and by which rates it is divided.
bench.floor.loss and bench.floor.topk count the losses, bench.floor.earlier what they were before.
`python -m bench.kernels` measures a GPU. The last line of stdout is JSON.
"""

import argparse
import itertools
from pathlib import Path
from typing import Any

from bench import measure
from bench.floor import earlier, loss, topk
from bench.floor.work import NUM_TOKENS
from bench.kernels.limits import DEVICES
from bench.losses import MIXTURES, QWEN3_HIDDEN, QWEN3_VOCAB_SIZE


def count_losses() -> list[dict[str, Any]]:
    """Counts `paint_loss`, with its times of before as `earlier`."""
    grid = itertools.product(
        DEVICES, QWEN3_HIDDEN, loss.DIVERGENCES, (False, True), loss.CLIPPED_SHARES, MIXTURES
    )
    found = []
    for device, model, divergence, trainable, share, case in grid:
        options: dict[str, Any] = {"trainable": trainable, "clipped_share": share}
        now = loss.count(model, device, case, divergence, **options)
        before = earlier.count(model, device, case, divergence, **options)
        found.append({**now, "earlier": before})
    return found


def count_top_k() -> list[dict[str, Any]]:
    grid = itertools.product(DEVICES, QWEN3_HIDDEN, (False, True), topk.CASES)
    found = []
    for device, model, trainable, case in grid:
        now = topk.count_top_k(model, device, case, trainable=trainable)
        before = earlier.count_top_k(model, device, trainable=trainable)
        found.append({**now, "earlier": before if case == topk.CASES[0] else None})
    return found


def milliseconds(row: dict[str, Any]) -> str:
    names = {"products": "products_s", "rows": "rows_s", "head's gradient": "head_gradient_s"}
    parts = [f"{name} {row[key] * 1e3:.0f} ms" for name, key in names.items()]
    return ", ".join([*parts, f"other {row['other_s'] * 1e3:.1f} ms"])


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
        "cases": MIXTURES,
        "devices": [device._asdict() for device in DEVICES],
        "rows": count_losses(),
        "top_k": count_top_k(),
    }
    for row in result["rows"]:
        head = "trainable" if row["trainable"] else "frozen"
        print(
            f"{row['device']} {row['model']:5} {row['divergence']:10} {head:9} "
            f"{row['clipped_share']:3.0%} clipped, {row['case']:22}: {row['rows_per_chunk']} rows "
            f"per chunk, {row['rows_redone']} rows again, {milliseconds(row)}, "
            f"{row['ratio_to_floor']:.2f} times {row['num_products']} products (before: "
            f"{row['earlier']['ratio_to_floor']:.2f}), {row['extra_bytes'] / 1e9:.1f} GB"
        )
    for row in result["top_k"]:
        head = "trainable" if row["trainable"] else "frozen"
        print(
            f"{row['device']} {row['model']:5} {head:9} {row['case']:22}: {row['num_products']} "
            f"products, {milliseconds(row)}, {row['ratio_to_whole_vocabulary']:.2f} of the whole "
            "vocabulary"
        )
    measure.emit(result, arguments.output)


if __name__ == "__main__":
    main()
