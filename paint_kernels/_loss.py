"""The loop over token chunks that every backend shares: no (N, V) tensor outlives a chunk.

Which positions are interpolated depends on the entropies of a whole rollout. In a chunk of whole
rollouts they are computed before the losses. For a rollout split over chunks they are known only
after its last piece: its rows are first computed with the teacher's own target, and the selected
ones (3%) again with the interpolated target.
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
    teacher_top_k_indices,
)

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from paint_kernels._sources import Rows

    Source = HiddenSource | LogitsSource


def finds_statistics_first(settings: LossSettings) -> bool:
    """Returns whether a chunk of whole rollouts selects its positions before it computes its
    losses.

    In PyTorch this would exponentiate every row twice, which costs more than computing 3% again.
    """
    return settings.backend == "triton" and settings.interpolates


@dataclass
class TokenValues:
    table: Float[Tensor, "6 N"]
    """token_loss, token_kl, student_entropy, teacher_entropy, entropy_ratio, clipped_mass"""
    selected: Bool[Tensor, " N"]


class ChunkRows:
    """The logits of some rows, and what is computed from them."""

    def __init__(self, source: Source, rows: Rows, settings: LossSettings) -> None:
        self.source, self.rows, self.settings = source, rows, settings
        self.functions = row_functions(settings.backend)
        self.student, self.teacher = source.logits(rows)
        self.gradient = source.gradient(rows, len(self.student))
        self.largest, self.stats = None, None
        if settings.teacher_top_k is not None:
            self.largest = teacher_top_k_indices(self.teacher, settings.teacher_top_k)
            self.student = self.student.gather(1, self.largest)
            self.teacher = self.teacher.gather(1, self.largest)

    def find_entropies(self) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"]]:
        """Computes the student's and the teacher's entropies."""
        self.stats = self.functions.pair_stats(
            self.student, self.teacher, self.settings.temperature
        )
        return self.stats[0].entropy, self.stats[1].entropy

    def losses(self, interpolated: Bool[Tensor, " R"] | None) -> RowValues:
        """Computes the values of the rows. Fills `gradient` unless it is None."""
        written = self.gradient
        if self.gradient is not None and self.largest is not None:
            written = self.gradient.new_empty(self.student.shape)
        values = self.functions.row_loss(
            self.student,
            self.teacher,
            interpolated,
            self.settings,
            written,
            gradient_scale=self.source.gradient_scale,
            stats=self.stats,
        )
        if self.gradient is not None and self.largest is not None and written is not None:
            self.gradient.zero_().scatter_(1, self.largest, written)
        return values

    def keep_gradient(self) -> None:
        if self.gradient is not None:
            self.source.keep_gradient(self.rows, self.gradient)


def select_in_chunk(
    chunk: Chunk,
    ratio: Float[Tensor, " R"],
    cu_seqlens: Int[Tensor, " B+1"],
    settings: LossSettings,
) -> Bool[Tensor, " R"]:
    if settings.top_fraction == 1:
        return torch.ones_like(ratio, dtype=torch.bool)
    assert chunk.rollouts is not None
    bounds = cu_seqlens[chunk.rollouts.start : chunk.rollouts.stop + 1]
    return select_top_fraction(ratio, bounds - bounds[0], settings.top_fraction)


def run_loss(
    source: Source,
    chunks: list[Chunk],
    cu_seqlens: Int[Tensor, " B+1"],
    settings: LossSettings,
) -> TokenValues:
    """Computes all token values. The gradients stay in the source."""
    table = torch.empty(6, source.num_rows, dtype=source.dtype, device=source.device)
    token_loss, token_kl, student_entropy, teacher_entropy, ratio, clipped_mass = table
    device_bounds = cu_seqlens.to(source.device, non_blocking=True)
    everywhere = settings.interpolates and settings.top_fraction == 1
    for chunk in chunks:
        rows, interpolated = chunk.rows, None
        part = ChunkRows(source, rows, settings)
        if everywhere or (chunk.rollouts is not None and finds_statistics_first(settings)):
            student_entropy[rows], teacher_entropy[rows] = part.find_entropies()
            chunk_ratio = entropy_ratio(
                teacher_entropy[rows], student_entropy[rows], entropy_floor=settings.entropy_floor
            )
            interpolated = select_in_chunk(chunk, chunk_ratio, device_bounds, settings)
        values = part.losses(interpolated)
        token_loss[rows], token_kl[rows] = values.token_loss, values.token_kl
        clipped_mass[rows] = values.clipped_mass
        if interpolated is None:
            student_entropy[rows] = values.student_entropy
            teacher_entropy[rows] = values.target_entropy
        part.keep_gradient()
    ratio.copy_(
        entropy_ratio(teacher_entropy, student_entropy, entropy_floor=settings.entropy_floor)
    )
    selected = select_top_fraction(ratio, device_bounds, settings.top_fraction)
    values = TokenValues(table, selected)
    if settings.interpolates and not everywhere:
        redo_selected(source, chunks, cu_seqlens, settings, values)
    source.finish()
    return values


def rows_to_redo(
    chunks: list[Chunk],
    cu_seqlens: Int[Tensor, " B+1"],
    selected: Bool[Tensor, " N"],
    settings: LossSettings,
) -> Int[Tensor, " S"]:
    """Returns the selected rows of the rollouts that were split over chunks.

    On a GPU their number is not read, because the host would wait. It follows from the bounds if
    those are on the host. Otherwise the list has the largest possible length, and rows that are not
    selected fill it up: computing them again gives the same result.
    """
    in_pieces = selected
    if finds_statistics_first(settings):
        in_pieces = selected.clone()
        for chunk in chunks:
            if chunk.rollouts is not None:
                in_pieces[chunk.rows] = False
    if selected.device.type == "cpu":
        return in_pieces.nonzero()[:, 0]
    host_bounds = cu_seqlens.device.type == "cpu"
    return selected_first(in_pieces, chunks, cu_seqlens, settings, host_bounds)


def selected_first(
    selected: Bool[Tensor, " N"],
    chunks: list[Chunk],
    cu_seqlens: Int[Tensor, " B+1"],
    settings: LossSettings,
    host_bounds: bool,
) -> Int[Tensor, " S"]:
    """Returns as many rows as can be selected, the selected ones first, without reading
    `selected`."""
    num_rollouts = len(cu_seqlens) - 1
    count = min(len(selected), math.ceil(settings.top_fraction * len(selected)) + num_rollouts)
    if host_bounds:
        counts = selected_counts(cu_seqlens.diff(), settings.top_fraction)
        for chunk in chunks:
            if chunk.rollouts is not None:
                counts[chunk.rollouts] = 0
        count = int(counts.sum())
    return torch.sort(selected.to(torch.uint8), descending=True, stable=True).indices[:count]


def redo_selected(
    source: Source,
    chunks: list[Chunk],
    cu_seqlens: Int[Tensor, " B+1"],
    settings: LossSettings,
    values: TokenValues,
) -> None:
    """Computes the selected rows of split rollouts again, with the interpolated target."""
    if finds_statistics_first(settings) and all(chunk.rollouts is not None for chunk in chunks):
        return
    redone = rows_to_redo(chunks, cu_seqlens, values.selected, settings)
    for piece in row_slices(len(redone), source.rows_per_chunk):
        rows = redone[piece]
        if source.with_weight_gradient:
            old = ChunkRows(source, rows, settings)
            old.losses(None)
            assert old.gradient is not None
            source.add_weight_gradient(rows, old.gradient, -1.0)
        part = ChunkRows(source, rows, settings)
        new = part.losses(values.selected[rows])
        token_loss, token_kl, _, _, _, clipped_mass = values.table
        token_loss[rows], token_kl[rows] = new.token_loss, new.token_kl
        clipped_mass[rows] = new.clipped_mass
        part.keep_gradient()


def run_weight_gradient(
    source: HiddenSource, selected: Bool[Tensor, " N"], settings: LossSettings
) -> Float[Tensor, "V H"]:
    """Computes the head's gradient for the token weights of `source`, with a given selection."""
    for rows in row_slices(source.num_rows, source.rows_per_chunk):
        part = ChunkRows(source, rows, settings)
        part.losses(selected[rows] if settings.interpolates else None)
        part.keep_gradient()
    source.finish()
    return source.grad_weight
