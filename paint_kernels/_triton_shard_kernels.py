"""The Triton row kernels of one rank's columns, where several ranks hold the logits of a row.

Statistics of the whole row are given: the local ones come from `stats_kernel`, and targets are
interpolated before. Each loop reads the rank's columns of a row once.
"""

# pyright: reportOperatorIssue=false, reportArgumentType=false
# tl.sum is annotated as if it could return tuples here, constexpr as if it took no Python values.

import triton
import triton.language as tl

from paint_kernels._triton_divergences import LOG2_E, clipped_weight, log_ratio_of
from paint_kernels._triton_kernels import EMPTY, RowPair, load_logits, load_terms


@triton.jit
def load_slopes(pair, columns, threshold, DIVERGENCE: tl.constexpr):
    """Loads a tile of a `RowPair`. Returns p, q, marks of clipped entries, gap and left of
    `pointwise`, and the slope h, with which the gradient is h - p sum(h). All but the marks carry
    the factor 1 + rest_T."""
    p, q, f, gap, left, weight = load_terms(pair, columns, False, DIVERGENCE)
    clipped = f > threshold
    if DIVERGENCE == "forward_kl":
        slope = -tl.where(clipped, 0.0, q)
    else:
        slope = p * clipped_weight(weight, clipped, DIVERGENCE)
    return p, q, clipped, gap, left, slope


@triton.jit
def shard_sums_kernel(
    student_ptr,  # (R, V)
    target_ptr,  # (R, V)
    student_maximum_ptr,  # (R,)
    student_rest_ptr,  # (R,)
    student_largest_ptr,  # (R,) int32; -1 where another rank has the column
    target_maximum_ptr,  # (R,)
    target_rest_ptr,  # (R,)
    sums_ptr,  # (5, row_capacity), filled
    student_stride,
    target_stride,
    row_capacity,
    num_columns,
    jsd_weight,
    clip,  # inf for no clip
    inverse_temperature,
    DIVERGENCE: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    LANES: tl.constexpr,
):
    """Computes the sums over the rank's columns of a row: clipped f, f, clipped mass, and slopes
    but for that of the row's largest entry; and that slope."""
    row = tl.program_id(0).to(tl.int64)
    student_maximum = tl.load(student_maximum_ptr + row)
    target_maximum = tl.load(target_maximum_ptr + row)
    target_rest = tl.load(target_rest_ptr + row)
    largest = tl.load(student_largest_ptr + row)
    pair = RowPair(
        student_ptr + row * student_stride,
        target_ptr + row * target_stride,
        num_columns,
        student_maximum,
        target_maximum,
        log_ratio_of(tl.load(student_rest_ptr + row), target_rest),
        False,
        0.0,
        inverse_temperature,
        jsd_weight,
    )
    threshold = clip * (1.0 + target_rest) if HAS_CLIP else float("inf")
    loss = tl.zeros([LANES], tl.float32)
    divergence = tl.zeros([LANES], tl.float32)
    clipped_mass = tl.zeros([LANES], tl.float32)
    slopes = tl.zeros([LANES], tl.float32)
    own = tl.zeros([LANES], tl.float32)
    for start in range(0, num_columns, LANES):
        columns = start + tl.arange(0, LANES)
        _p, q, clipped, gap, left, slope = load_slopes(pair, columns, threshold, DIVERGENCE)
        divergence += gap
        loss += tl.where(clipped, threshold - left, gap)
        clipped_mass += tl.where(clipped, q, 0.0)
        slopes += tl.where(columns == largest, 0.0, slope)
        own += tl.where(columns == largest, slope, 0.0)
    # A row without a finite logit on either side has loss 0.
    usable = (student_maximum != EMPTY) & (target_maximum != EMPTY)
    share = tl.where(usable, 1.0 / (1.0 + target_rest), 0.0)
    row_sums_ptr = sums_ptr + row
    tl.store(row_sums_ptr, tl.where(usable, share * tl.sum(loss, axis=0), 0.0))
    tl.store(row_sums_ptr + row_capacity, tl.where(usable, share * tl.sum(divergence, axis=0), 0.0))
    tl.store(row_sums_ptr + 2 * row_capacity, share * tl.sum(clipped_mass, axis=0))
    tl.store(row_sums_ptr + 3 * row_capacity, share * tl.sum(slopes, axis=0))
    tl.store(row_sums_ptr + 4 * row_capacity, share * tl.sum(own, axis=0))


@triton.jit
def shard_gradient_kernel(
    student_ptr,  # (R, V)
    target_ptr,  # (R, V)
    gradient_ptr,  # (R, V), filled
    student_maximum_ptr,  # (R,)
    student_rest_ptr,  # (R,)
    student_largest_ptr,  # (R,) int32; -1 where another rank has the column
    target_maximum_ptr,  # (R,)
    target_rest_ptr,  # (R,)
    slope_sum_ptr,  # (R,), of all ranks
    own_ptr,  # (R,), the gradient by z / T of the largest entry
    student_stride,
    target_stride,
    gradient_stride,
    num_columns,
    jsd_weight,
    clip,  # inf for no clip
    gradient_scale,
    inverse_temperature,
    DIVERGENCE: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    LANES: tl.constexpr,
):
    """Computes the gradient of the rank's columns of a row, times gradient_scale."""
    row = tl.program_id(0).to(tl.int64)
    gradient_row_ptr = gradient_ptr + row * gradient_stride
    student_maximum = tl.load(student_maximum_ptr + row)
    target_maximum = tl.load(target_maximum_ptr + row)
    target_rest = tl.load(target_rest_ptr + row)
    largest = tl.load(student_largest_ptr + row)
    slope_sum = tl.load(slope_sum_ptr + row)
    pair = RowPair(
        student_ptr + row * student_stride,
        target_ptr + row * target_stride,
        num_columns,
        student_maximum,
        target_maximum,
        log_ratio_of(tl.load(student_rest_ptr + row), target_rest),
        False,
        0.0,
        inverse_temperature,
        jsd_weight,
    )
    threshold = clip * (1.0 + target_rest) if HAS_CLIP else float("inf")
    usable = (student_maximum != EMPTY) & (target_maximum != EMPTY)
    share = tl.where(usable, 1.0 / (1.0 + target_rest), 0.0)
    factor = inverse_temperature * gradient_scale
    for start in range(0, num_columns, LANES):
        columns = start + tl.arange(0, LANES)
        p, _q, _clipped, _gap, _left, slope = load_slopes(pair, columns, threshold, DIVERGENCE)
        gradient = (slope - p * slope_sum) * (share * factor)
        tl.store(gradient_row_ptr + columns, gradient, mask=columns < num_columns)
    # Written last, so that tiles are stored whole.
    tl.debug_barrier()
    own = tl.where(usable, tl.load(own_ptr + row) * factor, 0.0)
    tl.store(gradient_row_ptr + largest, own, mask=largest >= 0)


@triton.jit
def shard_logprobs_gradient_kernel(
    logits_ptr,  # (R, V)
    gradient_ptr,  # (R, V), filled
    token_rows_ptr,  # (R,) int64; -1 where another rank has the column
    maximum_ptr,  # (R,)
    rest_ptr,  # (R,)
    own_ptr,  # (R,), 1 - p of the token
    row_stride,
    gradient_stride,
    num_columns,
    gradient_scale,
    inverse_temperature,
    LANES: tl.constexpr,
):
    """Computes (one_hot(token) - p) / T in the rank's columns, times gradient_scale."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    gradient_row_ptr = gradient_ptr + row * gradient_stride
    maximum = tl.load(maximum_ptr + row)
    scale = LOG2_E * inverse_temperature
    factor = inverse_temperature * gradient_scale
    share = -factor / (1.0 + tl.load(rest_ptr + row))
    for start in range(0, num_columns, LANES):
        columns = start + tl.arange(0, LANES)
        logits = load_logits(row_ptr, columns, num_columns)
        gradient = tl.exp2((logits - maximum) * scale) * share
        tl.store(gradient_row_ptr + columns, gradient, mask=columns < num_columns)
    token = tl.load(token_rows_ptr + row)
    tl.debug_barrier()
    tl.store(gradient_row_ptr + token, tl.load(own_ptr + row) * factor, mask=token >= 0)
