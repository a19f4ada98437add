"""Counts the work of the losses on a teacher's top-k on a GPU and predicts their time.

    python -m bench.topk_floor --output bench/results/topk_floor.json

Nothing runs. Work is counted and divided by rates as in `bench.floor`, and compared with the loss
over the whole vocabulary there. Rows of the head that kernels gather are counted as if no cache
held any. The last line of stdout is JSON.
"""

import argparse
import itertools
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import measure
from bench.floor import (
    DEVICES,
    GRAD_HEAD_BYTES,
    GRADIENT_BYTES,
    HEAD_COPY_BYTES,
    LOGIT_BYTES,
    NUM_TOKENS,
    SMALL_KERNEL_S,
    Device,
    count,
    product_s,
)
from bench.losses import EQUAL, QWEN3_HIDDEN, QWEN3_VOCAB_SIZE
from paint_kernels._plan import most_rows, row_slices
from paint_kernels.selection import TOP_K_TILE

NUM_IDS = 64
CLIPPED_SHARE = 0.02
"""of the loss over the whole vocabulary that is compared"""
HEAD_BYTES, HIDDEN_BYTES, FLOAT_BYTES = 2, 2, 4
RANKED_BYTES = 100
"""per entry that is ranked: twelve elementwise passes over 1 to 8 bytes, two radix selections"""
TOP_K_KERNELS, TAIL_KERNELS, SUPPORT_KERNELS = 40, 10, 120
"""launches per chunk to find the largest logits or split off the tail, and per call for the loss on
the support: about the numbers of operations in the code"""
CASES = ("teacher_top_k", "served, renormalise", "served, bucket or drop")


class Work(NamedTuple):
    num_products: int
    products_s: float
    row_bytes: float
    """through logits and what is ranked of them"""
    other_bytes: float
    num_kernels: int


def gathered_bytes(hidden: int) -> float:
    """Returns the bytes of one pass over the rows of the head that every token names."""
    return NUM_TOKENS * NUM_IDS * hidden * HEAD_BYTES


def chunk_rows(hidden: int) -> list[int]:
    most = most_rows(QWEN3_VOCAB_SIZE, hidden, torch.device("meta"))
    return [rows.stop - rows.start for rows in row_slices(NUM_TOKENS, most)]


def teacher_work(hidden: int, device: Device) -> Work:
    """The teacher's logits and the k largest of each row."""
    chunks, vocab = chunk_rows(hidden), QWEN3_VOCAB_SIZE
    ranked = math.ceil(vocab / TOP_K_TILE) + NUM_IDS * TOP_K_TILE
    return Work(
        1,
        sum(product_s(rows, vocab, hidden, device) for rows in chunks),
        NUM_TOKENS * (LOGIT_BYTES * vocab + RANKED_BYTES * ranked),
        0,
        TOP_K_KERNELS * len(chunks),
    )


def chosen_work(hidden: int) -> Work:
    """The student's logits of the ids, from gathered rows of the head."""
    own = NUM_TOKENS * hidden * HIDDEN_BYTES
    return Work(0, 0.0, 0, gathered_bytes(hidden) + own, 1)


def support_work(hidden: int, *, trainable: bool, with_tail: bool) -> Work:
    """The loss on the support, and the gradients of the ids. A trainable head's is zeroed, added
    to, and converted."""
    bytes_moved = gathered_bytes(hidden) + NUM_TOKENS * hidden * HIDDEN_BYTES
    bytes_moved += with_tail * NUM_TOKENS * hidden * FLOAT_BYTES
    if trainable:
        per_entry = FLOAT_BYTES + GRAD_HEAD_BYTES + FLOAT_BYTES + HEAD_BYTES
        bytes_moved += gathered_bytes(hidden) + per_entry * QWEN3_VOCAB_SIZE * hidden
    return Work(0, 0.0, 0, bytes_moved, SUPPORT_KERNELS)


def tail_work(hidden: int, device: Device, *, trainable: bool) -> Work:
    """The student's logits, their log-sum-exp outside the support, and the softmax of the tail
    through the head. A trainable head's gradient takes the logits once more, and is read and
    written for every chunk."""
    chunks, vocab = chunk_rows(hidden), QWEN3_VOCAB_SIZE
    forward = sum(product_s(rows, vocab, hidden, device) for rows in chunks)
    products_s = forward + sum(product_s(rows, hidden, vocab, device) for rows in chunks)
    softmax_bytes = LOGIT_BYTES + GRADIENT_BYTES
    row_bytes = NUM_TOKENS * vocab * (LOGIT_BYTES + softmax_bytes)
    other_bytes = HEAD_COPY_BYTES * trainable * vocab * hidden
    if trainable:
        products_s += forward + sum(product_s(vocab, hidden, rows, device) for rows in chunks)
        row_bytes += NUM_TOKENS * vocab * softmax_bytes
        other_bytes += len(chunks) * GRAD_HEAD_BYTES * vocab * hidden
    return Work(
        2 + 2 * trainable,
        products_s,
        row_bytes,
        other_bytes,
        TAIL_KERNELS * len(chunks) * (1 + trainable),
    )


def count_top_k(model: str, device: Device, case: str, *, trainable: bool) -> dict[str, Any]:
    hidden, with_tail = QWEN3_HIDDEN[model], case == CASES[2]
    parts = [support_work(hidden, trainable=trainable, with_tail=with_tail)]
    parts += [tail_work(hidden, device, trainable=trainable)] if with_tail else []
    parts += [] if with_tail else [chosen_work(hidden)]
    parts += [teacher_work(hidden, device)] if case == CASES[0] else []
    work = Work(*(sum(values) for values in zip(*parts, strict=True)))
    rows_s = work.row_bytes / device.bytes_per_s
    other_s = work.other_bytes / device.bytes_per_s + work.num_kernels * SMALL_KERNEL_S
    whole = count(
        model, device, EQUAL, "forward_kl", trainable=trainable, clipped_share=CLIPPED_SHARE
    )
    predicted_s = work.products_s + rows_s + other_s
    return {
        "model": model,
        "device": device.name,
        "case": case,
        "k": NUM_IDS,
        "trainable": trainable,
        "hidden": hidden,
        "num_products": work.num_products,
        "products_s": work.products_s,
        "rows_s": rows_s,
        "other_s": other_s,
        "predicted_s": predicted_s,
        "whole_vocabulary_s": whole["predicted_s"],
        "ratio_to_whole_vocabulary": predicted_s / whole["predicted_s"],
    }


def count_all() -> list[dict[str, Any]]:
    grid = itertools.product(DEVICES, QWEN3_HIDDEN, (False, True), CASES)
    return [
        count_top_k(model, device, case, trainable=trainable)
        for device, model, trainable, case in grid
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.topk_floor", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args()
    rows = count_all()
    for row in rows:
        head = "trainable" if row["trainable"] else "frozen"
        print(
            f"{row['device']} {row['model']:5} {head:9} {row['case']:22}: {row['num_products']} "
            f"products {row['products_s'] * 1e3:.0f} ms, rows {row['rows_s'] * 1e3:.0f} ms, other "
            f"{row['other_s'] * 1e3:.0f} ms, {row['ratio_to_whole_vocabulary']:.2f} of the whole "
            "vocabulary"
        )
    result = {
        "name": "topk_floor",
        "num_tokens": NUM_TOKENS,
        "vocab_size": QWEN3_VOCAB_SIZE,
        "rows": rows,
    }
    measure.emit(result, arguments.output)


if __name__ == "__main__":
    main()
