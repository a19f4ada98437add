"""The loop over token chunks that every backend shares: no (N, V) tensor outlives a chunk.

Which positions are interpolated depends on the entropies of a whole rollout, which are known in the
chunk of its last row. There they are computed before the losses. The rows of a rollout that lie in
earlier chunks are first computed with the teacher's own target, and the selected ones (3%) again
with the interpolated target.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from paint_kernels._backends import row_functions
from paint_kernels._plan import Chunk, row_slices
from paint_kernels._settings import LossSettings
from paint_kernels._sources import HiddenSource, LogitsSource
from paint_kernels._types import RowValues
from paint_kernels.selection import (
    entropy_ratio,
    select_top_fraction,
    selected_counts,
)

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from paint_kernels._sources import Rows

    Source = HiddenSource | LogitsSource


def finds_statistics_first(settings: LossSettings) -> bool:
    """Returns whether a chunk selects the positions of the rollouts that end in it before it
    computes its losses.

    In PyTorch this would exponentiate every row twice, which costs more than computing 3% again.
    """
    return settings.backend == "triton" and settings.interpolates


def knows_ends(chunks: list[Chunk], settings: LossSettings) -> bool:
    """Returns whether the positions are selected chunk by chunk, and not after the last one."""
    return finds_statistics_first(settings) and all(chunk.ended is not None for chunk in chunks)


@dataclass
class TokenValues:
    table: Float[Tensor, "6 N"]
    """token_loss, token_kl, student_entropy, teacher_entropy, entropy_ratio, clipped_mass"""
    selected: Bool[Tensor, " N"]
    zero_weight: Bool[Tensor, " N"] | None = None
    """True at tokens that are ranked last, because another one's target must not depend on them"""

    def find_ratios(self, rows: slice, settings: LossSettings) -> Float[Tensor, " R"]:
        """Fills in the entropy ratios of these rows from their entropies."""
        _, _, student_entropy, teacher_entropy, ratio, _ = self.table[:, rows]
        floor = settings.entropy_floor
        return ratio.copy_(entropy_ratio(teacher_entropy, student_entropy, entropy_floor=floor))

    def select(self, rows: slice, cu_seqlens: Int[Tensor, " B+1"], settings: LossSettings) -> None:
        """Fills in the entropy ratios and the selection of these rows, which are whole rollouts
        with the bounds `cu_seqlens`."""
        ratio = self.find_ratios(rows, settings)
        if self.zero_weight is not None:
            ratio = ratio.masked_fill(self.zero_weight[rows], -math.inf)
        self.selected[rows] = select_top_fraction(ratio, cu_seqlens, settings.top_fraction)


class ChunkRows:
    """The logits of some rows, and what is computed from them."""

    def __init__(self, source: Source, rows: Rows, settings: LossSettings) -> None:
        self.source, self.rows, self.settings = source, rows, settings
        self.functions = row_functions(settings.backend, source.shard)
        self.student, self.teacher = source.logits(rows)
        self.gradient = source.gradient(rows, len(self.student))
        self.stats = None

    def find_entropies(self) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"]]:
        """Computes the student's and the teacher's entropies."""
        self.stats = self.functions.pair_stats(
            self.student, self.teacher, self.settings.temperature
        )
        return self.stats[0].entropy, self.stats[1].entropy

    def losses(self, interpolated: Bool[Tensor, " R"] | None) -> RowValues:
        """Computes the values of the rows. Fills `gradient` unless it is None."""
        return self.functions.row_loss(
            self.student,
            self.teacher,
            interpolated,
            self.settings,
            self.gradient,
            gradient_scale=self.source.gradient_scale,
            stats=self.stats,
        )

    def keep_gradient(self, before: Float[Tensor, "R V"] | None = None) -> None:
        if self.gradient is not None:
            self.source.keep_gradient(self.rows, self.gradient, before)


def select_ended(
    chunk: Chunk, values: TokenValues, cu_seqlens: Int[Tensor, " B+1"], settings: LossSettings
) -> Bool[Tensor, " R"]:
    """Selects the positions of the rollouts that end in the chunk, in all their rows. Returns the
    selection in the chunk's rows."""
    assert chunk.ended is not None
    if chunk.span.start == chunk.span.stop:
        return values.selected[chunk.rows]
    bounds = cu_seqlens[chunk.ended.start : chunk.ended.stop + 1]
    values.select(chunk.span, bounds - bounds[0], settings)
    return values.selected[chunk.rows]


def run_loss(
    source: Source,
    chunks: list[Chunk],
    cu_seqlens: Int[Tensor, " B+1"],
    settings: LossSettings,
    given: Bool[Tensor, " N"] | None = None,
) -> TokenValues:
    """Computes all token values. The gradients stay in the source.

    given: the selection, from outside, with a top fraction of 1.
    """
    assert given is None or not settings.interpolates or settings.top_fraction == 1
    table = torch.empty(6, source.num_rows, dtype=source.dtype, device=source.device)
    selected = torch.zeros(source.num_rows, dtype=torch.bool, device=source.device)
    values = TokenValues(table, selected, source.zero_weight)
    token_loss, token_kl, student_entropy, teacher_entropy, _, clipped_mass = table
    device_bounds = cu_seqlens.to(source.device, non_blocking=True)
    everywhere = settings.interpolates and settings.top_fraction == 1
    known = knows_ends(chunks, settings)
    if given is not None:
        selected.copy_(given)
    elif everywhere:
        selected.fill_(True)
    for chunk in chunks:
        rows, interpolated = chunk.rows, None
        part = ChunkRows(source, rows, settings)
        if everywhere or known:
            student_entropy[rows], teacher_entropy[rows] = part.find_entropies()
        if everywhere:
            interpolated = selected[rows]
        elif known:
            interpolated = select_ended(chunk, values, device_bounds, settings)
        found = part.losses(interpolated)
        token_loss[rows], token_kl[rows] = found.token_loss, found.token_kl
        clipped_mass[rows] = found.clipped_mass
        if interpolated is None:
            student_entropy[rows] = found.student_entropy
            teacher_entropy[rows] = found.target_entropy
        part.keep_gradient()
    if everywhere or given is not None:
        values.find_ratios(slice(None), settings)
    elif not known:
        values.select(slice(None), device_bounds, settings)
    if settings.interpolates and not everywhere:
        redo_selected(source, chunks, cu_seqlens, settings, values)
    source.finish()
    return values


def may_read(device: torch.device) -> bool:
    """Returns whether the host may read values: it would wait for a GPU."""
    return device.type == "cpu"


def mark_early(
    chunks: list[Chunk], selected: Bool[Tensor, " N"], settings: LossSettings
) -> Bool[Tensor, " N"]:
    """Marks the selected rows that were computed before their selection was known."""
    if not knows_ends(chunks, settings):
        return selected
    early = torch.zeros_like(selected)
    for chunk in chunks:
        start = chunk.span.start
        early[start : start + chunk.early_rows] = True
    return early & selected


def rows_to_redo(
    early: Bool[Tensor, " N"],
    chunks: list[Chunk],
    cu_seqlens: Int[Tensor, " B+1"],
    settings: LossSettings,
) -> Int[Tensor, " S"]:
    """Returns the marked rows.

    Where their number may not be read, the list has the largest length that it can have, and other
    rows fill it up: computing them again as they were computed gives the same result.
    """
    if may_read(early.device):
        return early.nonzero()[:, 0]
    return selected_first(early, most_early(chunks, cu_seqlens, len(early), settings))


def most_early(
    chunks: list[Chunk], cu_seqlens: Int[Tensor, " B+1"], num_rows: int, settings: LossSettings
) -> int:
    """Returns the largest number of rows that `rows_to_redo` can have to return, from what the host
    knows."""
    if not knows_ends(chunks, settings):
        num_rollouts = len(cu_seqlens) - 1
        return min(num_rows, math.ceil(settings.top_fraction * num_rows) + num_rollouts)
    counts = selected_counts(cu_seqlens.diff(), settings.top_fraction).tolist()
    # Only the first of the rollouts that end in a chunk can begin before it.
    pairs = [(chunk.ended, chunk.early_rows) for chunk in chunks if chunk.early_rows]
    return sum(min(counts[ended.start], rows) for ended, rows in pairs if ended is not None)


def selected_first(selected: Bool[Tensor, " N"], count: int) -> Int[Tensor, " S"]:
    """Returns `count` rows, the selected ones first, without reading `selected`."""
    return torch.sort(selected.to(torch.uint8), descending=True, stable=True).indices[:count]


def redo_selected(
    source: Source,
    chunks: list[Chunk],
    cu_seqlens: Int[Tensor, " B+1"],
    settings: LossSettings,
    values: TokenValues,
) -> None:
    """Computes the selected rows that came too early again, with the interpolated target."""
    if knows_ends(chunks, settings) and not any(chunk.early_rows for chunk in chunks):
        return
    early = mark_early(chunks, values.selected, settings)
    redone = rows_to_redo(early, chunks, cu_seqlens, settings)
    known_before = values.selected & ~early
    for piece in row_slices(len(redone), source.rows_per_chunk):
        rows, before = redone[piece], None
        part = ChunkRows(source, rows, settings)
        if source.with_head_gradient:
            part.losses(known_before[rows])
            assert part.gradient is not None
            before = part.gradient.clone()
            if source.overwrites_logits:
                part = ChunkRows(source, rows, settings)
        new = part.losses(values.selected[rows])
        token_loss, token_kl, _, _, _, clipped_mass = values.table
        token_loss[rows], token_kl[rows] = new.token_loss, new.token_kl
        clipped_mass[rows] = new.clipped_mass
        part.keep_gradient(before)


def run_head_gradient(
    source: HiddenSource, selected: Bool[Tensor, " N"], settings: LossSettings
) -> None:
    """Computes the head's gradients for the token weights of `source`, with a given selection.
    They stay in the source."""
    for rows in row_slices(source.num_rows, source.rows_per_chunk):
        part = ChunkRows(source, rows, settings)
        part.losses(selected[rows] if settings.interpolates else None)
        part.keep_gradient()
    source.finish()
