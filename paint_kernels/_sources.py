"""Where rows of logits come from, and where their gradients go."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from paint_kernels._matmul import GradientProduct, compute_dtype, project
from paint_kernels._plan import HEAD_GROUP_ROWS

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    Rows = slice | Int[Tensor, " R"]

ROW_ALIGNMENT = 64
"""elements to which rows of GPU buffers are padded, so that GEMMs and kernels read 16 bytes"""


def chunk_buffer(
    num_rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device, backend: str
) -> Float[Tensor, "R V"]:
    width = vocab_size
    if backend == "triton":
        width = -(-vocab_size // ROW_ALIGNMENT) * ROW_ALIGNMENT
    return torch.empty(num_rows, width, dtype=dtype, device=device)[:, :vocab_size]


def row_major(logits: Float[Tensor, "R V"]) -> Float[Tensor, "R V"]:
    return logits if logits.stride(1) == 1 else logits.contiguous()


class HiddenSource:
    """Computes logits from hidden states and heads, and keeps the gradients by the student's.

    Rows of `grad_hidden` belong to each token's unweighted loss, in float32 or better; the upstream
    gradient scales them later. `grad_weight` is weighted by `token_weights`. The gradients by the
    logits of several chunks are kept for it, in `gradient_buffer`, until they make a group.
    """

    def __init__(
        self,
        student: tuple[Float[Tensor, "N H"], Float[Tensor, "V H"]],
        teacher: tuple[Float[Tensor, "N H_T"], Float[Tensor, "V H_T"]],
        token_weights: Float[Tensor, " N"] | None,
        *,
        rows_per_chunk: int,
        temperature: float,
        with_hidden_gradient: bool,
        with_weight_gradient: bool,
        backend: str,
    ) -> None:
        self.student_hidden, self.student_weight = student
        self.teacher_hidden, self.teacher_weight = teacher
        self.dtype = compute_dtype(*student, *teacher)
        self.num_rows, self.vocab_size = len(self.student_hidden), len(self.student_weight)
        self.device = self.student_weight.device
        self.rows_per_chunk = rows_per_chunk
        self.with_hidden_gradient = with_hidden_gradient
        self.with_weight_gradient = with_weight_gradient
        self.with_gradient = with_hidden_gradient or with_weight_gradient
        size = (rows_per_chunk, self.vocab_size)
        self.logits_buffer = chunk_buffer(2 * size[0], size[1], self.dtype, self.device, backend)
        self.product = GradientProduct(*student, temperature, self.dtype)
        # PyTorch writes a row's gradient after it has read its logits, Triton while it reads them.
        self.gradient_buffer, self.group_rows = self.logits_buffer, rows_per_chunk
        if self.with_gradient and (backend == "triton" or self.product.dtype != self.dtype):
            if with_weight_gradient and self.product.in_half:
                self.group_rows = max(rows_per_chunk, min(HEAD_GROUP_ROWS, self.num_rows))
            size = (self.group_rows, self.vocab_size)
            self.gradient_buffer = chunk_buffer(*size, self.product.dtype, self.device, backend)
        self.group = slice(0, 0)
        self.gradient_scale = self.product.scale
        self.grad_hidden = self.student_hidden.new_empty(0, dtype=self.dtype)
        if with_hidden_gradient:
            self.product.prepare_hidden()
            self.grad_hidden = self.grad_hidden.new_empty(self.student_hidden.shape)
        self.grad_weight = self.student_weight.new_empty(0)
        if with_weight_gradient:
            assert token_weights is not None
            self.product.prepare_head(token_weights)
            self.grad_weight = torch.zeros_like(self.student_weight, dtype=self.dtype)

    def logits(self, rows: Rows) -> tuple[Float[Tensor, "R V"], Float[Tensor, "R V"]]:
        student, teacher = self.student_hidden[rows], self.teacher_hidden[rows]
        both_logits = self.logits_buffer[: 2 * len(student)]
        student_logits, teacher_logits = both_logits.chunk(2)
        if self.teacher_weight is self.student_weight and student.dtype == teacher.dtype:
            # One product of twice as many rows reads the shared head once.
            project(torch.cat([student, teacher]), self.student_weight, out=both_logits)
        else:
            project(student, self.student_weight, out=student_logits)
            project(teacher, self.teacher_weight, out=teacher_logits)
        return student_logits, teacher_logits

    def gradient(self, rows: Rows, num_rows: int) -> Float[Tensor, "R V"] | None:
        """Returns the buffer for the gradient by the logits of these rows."""
        if not self.with_gradient:
            return None
        kept = self.group.stop - self.group.start
        follows = isinstance(rows, slice) and rows.start == self.group.stop
        if not follows or kept + num_rows > self.group_rows:
            self.add_group()
            kept = 0
        return self.gradient_buffer[kept : kept + num_rows]

    def keep_gradient(
        self,
        rows: Rows,
        gradient: Float[Tensor, "R V"],
        before: Float[Tensor, "R V"] | None = None,
    ) -> None:
        """Takes the gradient by the logits of these rows.

        before: what was kept for the same rows earlier, where `grad_weight` has it already.
        """
        if self.with_hidden_gradient:
            if isinstance(rows, slice):
                self.product.hidden(gradient, out=self.grad_hidden[rows])
            else:
                back = self.grad_hidden.new_empty(len(rows), self.grad_hidden.shape[1])
                self.product.hidden(gradient, out=back)
                self.grad_hidden[rows] = back
        if not self.with_weight_gradient:
            return
        if isinstance(rows, slice):
            is_first = self.group.start == self.group.stop
            self.group = slice(rows.start if is_first else self.group.start, rows.stop)
            if self.gradient_buffer is self.logits_buffer:
                self.add_group()
        else:
            change = gradient if before is None else gradient.sub_(before)
            self.product.head(change, rows, out=self.grad_weight)

    def add_group(self) -> None:
        """Adds the share of the rows whose gradients are kept to `grad_weight`."""
        kept = self.group.stop - self.group.start
        if kept:
            self.product.head(self.gradient_buffer[:kept], self.group, out=self.grad_weight)
        self.group = slice(self.group.stop, self.group.stop)

    def finish(self) -> None:
        """Adds what is kept, and divides the gradients by the scale that they were accumulated
        in."""
        self.add_group()
        if self.with_hidden_gradient:
            self.product.unscale_hidden(self.grad_hidden)
        if self.with_weight_gradient:
            self.product.unscale_head(self.grad_weight)


class LogitsSource:
    """Logits that the caller holds. Their gradient has their shape and dtype."""

    with_weight_gradient = False
    gradient_scale = 1.0

    def __init__(
        self,
        student_logits: Float[Tensor, "N V"],
        teacher_logits: Float[Tensor, "N V"],
        *,
        rows_per_chunk: int,
        with_gradient: bool,
    ) -> None:
        self.student_logits, self.teacher_logits = student_logits, teacher_logits
        self.with_gradient = with_gradient
        self.dtype = compute_dtype(student_logits, teacher_logits)
        self.device = student_logits.device
        self.num_rows, self.vocab_size = student_logits.shape
        self.rows_per_chunk = rows_per_chunk
        size = student_logits.shape if with_gradient else (0,)
        # new_empty would keep the layout of logits that are not row-major.
        self.grad_logits = torch.empty(
            size, dtype=student_logits.dtype, device=student_logits.device
        )

    def logits(self, rows: Rows) -> tuple[Float[Tensor, "R V"], Float[Tensor, "R V"]]:
        return row_major(self.student_logits[rows]), row_major(self.teacher_logits[rows])

    def gradient(self, rows: Rows, num_rows: int) -> Float[Tensor, "R V"] | None:
        if not self.with_gradient:
            return None
        if isinstance(rows, slice):
            return self.grad_logits[rows]
        return self.grad_logits.new_empty(num_rows, self.vocab_size)

    def keep_gradient(
        self,
        rows: Rows,
        gradient: Float[Tensor, "R V"],
        before: Float[Tensor, "R V"] | None = None,
    ) -> None:
        if not isinstance(rows, slice):
            self.grad_logits[rows] = gradient

    def finish(self) -> None:
        pass
