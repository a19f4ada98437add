"""Every kernel over ragged and odd shapes, with each load and store checked.

An access must fall on an element of a tensor that the kernel was given: one behind a row of fewer
columns than its stride has left its tensor, though not its allocation. Stores must fall on an
output. test_triton_backend.py runs this file in Triton's interpreter, in a process of its own.
"""

import contextlib
import inspect
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from served import TAILS, serve
from torch import Tensor
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

from paint_kernels import (
    LossSettings,
    _ops,
    _tokens,
    _triton_backend,
    _triton_heads,
    _triton_shards,
    _triton_topk,
    paint_loss,
    paint_loss_from_topk,
)
from paint_kernels._torch_divergences import DIVERGENCES

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
OUTPUTS = (
    *("maximum_ptr", "rest_ptr", "entropy_ptr", "largest_ptr", "candidates_ptr"),
    *("gradient_ptr", "loss_ptr", "divergence_ptr", "clipped_mass_ptr"),
)
"""of all kernels; an output of the statistics is an input of the loss, which has another name"""
VOCAB_SIZES = (1, 3, 16, 17, 64, 65, 130)
"""around the lanes (16) and the tiles (64)"""


class Argument(NamedTuple):
    name: str
    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int

    def has(self, addresses: np.ndarray, itemsize: int) -> np.ndarray:
        """Returns which addresses are those of elements, of this size."""
        offsets = addresses.astype(np.int64) - self.address
        inside = (offsets >= 0) & (offsets % self.itemsize == 0) & (itemsize == self.itemsize)
        offsets = offsets // self.itemsize
        # From the dimension with the largest steps to that with the smallest.
        for stride, size in sorted(zip(self.strides, self.shape, strict=True), reverse=True):
            index = offsets // stride
            inside &= index < size
            offsets = offsets - index * stride
        return inside & (offsets == 0)


class Sanitizer:
    """Knows the arguments of the kernel that runs now."""

    def __init__(self, outputs: tuple[str, ...]) -> None:
        self.outputs = outputs
        self.arguments: list[Argument] = []
        self.num_accesses = 0

    def start(self, kernel: Any, arguments: tuple[Any, ...], settings: dict[str, Any]) -> None:
        names = inspect.getfullargspec(kernel.fn).args
        given = dict(zip(names, arguments, strict=False)) | settings
        self.arguments = []
        for name, value in given.items():
            if isinstance(value, Tensor):
                layout = tuple(value.shape), value.stride(), value.element_size()
                self.arguments.append(Argument(name, value.data_ptr(), *layout))
                if name == "logits_ptr" and given.get("role_offset"):
                    second = value.data_ptr() + given["role_offset"] * value.element_size()
                    self.arguments.append(Argument(name, second, *layout))

    def check(self, access: str, pointers: Any, mask: Any) -> None:
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        itemsize = pointers.get_element_ty().primitive_bitwidth // 8
        allowed = [
            argument
            for argument in self.arguments
            if access == "load" or argument.name in self.outputs
        ]
        known = np.zeros(addresses.shape, dtype=bool)
        for argument in allowed:
            known |= argument.has(addresses, itemsize)
        assert known.all(), (
            f"{access} of {itemsize} bytes at {addresses[~known]}, not an element of "
            f"{', '.join(argument.name for argument in allowed)}"
        )
        self.num_accesses += addresses.size


@contextlib.contextmanager
def sanitized(*outputs: str) -> Iterator[Sanitizer]:
    """Checks all kernels that run inside. outputs: names of the arguments that they may write."""
    sanitizer = Sanitizer(outputs)
    run = InterpretedFunction.run
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def checked_run(self: Any, *arguments: Any, **settings: Any) -> Any:
        sanitizer.start(self, arguments, settings)
        return run(self, *arguments, **settings)

    def checked_load(self: Any, ptrs: Any, mask: Any, *arguments: Any, **options: Any) -> Any:
        sanitizer.check("load", ptrs, mask)
        return load(self, ptrs, mask, *arguments, **options)

    def checked_store(self: Any, ptrs: Any, value: Any, mask: Any, *arguments: Any) -> Any:
        sanitizer.check("store", ptrs, mask)
        return store(self, ptrs, value, mask, *arguments)

    with (
        patch.object(InterpretedFunction, "run", checked_run),
        patch.object(InterpreterBuilder, "create_masked_load", checked_load),
        patch.object(InterpreterBuilder, "create_masked_store", checked_store),
    ):
        yield sanitizer


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(_triton_backend, "LANES", 16)
    monkeypatch.setattr(_triton_backend, "GROUPS", 8)
    monkeypatch.setattr(_triton_topk, "ENTRIES", 4)
    monkeypatch.setattr(_triton_topk, "WIDTH_BLOCK", 8)
    monkeypatch.setattr(_triton_topk, "SOFTMAX_BLOCK", 64)
    monkeypatch.setattr(_triton_heads, "BLOCK", 64)


def layouts(rows, columns, dtype=torch.float32):
    """Yields two matrices of logits: in one buffer with padded rows, and as large as they must
    be."""
    generator = torch.Generator().manual_seed(columns)
    values = torch.randn(2 * rows, columns, generator=generator).to(dtype)
    buffer = torch.full((2 * rows, columns + 1), torch.nan, dtype=dtype)[:, :columns]
    yield buffer.copy_(values).chunk(2)
    yield values[:rows].clone(), values[rows:].clone()


@pytest.mark.parametrize("columns", VOCAB_SIZES)
def test_statistics_and_log_probabilities(columns):
    rows = 3
    for student, teacher in layouts(rows, columns):
        gradient = torch.full_like(student, torch.nan, dtype=torch.float16)
        ids = torch.arange(rows) % columns
        with sanitized(*OUTPUTS[:5]) as sanitizer:
            _triton_backend.pair_stats(student, teacher, 0.7)
        assert sanitizer.num_accesses > 2 * rows * columns
        with sanitized(*OUTPUTS):
            _triton_backend.row_logprobs(student, ids, 0.7, gradient)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float16), (torch.bfloat16,) * 2])
@pytest.mark.parametrize("columns", VOCAB_SIZES)
def test_losses(columns, divergence, dtypes):
    rows, marks = 2, torch.tensor([False, True])
    options = ((None, None), (1e-3, marks))
    pairs = itertools.product(layouts(rows, columns, dtypes[0]), options)
    for (student, teacher), (clip, interpolated) in pairs:
        settings = LossSettings(divergence=divergence, pointwise_clip=clip, backend="triton")
        gradient = torch.full((rows, columns + 3), torch.nan, dtype=dtypes[1])[:, :columns]
        with sanitized(*OUTPUTS) as sanitizer:
            _triton_backend.row_loss(student, teacher, interpolated, settings, gradient)
            _triton_backend.row_loss(student, teacher, interpolated, settings, None)
        assert sanitizer.num_accesses > 6 * rows * columns
        assert gradient.isfinite().all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("columns", VOCAB_SIZES)
def test_columns_of_a_rank(columns, divergence):
    """With the row's largest entry and token among them, and elsewhere."""
    rows, outputs = 2, ("sums_ptr", "gradient_ptr")
    for student, teacher in layouts(rows, columns):
        settings = LossSettings(divergence=divergence, pointwise_clip=1e-3, backend="triton")
        stats = _triton_shards.local_stats(student, 1.0)
        target = _triton_shards.local_stats(teacher, 1.0)
        largest = torch.tensor([columns - 1, -1])
        given = student, teacher, stats._replace(largest=largest), target, settings
        gradient = torch.full((rows, columns + 3), torch.nan)[:, :columns]
        with sanitized(*outputs) as sanitizer:
            _, _, _, _, _, slopes, own = _triton_shards.local_sums(*given)
            _triton_shards.fill_gradient(*given, slopes + own, own, gradient, 1.0)
        assert sanitizer.num_accesses > 5 * rows * columns
        assert gradient.isfinite().all()
        with sanitized(*outputs):
            _triton_shards.fill_logprobs_gradient(student, stats, largest, own, 1.0, gradient, 1.0)
        assert gradient.isfinite().all()


def with_gaps(values):
    """Returns the rows one element apart, and what lies between is NaN."""
    buffer = torch.full((len(values), values.shape[1] + 1), torch.nan, dtype=values.dtype)
    return buffer[:, : values.shape[1]].copy_(values)


def some_ids(rows, num_ids, num_head_rows):
    """Returns ids of which a third is padding, and in the first row all."""
    generator = torch.Generator().manual_seed(num_ids)
    ids = torch.randint(0, num_head_rows, (rows, num_ids), generator=generator)
    ids[torch.rand(rows, num_ids, generator=generator) < 1 / 3] = -1
    ids[0] = -1
    return ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_ids", [1, 3, 4, 5, 9])
@pytest.mark.parametrize("width", [1, 7, 8, 9, 19])
def test_products_of_a_top_k(width, num_ids, dtype):
    """Of widths around the tile (8) and ids around a tile's (4)."""
    rows, num_head_rows = 3, 6
    ids = some_ids(rows, num_ids, num_head_rows)
    hidden = with_gaps(torch.ones(rows, width, dtype=dtype))
    weight = with_gaps(torch.ones(num_head_rows, width, dtype=dtype))
    with sanitized("logits_ptr") as sanitizer:
        logits = _triton_topk.gathered_logits(hidden, weight, ids)
    assert torch.equal(logits, torch.where(ids < 0, -torch.inf, float(width)))
    found = int((ids >= 0).sum())
    assert sanitizer.num_accesses > found * width
    values = torch.where(ids < 0, 0.0, 1.0)
    tail = with_gaps(torch.ones(rows, width)), torch.full((rows,), 0.5)
    for rest, added in ((None, 0.0), (tail, 0.5)):
        out = with_gaps(torch.full((rows, width), torch.nan))
        with sanitized("out_ptr") as sanitizer:
            _triton_topk.hidden_gradient(values, weight, ids, rest, out)
        assert sanitizer.num_accesses > found * width
        assert torch.equal(out, (values.sum(1, keepdim=True) + added).expand(rows, width))
    out = with_gaps(torch.zeros(num_head_rows, width))
    with sanitized("out_ptr"):
        _triton_topk.add_head_gradient(values, hidden, ids, out)
    counts = ids[ids >= 0].bincount(minlength=num_head_rows).float()
    assert torch.equal(out, counts[:, None].expand(num_head_rows, width))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("columns", VOCAB_SIZES)
def test_softmax(columns, dtype):
    logits = with_gaps(torch.zeros(2, columns))
    out = with_gaps(torch.full((2, columns), torch.nan, dtype=dtype))
    with sanitized("out_ptr") as sanitizer:
        _triton_topk.softmax_rows(logits, torch.zeros(2), 1.1, out, 4.0)
    assert sanitizer.num_accesses > 4 * columns
    assert torch.equal(out, torch.full_like(out, 4.0))


@pytest.mark.parametrize(
    ("softcap", "per_token"), [(None, False), (None, True), (3.0, False), (3.0, True)]
)
@pytest.mark.parametrize("columns", VOCAB_SIZES)
def test_heads_that_do_more_than_a_product(columns, softcap, per_token):
    logits = with_gaps(torch.ones(2, columns))
    bias = torch.ones(columns, dtype=torch.bfloat16) if per_token else None
    temperatures = torch.full((2,), 2.0) if per_token else None
    with sanitized("logits_ptr") as sanitizer:
        _triton_heads.logits_from_product(logits, bias, 0.5, softcap, temperatures)
    assert sanitizer.num_accesses >= 4 * columns
    assert logits.isfinite().all()
    if softcap is None:
        return
    for dtype in (torch.float16, torch.float32):
        gradient = with_gaps(torch.ones(2, columns, dtype=dtype))
        with sanitized("gradient_ptr") as sanitizer:
            _triton_heads.gradient_through_cap(gradient, logits, softcap, temperatures)
        assert sanitizer.num_accesses >= 6 * columns
        assert gradient.isfinite().all()


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("num_ids", [1, 9])
def test_whole_losses_of_a_served_top_k(build, monkeypatch, num_ids, tail):
    monkeypatch.setattr(_tokens, "most_rows", lambda *_: 9)
    served = serve(build((7, 0, 1, 12), 75, hidden=9), num_ids).trainable()
    # Of the row functions, and of the products: the softmax overwrites logits.
    with sanitized(*OUTPUTS, "logits_ptr", "out_ptr") as sanitizer:
        options = {"backend": "triton", "tail": tail, "top_fraction": 0.3}
        served.loss(paint_loss_from_topk, **options).loss.backward()
    assert sanitizer.num_accesses > 0
    assert served.student.grad.isfinite().all() and served.weight.grad.isfinite().all()


@pytest.mark.parametrize("head", [True, False])
def test_whole_losses_on_the_teachers_top_k(build, monkeypatch, head):
    monkeypatch.setattr(_tokens, "most_rows", lambda *_: 9)
    batch = build((7, 0, 1, 12), 75, hidden=9).trainable(head)
    with sanitized("logits_ptr", "out_ptr") as sanitizer:
        batch.loss(paint_loss, backend="triton", teacher_top_k=5).loss.backward()
    assert sanitizer.num_accesses > 0
    assert batch.student.grad.isfinite().all()


@pytest.mark.parametrize(("lengths", "most"), [((7, 0, 1, 12), 9), ((5, 3), 3), ((1,), 1)])
def test_whole_losses_in_chunks(build, monkeypatch, lengths, most):
    monkeypatch.setattr(_ops, "most_rows", lambda *_: most)
    batch = build(lengths, 75, noise=0.3).trainable()
    with sanitized(*OUTPUTS):
        batch.loss(paint_loss, backend="triton", top_fraction=0.3).loss.backward()
    assert batch.student.grad.isfinite().all()


@triton.jit
def shifted_kernel(x_ptr, y_ptr, shift, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    tl.store(y_ptr + columns, tl.load(x_ptr + shift + columns))


@pytest.mark.parametrize("shift", [-1, 1, 8])
def test_an_access_outside_is_found(shift):
    x, y = torch.zeros(2, 8)[0], torch.zeros(8)
    with sanitized("y_ptr"), pytest.raises(InterpreterError, match="load of 4 bytes"):
        shifted_kernel[(1,)](x, y, shift, BLOCK=8)
    with sanitized("y_ptr"):
        shifted_kernel[(1,)](x, y, 0, BLOCK=8)


def test_a_store_to_an_input_and_behind_a_row_is_found():
    x = torch.zeros(8)
    with sanitized("y_ptr"), pytest.raises(InterpreterError, match="store of 4 bytes"):
        shifted_kernel[(1,)](x, torch.zeros(2, 8)[:, :4], 0, BLOCK=8)
    with sanitized("z_ptr"), pytest.raises(InterpreterError, match="store of 4 bytes"):
        shifted_kernel[(1,)](x, torch.zeros(8), 0, BLOCK=8)
