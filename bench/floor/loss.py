"""The counted work of `paint_loss`.

The chunks are those that it would compute, at several mixtures of rollout lengths.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from bench.floor.work import (
    FLOAT_BYTES,
    GRADIENT_BYTES,
    HALF_BYTES,
    HEAD_COPY_BYTES,
    LOGIT_BYTES,
    NUM_TOKENS,
    Work,
    bare_products_s,
    head_gradient_bytes,
    predict,
    product_s,
)
from bench.kernels.limits import Counts, Device, committed, counts_by_row
from bench.losses import QWEN3_HIDDEN, QWEN3_VOCAB_SIZE, bounds_of
from paint_kernels import LossSettings
from paint_kernels._loss import most_early
from paint_kernels._plan import (
    head_group_rows,
    largest_chunk,
    most_rows,
    plan_chunks,
    row_slices,
)
from paint_kernels._triton_backend import GROUPS

SETTINGS = LossSettings(backend="triton")
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
GRAD_HIDDEN_BYTES = 2 * FLOAT_BYTES + FLOAT_BYTES + HALF_BYTES
"""per entry of the hidden states' gradient: accumulated, then scaled into the result"""
CLIPPED_SHARES = (0.02, 0.6)
"""of rows with a clipped entry: random logits of the tests, and a real model (33 to 63%)"""
SMALL_KERNELS_PER_CHUNK = 30
"""selection and bookkeeping: about the number in a trace on a CPU"""


class Plan(NamedTuple):
    """The rows of each product of one call."""

    chunks: list[int]
    again: list[int]
    """of each piece of the selected rows that are computed again, with the interpolated target"""
    head_products: list[int]
    """for a trainable head's gradient"""
    again_logits: list[int]
    """of each of these pieces whose logits are computed once more: for what a trainable head's
    gradient has of them"""
    kept_rows: int
    """of gradients by the logits that exist at a time"""


class Kernels(NamedTuple):
    """What the row kernels do per logit: of either model's statistics, and by kind of row."""

    statistics: Counts
    loss: Mapping[str, Counts]
    repeated_share: float
    """of the rows with a clipped entry: they are read again"""
    row_bytes: int
    """per row, whatever the number of columns"""


def head_products(chunks: list[int], again: list[int]) -> list[int]:
    """Returns the rows of each product for a trainable head's gradient: as many whole chunks as
    make a group, and each piece that is computed again."""
    largest = head_group_rows(max(chunks), sum(chunks))
    groups = [0]
    for rows in chunks:
        if groups[-1] + rows > largest:
            groups.append(0)
        groups[-1] += rows
    return groups + again


def plan(case: str, hidden: int, *, trainable: bool) -> Plan:
    """Returns the rows of each product of `paint_loss`."""
    bounds = bounds_of(case, NUM_TOKENS)
    most = most_rows(QWEN3_VOCAB_SIZE, hidden, torch.device("meta"))
    planned = plan_chunks(bounds, NUM_TOKENS, most, full=True)
    chunks = [chunk.rows.stop - chunk.rows.start for chunk in planned]
    redone = most_early(planned, bounds, NUM_TOKENS, SETTINGS)
    again = [rows.stop - rows.start for rows in row_slices(redone, largest_chunk(planned))]
    if not trainable:
        return Plan(chunks, again, [], [], max(chunks))
    kept_rows = head_group_rows(max(chunks), NUM_TOKENS)
    return Plan(chunks, again, head_products(chunks, again), [], kept_rows)


def kernels(divergence: str) -> Kernels:
    """Returns the counts of the compiled row kernels."""
    counts = counts_by_row(committed(), ARCHITECTURE)
    # What a row has once is counted by CANDIDATE_BYTES, for the length that rows have here.
    found = {key: own._replace(bytes=round(own.bytes)) for key, own in counts.items()}
    variant = f"{divergence}, fp32 logits, fp16 gradient"
    rows = {row: own for (_, name, row), own in found.items() if name == variant}
    repeated = REPEATED_SHARE if divergence == "forward_kl" else 0
    rows = {row.replace("clipped and missed", "repeated"): own for row, own in rows.items()}
    statistics = found["stats_kernel", "fp32 logits", "plain"]
    return Kernels(statistics, rows, repeated, CANDIDATE_BYTES)


def loss_counts(used: Kernels, clipped_share: float) -> Counts:
    """Returns what the loss kernel does per logit, on average over the rows."""
    plain = used.loss["plain"]
    shares = [(SETTINGS.top_fraction, used.loss["interpolated"], plain)]
    if used.repeated_share:
        again = clipped_share * used.repeated_share
        shares.append((again, used.loss["repeated"], used.loss["clipped"]))
    return Counts(
        *(
            own + sum(share * (more[i] - less[i]) for share, more, less in shares)
            for i, own in enumerate(plain)
        )
    )


def products_of(found: Plan, hidden: int, device: Device) -> float:
    vocab, pieces = QWEN3_VOCAB_SIZE, found.chunks + found.again
    seconds = sum(
        product_s(2 * rows, vocab, hidden, device) for rows in pieces + found.again_logits
    )
    seconds += sum(product_s(rows, hidden, vocab, device) for rows in pieces)
    return seconds + sum(product_s(vocab, hidden, rows, device) for rows in found.head_products)


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
    hidden = QWEN3_HIDDEN[model]
    found, used = plan(case, hidden, trainable=trainable), kernels(divergence)
    copied = HEAD_COPY_BYTES * trainable
    row = count_plan(found, used, hidden, device, clipped_share, copied_bytes=copied)
    head = {"model": model, "device": device.name, "case": case, "divergence": divergence}
    return {**head, "trainable": trainable, "clipped_share": clipped_share, **row}


def count_plan(
    found: Plan,
    used: Kernels,
    hidden: int,
    device: Device,
    clipped_share: float,
    *,
    copied_bytes: int,
    from_zeros: bool = False,
) -> dict[str, Any]:
    """Returns the predicted times of a plan, and the memory that it takes.

    copied_bytes: per entry of the head, for its float16 copy.
    from_zeros: that of `head_gradient_bytes`.
    """
    vocab, trainable = QWEN3_VOCAB_SIZE, bool(found.head_products)
    # A trainable head's gradient has the rows that are computed again: it needs their loss twice.
    launched = found.chunks + found.again * (1 + trainable)
    by_head = len(found.head_products)
    head_bytes = head_gradient_bytes(by_head, from_zeros=from_zeros) * trainable
    logits = sum(launched) * vocab
    work = Work(
        rows=[(used.statistics, 2 * logits), (loss_counts(used, clipped_share), logits)],
        row_bytes=sum(launched) * used.row_bytes,
        head_gradient_bytes=head_bytes * vocab * hidden,
        other_bytes=copied_bytes * vocab * hidden + GRAD_HIDDEN_BYTES * NUM_TOKENS * hidden,
        num_small_kernels=len(launched) * SMALL_KERNELS_PER_CHUNK,
    )
    products_s = products_of(found, hidden, device)
    times = predict(products_s, work, device)
    gemms_s = bare_products_s(3 + trainable, hidden, vocab, device)
    buffer_bytes = vocab * (2 * LOGIT_BYTES * max(found.chunks) + GRADIENT_BYTES * found.kept_rows)
    head_bytes = HALF_BYTES + LOGIT_BYTES * trainable
    return {
        "hidden": hidden,
        "num_products": 3 + trainable,
        "rows_per_chunk": max(found.chunks),
        "rows_redone": sum(found.again),
        "num_head_products": by_head,
        "gemms_s": gemms_s,
        **times,
        "ratio_to_floor": times["predicted_s"] / gemms_s,
        "extra_bytes": buffer_bytes + head_bytes * vocab * hidden + 4 * NUM_TOKENS * hidden,
    }
