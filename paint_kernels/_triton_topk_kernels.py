"""Triton kernels that multiply with a few rows of a matrix per row of the result.

They read the rows where they lie: no gathered copy is written. Products are of float32 and
accumulated in float32. Offsets are int64.
"""

# pyright: reportOperatorIssue=false, reportArgumentType=false
# tl.sum is annotated as if it could return tuples here, constexpr as if it took no Python values.

import triton
import triton.language as tl


@triton.jit
def gathered_logits_kernel(
    hidden_ptr,  # (N, H)
    weight_ptr,  # (V, H)
    ids_ptr,  # (N, K) int64; -1 for none
    logits_ptr,  # (N, K), filled
    hidden_stride,
    weight_stride,
    ids_stride,
    width,
    num_ids,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Computes the logits of ENTRIES ids of one token; -inf where there is no id."""
    row = tl.program_id(0).to(tl.int64)
    entries = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    ids = tl.load(ids_ptr + row * ids_stride + entries, mask=entries < num_ids, other=-1)
    exists = ids >= 0
    starts = tl.where(exists, ids, 0) * weight_stride
    total = tl.zeros([ENTRIES, BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        hidden = tl.load(hidden_ptr + row * hidden_stride + columns, mask=inside, other=0.0)
        found = tl.load(
            weight_ptr + (starts[:, None] + columns[None, :]),
            mask=exists[:, None] & inside[None, :],
            other=0.0,
        )
        total += found.to(tl.float32) * hidden.to(tl.float32)[None, :]
    logits = tl.where(exists, tl.sum(total, axis=1), float("-inf"))
    tl.store(logits_ptr + row * ids_stride + entries, logits, mask=entries < num_ids)


@triton.jit
def weighted_rows_kernel(
    bounds_ptr,  # (M + 1,) int64, of the entries of each row of the result
    indices_ptr,  # (E,) int64, rows of the matrix; -1 for none
    values_ptr,  # (E,)
    matrix_ptr,  # (X, H)
    rest_ptr,  # (M, H)
    rest_scale_ptr,  # (M,)
    out_ptr,  # (M, H), filled; may be `rest`
    matrix_stride,
    rest_stride,
    out_stride,
    width,
    HAS_REST: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Computes BLOCK columns of a row: the sum of values[e] * matrix[indices[e]] over the row's
    entries e, plus `rest` times its scale."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    first = tl.load(bounds_ptr + row)
    last = tl.load(bounds_ptr + row + 1)
    total = tl.zeros([ENTRIES, BLOCK], tl.float32)
    for start in range(first, last, ENTRIES):
        entries = start + tl.arange(0, ENTRIES)
        index = tl.load(indices_ptr + entries, mask=entries < last, other=-1)
        value = tl.load(values_ptr + entries, mask=entries < last, other=0.0)
        exists = index >= 0
        starts = tl.where(exists, index, 0) * matrix_stride
        found = tl.load(
            matrix_ptr + (starts[:, None] + columns[None, :]),
            mask=exists[:, None] & inside[None, :],
            other=0.0,
        )
        total += value[:, None] * found.to(tl.float32)
    result = tl.sum(total, axis=0)
    if HAS_REST:
        rest = tl.load(rest_ptr + row * rest_stride + columns, mask=inside, other=0.0)
        result += tl.load(rest_scale_ptr + row) * rest.to(tl.float32)
    tl.store(out_ptr + row * out_stride + columns, result, mask=inside)


@triton.jit
def softmax_kernel(
    logits_ptr,  # (R, V)
    logsumexp_ptr,  # (R,)
    out_ptr,  # (R, V), filled
    row_stride,
    out_stride,
    num_columns,
    inverse_temperature,
    scale,
    BLOCK: tl.constexpr,
):
    """Computes BLOCK columns of exp(logits / T - logsumexp) * scale."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    logits = tl.load(logits_ptr + row * row_stride + columns, mask=inside, other=0.0)
    x = logits.to(tl.float32) * inverse_temperature - tl.load(logsumexp_ptr + row)
    tl.store(out_ptr + row * out_stride + columns, tl.exp(x) * scale, mask=inside)
