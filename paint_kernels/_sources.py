"""Where rows of logits come from, and where their gradients go."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from paint_kernels._heads import Projection, add_bias_gradient, scale_rows
from paint_kernels._matmul import GradientProduct, compute_dtype, project
from paint_kernels._plan import head_group_rows
from paint_kernels._shards import WHOLE, Shard
from paint_kernels._weights import clear_rows, without_rows

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    Rows = slice | Int[Tensor, " R"]

ROW_ALIGNMENT = 64
"""elements to which rows of GPU buffers are padded, so that GEMMs and kernels read 16 bytes"""
BUFFER_ROWS = 128
"""rows to a multiple of which GPU buffers are made, so that batches of about one length use the
same memory again; a batch of a whole chunk or more has the same sizes in any case"""


def chunk_buffer(
    num_rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device, backend: str
) -> Float[Tensor, "R V"]:
    capacity, width = num_rows, vocab_size
    if backend == "triton":
        capacity = -(-num_rows // BUFFER_ROWS) * BUFFER_ROWS
        width = -(-vocab_size // ROW_ALIGNMENT) * ROW_ALIGNMENT
    buffer = torch.empty(capacity, width, dtype=dtype, device=device)
    return buffer[:num_rows, :vocab_size]


def row_major(logits: Float[Tensor, "R V"]) -> Float[Tensor, "R V"]:
    return logits if logits.stride(1) == 1 else logits.contiguous()


class LogitGradients:
    """Holds the gradients by the logits of some rows, and sums them up to the head's gradient.

    Each product for `grad_weight` reads and writes all of it. In half precision that takes longer
    than the product over one chunk, so the rows of several chunks are kept until they make a group.
    """

    def __init__(
        self,
        projection: Projection,
        product: GradientProduct,
        *,
        rows_per_chunk: int,
        backend: str,
        with_weight_gradient: bool = False,
    ) -> None:
        num_rows, head = len(projection.hidden_states), projection.head
        self.projection, self.product, self.backend = projection, product, backend
        # PyTorch writes a row's gradient after it has read its logits, Triton while it reads them.
        # The slope of a cap needs the logits after their gradient.
        in_place = backend == "torch" and head.softcap is None
        self.in_place = in_place and product.dtype == product.result_dtype
        self.group_rows = rows_per_chunk
        if with_weight_gradient and product.in_half:
            self.group_rows = head_group_rows(rows_per_chunk, num_rows)
        self.buffer = None
        self.group = slice(0, 0)
        size = head.weight.shape if with_weight_gradient else (0,)
        self.grad_weight = torch.empty(size, dtype=product.result_dtype, device=head.weight.device)
        self.is_written = False

    def of(self, logits: Float[Tensor, "R V"], rows: Rows) -> Float[Tensor, "R V"]:
        """Returns where the gradient by these logits is to be written, in the dtype and scale of
        the products with it: in place, or in a buffer."""
        if self.in_place:
            return logits
        if self.buffer is None:
            size = self.group_rows, logits.shape[1]
            self.buffer = chunk_buffer(*size, self.product.dtype, logits.device, self.backend)
        kept = self.group.stop - self.group.start
        follows = isinstance(rows, slice) and rows.start == self.group.stop
        if not follows or kept + len(logits) > self.group_rows:
            self.add_group()
            kept = 0
        assert kept + len(logits) <= self.group_rows
        return self.buffer[kept : kept + len(logits)]

    def add(self, gradient: Float[Tensor, "R V"], rows: Rows) -> None:
        """Takes the gradient that `of` has last given the place for, for `grad_weight`."""
        if self.in_place or not isinstance(rows, slice):
            self._add_product(gradient, rows)
        elif self.group.start == self.group.stop:
            self.group = rows
        else:
            self.group = slice(self.group.start, rows.stop)

    def add_group(self) -> None:
        """Adds the share of the rows whose gradients are kept to `grad_weight`."""
        kept = self.group.stop - self.group.start
        if kept:
            assert self.buffer is not None
            self._add_product(self.buffer[:kept], self.group)
        self.group = slice(self.group.stop, self.group.stop)

    def _add_product(self, gradient: Float[Tensor, "R V"], rows: Rows) -> None:
        self.product.head(gradient, rows, out=self.grad_weight, add=self.is_written)
        self.is_written = True

    def finish(self) -> None:
        """Adds what is kept, and divides `grad_weight` by the scale of the products."""
        self.add_group()
        if not self.is_written:
            self.grad_weight.zero_()
        self.product.unscale_head(self.grad_weight)


class HiddenSource:
    """Computes logits from hidden states and heads, and keeps the gradients by the student's.

    Rows of `grad_hidden` belong to each token's unweighted loss, in float32 or better; the upstream
    gradient scales them later. `grad_weight` and `grad_bias` are weighted by `token_weights`.
    """

    def __init__(
        self,
        student: Projection,
        teacher: Projection,
        token_weights: Float[Tensor, " N"] | None,
        *,
        rows_per_chunk: int,
        temperature: float,
        with_hidden_gradient: bool,
        with_weight_gradient: bool,
        with_bias_gradient: bool = False,
        backend: str,
        shard: Shard = WHOLE,
        zero_weight: Bool[Tensor, " N"] | None = None,
    ) -> None:
        self.student, self.teacher, self.shard = student, teacher, shard
        self.zero_weight = zero_weight
        self.dtype = torch.promote_types(student.dtype, teacher.dtype)
        hidden_states, weight = student.hidden_states, student.head.weight
        self.num_rows, self.vocab_size = len(hidden_states), len(weight)
        self.device = weight.device
        self.rows_per_chunk = rows_per_chunk
        self.with_hidden_gradient = with_hidden_gradient
        self.with_weight_gradient = with_weight_gradient
        self.with_bias_gradient = with_bias_gradient
        self.with_head_gradient = with_weight_gradient or with_bias_gradient
        self.with_gradient = with_hidden_gradient or self.with_head_gradient
        size = (rows_per_chunk, self.vocab_size)
        self.logits_buffer = chunk_buffer(2 * size[0], size[1], self.dtype, self.device, backend)
        if with_weight_gradient:
            hidden_states = without_rows(hidden_states, zero_weight)
        self.product = GradientProduct(hidden_states, weight, temperature, self.dtype)
        self.gradients = LogitGradients(
            student,
            self.product,
            rows_per_chunk=rows_per_chunk,
            backend=backend,
            with_weight_gradient=with_weight_gradient,
        )
        self.gradient_scale = self.product.scale
        self._prepare_results(token_weights)

    def _prepare_results(self, token_weights: Float[Tensor, " N"] | None) -> None:
        """Allocates the gradients that are wanted; the others stay empty."""
        hidden_states, head = self.student.hidden_states, self.student.head
        self.grad_hidden = hidden_states.new_empty(0, dtype=self.dtype)
        self.grad_weight = self.gradients.grad_weight
        self.grad_bias = head.weight.new_empty(0, dtype=self.dtype)
        if self.with_hidden_gradient:
            self.product.prepare_hidden()
            self.grad_hidden = self.grad_hidden.new_empty(hidden_states.shape)
        if self.with_head_gradient:
            assert token_weights is not None
            self.weights = token_weights * self.student.factor
        if self.with_weight_gradient:
            self.product.prepare_head(self.weights)
        if self.with_bias_gradient:
            self.grad_bias = head.weight.new_zeros(self.vocab_size, dtype=self.dtype)

    @property
    def overwrites_logits(self) -> bool:
        """Whether the gradient by some logits is written in their place."""
        return self.gradients.in_place

    def logits(self, rows: Rows) -> tuple[Float[Tensor, "R V"], Float[Tensor, "R V"]]:
        student, teacher = self.student.hidden_states[rows], self.teacher.hidden_states[rows]
        both_logits = self.logits_buffer[: 2 * len(student)]
        student_logits, teacher_logits = both_logits.chunk(2)
        weight, teacher_weight = self.student.head.weight, self.teacher.head.weight
        if teacher_weight is weight and student.dtype == teacher.dtype:
            # One product of twice as many rows reads the shared head once.
            project(torch.cat([student, teacher]), weight, out=both_logits)
        else:
            project(student, weight, out=student_logits)
            project(teacher, teacher_weight, out=teacher_logits)
        self.student.from_product(student_logits, rows)
        self.teacher.from_product(teacher_logits, rows)
        return student_logits, teacher_logits

    def gradient(self, rows: Rows, num_rows: int) -> Float[Tensor, "R V"] | None:
        """Returns the buffer for the gradient by the logits of these rows."""
        if not self.with_gradient:
            return None
        return self.gradients.of(self.logits_buffer[:num_rows], rows)

    def keep_gradient(
        self,
        rows: Rows,
        gradient: Float[Tensor, "R V"],
        before: Float[Tensor, "R V"] | None = None,
    ) -> None:
        """Takes the gradient by the logits of these rows, the last that `logits` has computed.

        before: what was kept for the same rows earlier, where the head's gradients have it already.
        """
        earlier = () if before is None else (before,)
        self.student.through_cap(self.logits_buffer[: len(gradient)], rows, gradient, *earlier)
        if self.with_hidden_gradient:
            if isinstance(rows, slice):
                self.product.hidden(gradient, out=self.grad_hidden[rows])
            else:
                back = self.grad_hidden.new_empty(len(rows), self.grad_hidden.shape[1])
                self.product.hidden(gradient, out=back)
                self.grad_hidden[rows] = back
        change = gradient if before is None else gradient.sub_(before)
        if self.with_head_gradient and self.zero_weight is not None:
            clear_rows(change, self.zero_weight[rows])
        if self.with_bias_gradient:
            add_bias_gradient(change, self.weights[rows], self.grad_bias)
        if self.with_weight_gradient:
            self.gradients.add(change, rows)

    def finish(self) -> None:
        """Adds what is kept, divides the gradients by the scale that they were accumulated in, and
        sums those by the hidden states over the shards of the head."""
        if self.with_hidden_gradient:
            self.product.unscale_hidden(self.grad_hidden)
            scale_rows(self.grad_hidden, self.student.factor)
            clear_rows(self.grad_hidden, self.zero_weight)
            self.grad_hidden = self.shard.sum(self.grad_hidden)
        if self.with_weight_gradient:
            self.gradients.finish()
        self.grad_bias.div_(self.product.scale)


class LogitsSource:
    """Logits that the caller holds. Their gradient has their shape and dtype."""

    with_head_gradient = overwrites_logits = False
    gradient_scale = 1.0

    def __init__(
        self,
        student_logits: Float[Tensor, "N V"],
        teacher_logits: Float[Tensor, "N V"],
        temperatures: Float[Tensor, " N"] | None = None,
        *,
        rows_per_chunk: int,
        with_gradient: bool,
        shard: Shard = WHOLE,
        zero_weight: Bool[Tensor, " N"] | None = None,
    ) -> None:
        self.student_logits, self.teacher_logits = student_logits, teacher_logits
        self.shard, self.zero_weight = shard, zero_weight
        self.temperatures = temperatures
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
        student, teacher = self.student_logits[rows], self.teacher_logits[rows]
        if self.temperatures is not None:
            temperatures = self.temperatures[rows, None]
            # The caller's logits stay as they are. Divided, they are float32 or better.
            student, teacher = student / temperatures, teacher / temperatures
        return row_major(student), row_major(teacher)

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
        if self.temperatures is not None:
            gradient.div_(self.temperatures[rows, None])
        if self.zero_weight is not None:
            clear_rows(gradient, self.zero_weight[rows])
        if not isinstance(rows, slice):
            self.grad_logits[rows] = gradient

    def finish(self) -> None:
        pass
