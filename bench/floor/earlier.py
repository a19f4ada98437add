"""The counted work of `paint_loss` as it was before its chunks were full.

That was at commit d83201b. A chunk had whole rollouts, and longer ones were cut into pieces, whose
selected rows were computed again. A row with a clipped entry was read twice. A trainable head's
gradient was written for every chunk, and a frozen head was copied in every call. The row kernels
had more instructions.
"""

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from bench.floor.loss import SETTINGS, Kernels, Plan, count_plan
from bench.floor.work import GRADIENT_BYTES, HEAD_COPY_BYTES, LOGIT_BYTES, NUM_TOKENS
from bench.kernels.limits import Counts, Device
from bench.losses import EQUAL, QWEN3_HIDDEN, QWEN3_VOCAB_SIZE, bounds_of
from paint_kernels._plan import most_rows, row_slices

STATISTICS = Counts(24.38, 1.0, 4)
"""compiled for sm_90 by Triton 3.9 and counted like the kernels of today"""
INTERPOLATED = (23.0, 1.0, 8)
"""additional, of an interpolated row"""
LOSS = {
    "forward_kl": {"plain": Counts(68.5, 2.0, 10), "repeated": Counts(112.5, 4.0, 20)},
    "jsd": {"plain": Counts(406.0, 12.0, 18)},
}


RANKED_BYTES = 2 * 5 * LOGIT_BYTES + (4 + 1) + (1 + 4) + (4 + 1) + (1 + 4 + 4)
"""per logit of the teacher at least, for the k largest: two radix selections of four passes, each
with one that gathers, and four elementwise passes"""


def kernels(divergence: str) -> Kernels:
    loss = dict(LOSS[divergence])
    plain = loss["plain"]
    more = zip(plain, INTERPOLATED, strict=True)
    loss |= {"clipped": plain, "interpolated": Counts(*(own + other for own, other in more))}
    return Kernels(STATISTICS, loss, 1.0 if "repeated" in loss else 0.0, 0)


def whole_rollouts(cu_seqlens: Tensor, most: int) -> tuple[list[int], list[int]]:
    """Returns the rows of each chunk of at most `most`, and the lengths of the rollouts that were
    cut into pieces."""
    chunks, cut = [0], []
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        length = end - start
        if length > most:
            cut.append(length)
            chunks += [rows.stop - rows.start for rows in row_slices(length, most)] + [0]
        elif chunks[-1] + length > most:
            chunks.append(length)
        else:
            chunks[-1] += length
    return [rows for rows in chunks if rows], cut


def plan(case: str, hidden: int, *, trainable: bool) -> Plan:
    most = most_rows(QWEN3_VOCAB_SIZE, hidden, torch.device("meta"))
    chunks, cut = whole_rollouts(bounds_of(case, NUM_TOKENS), most)
    redone = sum(math.ceil(SETTINGS.top_fraction * length) for length in cut)
    again = [rows.stop - rows.start for rows in row_slices(redone, max(chunks))]
    # What the head had of the rows that were computed again was subtracted by a product.
    head_products, again_logits = (chunks + 2 * again, again) if trainable else ([], [])
    return Plan(chunks, again, head_products, again_logits, max(chunks))


def count(
    model: str,
    device: Device,
    case: str,
    divergence: str,
    *,
    trainable: bool = False,
    clipped_share: float,
) -> dict[str, Any]:
    """Counts one case as `bench.floor.loss.count` does."""
    hidden = QWEN3_HIDDEN[model]
    found = plan(case, hidden, trainable=trainable)
    used = kernels(divergence)
    return count_plan(
        found, used, hidden, device, clipped_share, copied_bytes=HEAD_COPY_BYTES, from_zeros=True
    )


def count_top_k(model: str, device: Device, *, trainable: bool) -> dict[str, Any]:
    """Counts `teacher_top_k` in rollouts of 1,024: every product of the whole vocabulary, and a
    gradient that is 0 but for k entries."""
    hidden = QWEN3_HIDDEN[model]
    moved = Counts(0, 0, RANKED_BYTES + GRADIENT_BYTES)
    found = plan(EQUAL, hidden, trainable=trainable)
    used = Kernels(Counts(0, 0, 0), {"plain": moved, "interpolated": moved}, 0.0, 0)
    return count_plan(
        found, used, hidden, device, 0.0, copied_bytes=HEAD_COPY_BYTES, from_zeros=True
    )
