"""The loop over token chunks that every backend shares: no (N, V) tensor outlives a chunk.

Chunks are of a fixed number of tokens, whatever the rollouts' bounds, so the host never needs to
know them. The entropies that select positions are known only after the first pass, so the target is
left as it is there, and the selected rows (3% of them) are computed once more with the interpolated
target.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from paint_kernels._matmul import add_weight_gradient, compute_dtype, project, project_back
from paint_kernels._types import LossSettings, RowValues
from paint_kernels.selection import entropy_ratio, select_top_fraction, teacher_top_k_indices

CPU_CHUNK_ELEMENTS = 2**24
"""logits in one chunk, 64 MiB of float32 a model: fewer rows read the head too often"""
GPU_CHUNK_ROWS = 4096

Rows = slice | Int[Tensor, " R"]


def row_functions(backend: str) -> ModuleType:
    """The module that computes rows; triton is imported only where it is used."""
    if backend == "triton":
        from paint_kernels import _triton_backend

        return _triton_backend
    from paint_kernels import _torch_backend

    return _torch_backend


def chunk_rows(num_rows: int, vocab_size: int, device: torch.device) -> int:
    """Rows in a chunk: as many chunks as the budget demands, all of about one size."""
    most = GPU_CHUNK_ROWS
    if device.type == "cpu":
        most = max(1, CPU_CHUNK_ELEMENTS // vocab_size)
    num_chunks = max(1, math.ceil(num_rows / most))
    return max(1, math.ceil(num_rows / num_chunks))


def chunks(num_rows: int, rows_per_chunk: int) -> Iterator[slice]:
    for start in range(0, num_rows, rows_per_chunk):
        yield slice(start, min(start + rows_per_chunk, num_rows))


class HiddenSource:
    """Logits out of hidden states and heads; gradients by the student's of both."""

    def __init__(
        self,
        student: tuple[Float[Tensor, "N H"], Float[Tensor, "V H"]],
        teacher: tuple[Float[Tensor, "N H_T"], Float[Tensor, "V H_T"]],
        token_weights: Float[Tensor, " N"] | None,
        *,
        with_hidden_gradient: bool,
        with_weight_gradient: bool,
    ) -> None:
        self.student_hidden, self.student_weight = student
        self.teacher_hidden, self.teacher_weight = teacher
        self.token_weights = token_weights
        self.dtype = compute_dtype(*student, *teacher)
        self.num_rows, self.vocab_size = len(self.student_hidden), len(self.student_weight)
        self.rows_per_chunk = chunk_rows(self.num_rows, self.vocab_size, self.student_weight.device)
        self.buffers = self.student_weight.new_empty(
            2 * self.rows_per_chunk, self.vocab_size, dtype=self.dtype
        )
        self.grad_hidden = self.student_hidden.new_empty(0)
        if with_hidden_gradient:
            self.grad_hidden = self.student_hidden.new_empty(self.student_hidden.shape)
        self.grad_weight = self.student_weight.new_empty(0)
        if with_weight_gradient:
            self.grad_weight = torch.zeros_like(self.student_weight, dtype=self.dtype)
        self.with_hidden_gradient = with_hidden_gradient
        self.with_weight_gradient = with_weight_gradient

    @property
    def with_gradient(self) -> bool:
        return self.with_hidden_gradient or self.with_weight_gradient

    def logits(self, rows: Rows) -> tuple[Float[Tensor, "R V"], Float[Tensor, "R V"]]:
        student, teacher = self.student_hidden[rows], self.teacher_hidden[rows]
        both_logits = self.buffers[: 2 * len(student)]
        student_logits, teacher_logits = both_logits.chunk(2)
        if self.teacher_weight is self.student_weight:
            # One product of twice the rows, which reads the shared head once.
            project(torch.cat([student, teacher]), self.student_weight, out=both_logits)
        else:
            project(student, self.student_weight, out=student_logits)
            project(teacher, self.teacher_weight, out=teacher_logits)
        return student_logits, teacher_logits

    def keep_gradient(self, rows: Rows, gradient: Float[Tensor, "R V"]) -> None:
        """Rows of grad_hidden stay unweighted, for any upstream gradient to scale them later."""
        if self.with_hidden_gradient:
            back = project_back(gradient, self.student_weight, self.student_hidden.dtype)
            self.grad_hidden[rows] = back.to(self.grad_hidden.dtype)
        self.add_weight_gradient(rows, gradient, 1.0)

    def add_weight_gradient(self, rows: Rows, gradient: Float[Tensor, "R V"], sign: float) -> None:
        if self.with_weight_gradient:
            assert self.token_weights is not None
            gradient.mul_(self.token_weights[rows, None] * sign)
            add_weight_gradient(self.grad_weight, gradient, self.student_hidden[rows])


class LogitsSource:
    """Logits that the caller holds; their gradient has their size and dtype."""

    with_weight_gradient = False

    def __init__(
        self,
        student_logits: Float[Tensor, "N V"],
        teacher_logits: Float[Tensor, "N V"],
        *,
        with_gradient: bool,
    ) -> None:
        self.student_logits, self.teacher_logits = student_logits, teacher_logits
        self.with_gradient = with_gradient
        self.dtype = compute_dtype(student_logits, teacher_logits)
        self.num_rows, self.vocab_size = student_logits.shape
        self.rows_per_chunk = chunk_rows(self.num_rows, self.vocab_size, student_logits.device)
        self.buffers = student_logits.new_empty(
            2, self.rows_per_chunk, self.vocab_size, dtype=self.dtype
        )
        size = student_logits.shape if with_gradient else (0,)
        self.grad_logits = student_logits.new_empty(size)

    def logits(self, rows: Rows) -> tuple[Float[Tensor, "R V"], Float[Tensor, "R V"]]:
        student, teacher = self.student_logits[rows], self.teacher_logits[rows]
        student_logits, teacher_logits = self.buffers[:, : len(student)]
        return student_logits.copy_(student), teacher_logits.copy_(teacher)

    def keep_gradient(self, rows: Rows, gradient: Float[Tensor, "R V"]) -> None:
        self.grad_logits[rows] = gradient.to(self.grad_logits.dtype)

    def add_weight_gradient(self, rows: Rows, gradient: Float[Tensor, "R V"], sign: float) -> None:
        raise AssertionError("logits have no head whose gradient could be kept")


@dataclass
class TokenValues:
    table: Float[Tensor, "6 N"]
    """token_loss, token_kl, student_entropy, teacher_entropy, entropy_ratio, clipped_mass"""
    selected: Bool[Tensor, " N"]


def loss_rows(
    source: HiddenSource | LogitsSource,
    rows: Rows,
    interpolated: Bool[Tensor, " R"] | None,
    settings: LossSettings,
    *,
    with_gradient: bool,
) -> tuple[RowValues, Float[Tensor, "R V"]]:
    """Values of some rows, and the buffer that holds their gradient by the logits."""
    functions = row_functions(settings.backend)
    student, teacher = source.logits(rows)
    options = {
        "interpolation_weight": settings.interpolation_weight,
        "temperature": settings.temperature,
        "pointwise_clip": settings.pointwise_clip,
        "with_gradient": with_gradient,
    }
    if settings.teacher_top_k is None:
        return functions.row_loss(student, teacher, interpolated, **options), student
    largest = teacher_top_k_indices(teacher, settings.teacher_top_k)
    restricted = student.gather(1, largest)
    values = functions.row_loss(restricted, teacher.gather(1, largest), interpolated, **options)
    return values, student.zero_().scatter_(1, largest, restricted)


def run_loss(
    source: HiddenSource | LogitsSource, cu_seqlens: Int[Tensor, " B+1"], settings: LossSettings
) -> TokenValues:
    """All token values; gradients are left in the source."""
    num_rows, device = source.num_rows, source.buffers.device
    table = torch.empty(6, num_rows, dtype=source.dtype, device=device)
    token_loss, token_kl, student_entropy, teacher_entropy, ratio, clipped_mass = table
    everywhere = settings.interpolates and settings.top_fraction == 1
    all_rows = torch.ones(num_rows, dtype=torch.bool, device=device)
    for rows in chunks(num_rows, source.rows_per_chunk):
        interpolated = all_rows[rows] if everywhere else None
        values, gradient = loss_rows(
            source, rows, interpolated, settings, with_gradient=source.with_gradient
        )
        token_loss[rows], token_kl[rows], clipped_mass[rows] = (
            values.token_loss,
            values.token_kl,
            values.clipped_mass,
        )
        student_entropy[rows], teacher_entropy[rows] = (
            values.student_entropy,
            values.teacher_entropy,
        )
        if source.with_gradient:
            source.keep_gradient(rows, gradient)
    ratio.copy_(
        entropy_ratio(teacher_entropy, student_entropy, entropy_floor=settings.entropy_floor)
    )
    selected = select_top_fraction(ratio, cu_seqlens, settings.top_fraction)
    if settings.interpolates and not everywhere:
        redo_selected(source, cu_seqlens, settings, TokenValues(table, selected))
    return TokenValues(table, selected)


def selected_rows(
    selected: Bool[Tensor, " N"], num_rollouts: int, top_fraction: float
) -> Int[Tensor, " S"]:
    """Indices of the selected rows.

    On a GPU their count is bounded instead of read, since reading waits for the device; rows that
    are not selected fill the list, and are computed again to the same result.
    """
    if selected.device.type == "cpu":
        return selected.nonzero()[:, 0]
    most = min(len(selected), math.ceil(top_fraction * len(selected)) + num_rollouts)
    return torch.sort(selected.to(torch.uint8), descending=True, stable=True).indices[:most]


def redo_selected(
    source: HiddenSource | LogitsSource,
    cu_seqlens: Int[Tensor, " B+1"],
    settings: LossSettings,
    values: TokenValues,
) -> None:
    """Replaces what the first pass left in the selected rows by the interpolated target's."""
    redone = selected_rows(values.selected, len(cu_seqlens) - 1, settings.top_fraction)
    for part in chunks(len(redone), source.rows_per_chunk):
        rows = redone[part]
        if source.with_weight_gradient:
            _, gradient = loss_rows(source, rows, None, settings, with_gradient=True)
            source.add_weight_gradient(rows, gradient, -1.0)
        new, gradient = loss_rows(
            source, rows, values.selected[rows], settings, with_gradient=source.with_gradient
        )
        token_loss, token_kl, _, _, _, clipped_mass = values.table
        token_loss[rows], token_kl[rows], clipped_mass[rows] = (
            new.token_loss,
            new.token_kl,
            new.clipped_mass,
        )
        if source.with_gradient:
            source.keep_gradient(rows, gradient)


def run_weight_gradient(
    source: HiddenSource, selected: Bool[Tensor, " N"], settings: LossSettings
) -> Float[Tensor, "V H"]:
    """The head's gradient for the token weights in `source`, with the selection known."""
    for rows in chunks(source.num_rows, source.rows_per_chunk):
        interpolated = selected[rows] if settings.interpolates else None
        _, gradient = loss_rows(source, rows, interpolated, settings, with_gradient=True)
        source.add_weight_gradient(rows, gradient, 1.0)
    return source.grad_weight


def logits_by_chunk(
    hidden_states: Float[Tensor, "N H"], weight: Float[Tensor, "V H"]
) -> Iterator[tuple[slice, Float[Tensor, "R V"]]]:
    """The logits of one model, chunk after chunk in one buffer that the caller may overwrite."""
    num_rows, vocab_size = len(hidden_states), len(weight)
    rows_per_chunk = chunk_rows(num_rows, vocab_size, weight.device)
    dtype = compute_dtype(hidden_states, weight)
    buffer = weight.new_empty(rows_per_chunk, vocab_size, dtype=dtype)
    for rows in chunks(num_rows, rows_per_chunk):
        hidden = hidden_states[rows]
        yield rows, project(hidden, weight, out=buffer[: len(hidden)])


def run_stats(
    hidden_states: Float[Tensor, "N H"],
    weight: Float[Tensor, "V H"],
    temperature: float,
    backend: str,
) -> Float[Tensor, "2 N"]:
    """(2, N): logsumexp and entropy."""
    dtype = compute_dtype(hidden_states, weight)
    stats = torch.empty(2, len(hidden_states), dtype=dtype, device=weight.device)
    for rows, logits in logits_by_chunk(hidden_states, weight):
        stats[0, rows], stats[1, rows] = row_functions(backend).row_stats(logits, temperature)
    return stats


def run_logprobs(
    hidden_states: Float[Tensor, "N H"],
    weight: Float[Tensor, "V H"],
    token_ids: Int[Tensor, " N"],
    temperature: float,
    backend: str,
    *,
    with_hidden_gradient: bool,
) -> tuple[Float[Tensor, "2 N"], Tensor]:
    """(2, N) log-probabilities and entropies; unweighted gradients by the hidden states, if any."""
    dtype = compute_dtype(hidden_states, weight)
    values = torch.empty(2, len(hidden_states), dtype=dtype, device=weight.device)
    size = hidden_states.shape if with_hidden_gradient else (0,)
    grad_hidden = hidden_states.new_empty(size)
    for rows, logits in logits_by_chunk(hidden_states, weight):
        values[0, rows], values[1, rows] = row_functions(backend).row_logprobs(
            logits, token_ids[rows], temperature=temperature, with_gradient=with_hidden_gradient
        )
        if with_hidden_gradient:
            back = project_back(logits, weight, hidden_states.dtype)
            grad_hidden[rows] = back.to(grad_hidden.dtype)
    return values, grad_hidden


def run_logprobs_weight_gradient(
    hidden_states: Float[Tensor, "N H"],
    weight: Float[Tensor, "V H"],
    token_ids: Int[Tensor, " N"],
    token_weights: Float[Tensor, " N"],
    temperature: float,
    backend: str,
) -> Float[Tensor, "V H"]:
    grad_weight = torch.zeros_like(weight, dtype=compute_dtype(hidden_states, weight))
    for rows, logits in logits_by_chunk(hidden_states, weight):
        row_functions(backend).row_logprobs(
            logits, token_ids[rows], temperature=temperature, with_gradient=True
        )
        logits.mul_(token_weights[rows, None])
        add_weight_gradient(grad_weight, logits, hidden_states[rows])
    return grad_weight
