"""The counted work of the losses on a teacher's top-k.

It does not depend on the lengths of the rollouts, nor on the divergence or the clip: these concern
k logits of a row. Rows of the head that kernels gather are counted as if no cache held any.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from bench.floor.loss import ARCHITECTURE, CLIPPED_SHARES, count
from bench.floor.work import (
    FLOAT_BYTES,
    HALF_BYTES,
    HEAD_COPY_BYTES,
    LOGIT_BYTES,
    NUM_TOKENS,
    Work,
    head_gradient_bytes,
    predict,
    product_s,
)
from bench.kernels.limits import Counts, Device, committed, counts_by_row
from bench.losses import EQUAL, QWEN3_HIDDEN, QWEN3_VOCAB_SIZE
from paint_kernels._plan import head_group_rows, most_rows, row_slices
from paint_kernels.selection import TOP_K_TILE

NUM_IDS = 64
SUM_LOOP, SUM_ENTRIES = 98, 16
"""instructions in one iteration of a thread of `weighted_rows_kernel` on sm_90, for the head's
gradient from bfloat16 hidden states, and the entries that it adds"""
RANKED_BYTES = 100
"""per entry that is ranked: twelve elementwise passes over 1 to 8 bytes, two radix selections"""
TOP_K_KERNELS, TAIL_KERNELS, SUPPORT_KERNELS = 40, 10, 120
"""launches per chunk to find the largest logits or split off the tail, and per call for the loss on
the support: about the numbers of operations in the code"""
CASES = ("teacher_top_k", "served, renormalise", "served, bucket or drop")


class Part(NamedTuple):
    num_products: int
    products_s: float
    work: Work


def sum_of(parts: list[Part]) -> Part:
    works = [part.work for part in parts]
    return Part(
        sum(part.num_products for part in parts),
        sum(part.products_s for part in parts),
        Work(
            [row for work in works for row in work.rows],
            *(sum(values) for values in list(zip(*works, strict=True))[1:]),
        ),
    )


def gathered_entries(hidden: int) -> float:
    """Returns the entries in one pass over the rows of the head that every token names."""
    return NUM_TOKENS * NUM_IDS * hidden


def chunk_rows(hidden: int) -> list[int]:
    most = most_rows(QWEN3_VOCAB_SIZE, hidden, torch.device("meta"))
    return [rows.stop - rows.start for rows in row_slices(NUM_TOKENS, most)]


def group_rows(chunks: list[int]) -> list[int]:
    """Returns the rows of each product for a trainable head's gradient."""
    in_group = head_group_rows(max(chunks), NUM_TOKENS) // max(chunks)
    return [sum(chunks[first : first + in_group]) for first in range(0, len(chunks), in_group)]


def compiled(kernel: str, variant: str) -> Counts:
    """Returns the counts of a compiled kernel, per logit or per entry of a gathered row. What a
    token has once is counted with the other bytes."""
    found = counts_by_row(committed(), ARCHITECTURE)[kernel, variant, "plain"]
    return found._replace(bytes=round(found.bytes))


def added_rows(hidden: int) -> tuple[Counts, float]:
    """Returns what the sums of weighted hidden states, for the rows of the head, do per entry of
    the head, and the number of these."""
    num_tokens_of_a_row = NUM_TOKENS * NUM_IDS / QWEN3_VOCAB_SIZE
    # The last iteration of a row's loop is half empty on average.
    iterations = num_tokens_of_a_row / SUM_ENTRIES + 0.5
    # Counted are programs of one iteration.
    found = compiled("weighted_rows_kernel", "head's gradient, bf16 hidden")
    instructions = found.instructions * SUM_ENTRIES + SUM_LOOP * (iterations - 1)
    moved = HALF_BYTES * num_tokens_of_a_row
    return Counts(instructions, 0, moved), QWEN3_VOCAB_SIZE * hidden


def teacher_part(hidden: int, device: Device) -> Part:
    """The teacher's logits and the k largest of each row."""
    chunks, vocab = chunk_rows(hidden), QWEN3_VOCAB_SIZE
    ranked = math.ceil(vocab / TOP_K_TILE) + NUM_IDS * TOP_K_TILE
    work = Work(
        row_bytes=NUM_TOKENS * (LOGIT_BYTES * vocab + RANKED_BYTES * ranked),
        num_small_kernels=TOP_K_KERNELS * len(chunks),
    )
    return Part(1, sum(product_s(rows, vocab, hidden, device) for rows in chunks), work)


def chosen_part(hidden: int) -> Part:
    """The student's logits of the ids, from gathered rows of the head."""
    own = NUM_TOKENS * hidden * HALF_BYTES
    rows = [(compiled("gathered_logits_kernel", "bf16, k 64"), gathered_entries(hidden))]
    return Part(0, 0.0, Work(rows, other_bytes=own, num_small_kernels=1))


def support_part(hidden: int, *, trainable: bool, with_tail: bool) -> Part:
    """The loss on the support, and the gradients of the ids. A trainable head's is set to zero or
    has the tail's, is added to, and rounded."""
    weighted = compiled("weighted_rows_kernel", "bf16 head" + ", with a tail" * with_tail)
    entries, head_bytes = gathered_entries(hidden), 0
    bytes_moved = NUM_TOKENS * hidden * (HALF_BYTES + with_tail * FLOAT_BYTES)
    if trainable:
        head_bytes = FLOAT_BYTES * (not with_tail) + 2 * FLOAT_BYTES
        head_bytes += (FLOAT_BYTES + HALF_BYTES) * (not with_tail)
    work = Work(
        rows=[(weighted, entries), *[added_rows(hidden)] * trainable],
        head_gradient_bytes=head_bytes * QWEN3_VOCAB_SIZE * hidden,
        other_bytes=bytes_moved,
        num_small_kernels=SUPPORT_KERNELS,
    )
    return Part(0, 0.0, work)


def tail_part(hidden: int, device: Device, *, trainable: bool) -> Part:
    """The student's logits, their log-sum-exp outside the support, and the softmax of the tail
    through the head. A trainable head's gradient takes the logits once more."""
    chunks, vocab = chunk_rows(hidden), QWEN3_VOCAB_SIZE
    forward = sum(product_s(rows, vocab, hidden, device) for rows in chunks)
    products_s = forward + sum(product_s(rows, hidden, vocab, device) for rows in chunks)
    logits, head_bytes = NUM_TOKENS * vocab, 0
    statistics = compiled("stats_kernel", "fp32 logits")
    softmax = compiled("softmax_kernel", "fp32 logits, fp16 result")
    if trainable:
        groups = group_rows(chunks)
        products_s += forward + sum(product_s(vocab, hidden, rows, device) for rows in groups)
        head_bytes = head_gradient_bytes(len(groups))
    work = Work(
        rows=[(statistics, logits), (softmax, logits * (1 + trainable))],
        head_gradient_bytes=head_bytes * vocab * hidden,
        other_bytes=HEAD_COPY_BYTES * trainable * vocab * hidden,
        num_small_kernels=TAIL_KERNELS * len(chunks) * (1 + trainable),
    )
    return Part(2 + 2 * trainable, products_s, work)


def parts_of(case: str, hidden: int, device: Device, *, trainable: bool) -> Iterator[Part]:
    with_tail = case == CASES[2]
    yield support_part(hidden, trainable=trainable, with_tail=with_tail)
    if with_tail:
        yield tail_part(hidden, device, trainable=trainable)
    else:
        yield chosen_part(hidden)
    if case == CASES[0]:
        yield teacher_part(hidden, device)


def count_top_k(model: str, device: Device, case: str, *, trainable: bool) -> dict[str, Any]:
    hidden = QWEN3_HIDDEN[model]
    num_products, products_s, work = sum_of(
        list(parts_of(case, hidden, device, trainable=trainable))
    )
    share = CLIPPED_SHARES[0]
    whole = count(model, device, EQUAL, "forward_kl", trainable=trainable, clipped_share=share)
    times = predict(products_s, work, device)
    return {
        "model": model,
        "device": device.name,
        "case": case,
        "k": NUM_IDS,
        "trainable": trainable,
        "hidden": hidden,
        "num_products": num_products,
        **times,
        "whole_vocabulary_s": whole["predicted_s"],
        "ratio_to_whole_vocabulary": times["predicted_s"] / whole["predicted_s"],
    }
