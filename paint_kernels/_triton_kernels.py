"""Triton row kernels: one program a row of logits, the vocabulary in tiles, arithmetic in float32.

Each lane of a tile keeps its own running maximum, so a row is read once for its statistics and
lanes meet only at the end. The row's largest entry stays out of every sum, as in `_torch_backend`.
Offsets of rows are int64, because N x V passes 2^31 at 14,135 rows of 151,936. Settings are
constexpr: a Python float that reached a kernel as an argument could turn the arithmetic into
float64.
"""

# pyright: reportOperatorIssue=false
# tl.sum and tl.max are annotated as if they could return tuples here.

import triton
import triton.language as tl

# Below any logit, and far enough apart that exp(FAR_BELOW - EMPTY) is 0; finite, so that no
# difference of two of them is NaN.
EMPTY = tl.constexpr(-1e30)
"""running maximum of a lane that has seen no finite logit"""
FAR_BELOW = tl.constexpr(-2e30)
"""stands for -inf and for columns past the vocabulary"""


@triton.jit
def log1p(x):
    """log(1 + x) for x > -1, to float32 precision also near 0, where the GPU's log is coarse."""
    y = x / (2.0 + x)
    square = y * y
    series = 1.0 / 13.0
    series = 1.0 / 11.0 + square * series
    series = 1.0 / 9.0 + square * series
    series = 1.0 / 7.0 + square * series
    series = 1.0 / 5.0 + square * series
    series = 1.0 / 3.0 + square * series
    series = 1.0 + square * series
    return tl.where(tl.abs(x) < 0.5, 2.0 * y * series, tl.log(1.0 + x))


@triton.jit
def load_tile(row_ptr, columns, num_columns, INVERSE_TEMPERATURE: tl.constexpr):
    """x = z / T of a tile, finite throughout."""
    x = tl.load(row_ptr + columns, mask=columns < num_columns, other=float("-inf")).to(tl.float32)
    return tl.where(x == float("-inf"), FAR_BELOW, x * INVERSE_TEMPERATURE)


@triton.jit
def stats_kernel(
    logits_ptr,  # (R, V)
    maximum_ptr,  # (R,)
    rest_ptr,  # (R,)
    entropy_ptr,  # (R,)
    largest_ptr,  # (R,) int32
    row_stride,
    num_columns,
    INVERSE_TEMPERATURE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Row maximum m of x = z / T, its column, rest = sum exp(x - m) without it, and the entropy."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    maximum = tl.full([BLOCK], EMPTY, tl.float32)
    largest = tl.zeros([BLOCK], tl.int32)
    rest = tl.zeros([BLOCK], tl.float32)
    energy = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_columns, BLOCK):
        columns = start + lanes
        x = load_tile(logits_ptr + row * row_stride, columns, num_columns, INVERSE_TEMPERATURE)
        # One exponential serves both cases: the old sums shrink by it, or the new entry is it.
        above = x > maximum
        distance = tl.where(above, maximum - x, x - maximum)
        ratio = tl.exp(distance)
        energy = tl.where(
            above, ratio * (energy + distance * (1.0 + rest)), energy + ratio * distance
        )
        rest = tl.where(above, ratio * (1.0 + rest), rest + ratio)
        maximum = tl.where(above, x, maximum)
        largest = tl.where(above, columns, largest)

    row_maximum = tl.max(maximum, axis=0)
    winner = tl.min(tl.where(maximum == row_maximum, lanes, BLOCK), axis=0)
    distance = maximum - row_maximum
    weight = tl.where(maximum == EMPTY, 0.0, tl.exp(distance))
    row_rest = tl.sum(weight * (rest + tl.where(lanes == winner, 0.0, 1.0)), axis=0)
    row_energy = tl.sum(weight * (energy + distance * (1.0 + rest)), axis=0)
    tl.store(maximum_ptr + row, row_maximum)
    tl.store(rest_ptr + row, row_rest)
    tl.store(entropy_ptr + row, log1p(row_rest) - row_energy / (1.0 + row_rest))
    tl.store(largest_ptr + row, tl.sum(tl.where(lanes == winner, largest, 0), axis=0))


@triton.jit
def interpolate_kernel(
    student_ptr,  # (R, V)
    teacher_ptr,  # (R, V), overwritten
    interpolated_ptr,  # (R,) int8
    row_stride,
    num_columns,
    WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """z_T <- (1-k) z_T + k z_S on the marked rows (Eq. 12)."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(interpolated_ptr + row) == 0:
        return
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < num_columns
        offsets = row * row_stride + columns
        mixed = tl.load(student_ptr + offsets, mask=inside, other=0.0)
        if WEIGHT < 1.0:
            teacher = tl.load(teacher_ptr + offsets, mask=inside, other=0.0)
            mixed = (1.0 - WEIGHT) * teacher + WEIGHT * mixed
        tl.store(teacher_ptr + offsets, mixed, mask=inside)


@triton.jit
def target_tile(
    student_ptr,
    teacher_ptr,
    offsets,
    columns,
    num_columns,
    student_maximum,
    teacher_maximum,
    log_ratio,
    inverse_teacher_sum,
    INVERSE_TEMPERATURE: tl.constexpr,
):
    """x_S - m_S, the target p~, and f = p~ (log p~ - log p_S), 0 where p~ is 0."""
    student = load_tile(student_ptr + offsets, columns, num_columns, INVERSE_TEMPERATURE)
    teacher = load_tile(teacher_ptr + offsets, columns, num_columns, INVERSE_TEMPERATURE)
    student = student - student_maximum
    teacher = teacher - teacher_maximum
    target = tl.exp(teacher) * inverse_teacher_sum
    difference = tl.where(student < EMPTY * 0.5, float("inf"), teacher - student + log_ratio)
    return student, target, target * tl.where(target == 0.0, 0.0, difference)


@triton.jit
def row_constants(
    student_maximum_ptr, student_rest_ptr, teacher_maximum_ptr, teacher_rest_ptr, row
):
    """Maxima, log of (1 + rest_S) / (1 + rest_T), and 1 / (1 + rest_T), which is 0 in a masked row.

    The logarithm is taken as in `_torch_backend.log_ratio`.
    """
    student_maximum = tl.load(student_maximum_ptr + row)
    teacher_maximum = tl.load(teacher_maximum_ptr + row)
    student_rest = tl.load(student_rest_ptr + row)
    teacher_rest = tl.load(teacher_rest_ptr + row)
    change = (student_rest - teacher_rest) / (1.0 + teacher_rest)
    log_ratio = tl.where(
        tl.abs(change) < 0.5,
        log1p(tl.where(tl.abs(change) < 0.5, change, 0.0)),
        log1p(student_rest) - log1p(teacher_rest),
    )
    masked = (student_maximum == EMPTY) | (teacher_maximum == EMPTY)
    inverse = tl.where(masked, 0.0, 1.0 / (1.0 + teacher_rest))
    return student_maximum, teacher_maximum, log_ratio, inverse


@triton.jit
def loss_kernel(
    student_ptr,  # (R, V)
    teacher_ptr,  # (R, V), interpolated already
    student_maximum_ptr,  # (R,)
    student_rest_ptr,  # (R,)
    teacher_maximum_ptr,  # (R,)
    teacher_rest_ptr,  # (R,)
    loss_ptr,  # (R,)
    kl_ptr,  # (R,)
    unclipped_mass_ptr,  # (R,)
    clipped_mass_ptr,  # (R,)
    row_stride,
    num_columns,
    CLIP: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    INVERSE_TEMPERATURE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums over the vocabulary of min(f, tau), f, and the target on either side of the clip."""
    row = tl.program_id(0).to(tl.int64)
    student_maximum, teacher_maximum, log_ratio, inverse = row_constants(
        student_maximum_ptr, student_rest_ptr, teacher_maximum_ptr, teacher_rest_ptr, row
    )
    loss = tl.zeros([BLOCK], tl.float32)
    kl = tl.zeros([BLOCK], tl.float32)
    unclipped_mass = tl.zeros([BLOCK], tl.float32)
    clipped_mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        _, target, f = target_tile(
            student_ptr,
            teacher_ptr,
            row * row_stride,
            columns,
            num_columns,
            student_maximum,
            teacher_maximum,
            log_ratio,
            inverse,
            INVERSE_TEMPERATURE,
        )
        kl += f
        if HAS_CLIP:
            clipped = f > CLIP
            loss += tl.where(clipped, CLIP, f)
            unclipped_mass += tl.where(clipped, 0.0, target)
            clipped_mass += tl.where(clipped, target, 0.0)
        else:
            loss += f
            unclipped_mass += target
    tl.store(loss_ptr + row, tl.sum(loss, axis=0))
    tl.store(kl_ptr + row, tl.sum(kl, axis=0))
    tl.store(unclipped_mass_ptr + row, tl.sum(unclipped_mass, axis=0))
    tl.store(clipped_mass_ptr + row, tl.sum(clipped_mass, axis=0))


@triton.jit
def gradient_kernel(
    student_ptr,  # (R, V), becomes the gradient
    teacher_ptr,  # (R, V), interpolated already
    student_maximum_ptr,  # (R,)
    student_rest_ptr,  # (R,)
    teacher_maximum_ptr,  # (R,)
    teacher_rest_ptr,  # (R,)
    largest_ptr,  # (R,) int32
    unclipped_mass_ptr,  # (R,)
    row_stride,
    num_columns,
    CLIP: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    INVERSE_TEMPERATURE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """z_S <- (p_S * unclipped mass - p~ on the unclipped entries) / T."""
    row = tl.program_id(0).to(tl.int64)
    student_maximum, teacher_maximum, log_ratio, inverse = row_constants(
        student_maximum_ptr, student_rest_ptr, teacher_maximum_ptr, teacher_rest_ptr, row
    )
    unclipped_mass = tl.load(unclipped_mass_ptr + row)
    student_scale = unclipped_mass / (1.0 + tl.load(student_rest_ptr + row))
    largest = tl.load(largest_ptr + row)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        student, target, f = target_tile(
            student_ptr,
            teacher_ptr,
            row * row_stride,
            columns,
            num_columns,
            student_maximum,
            teacher_maximum,
            log_ratio,
            inverse,
            INVERSE_TEMPERATURE,
        )
        if HAS_CLIP:
            target = tl.where(f > CLIP, 0.0, target)
        gradient = (tl.exp(student) * student_scale - target) * INVERSE_TEMPERATURE
        keep = (columns < num_columns) & (columns != largest)
        total += tl.where(keep, gradient, 0.0)
        tl.store(student_ptr + row * row_stride + columns, gradient, mask=keep)
    # A row's gradient adds up to 0: what the others leave has all its digits in a confident row.
    tl.store(student_ptr + row * row_stride + largest, -tl.sum(total, axis=0))


@triton.jit
def logprobs_gradient_kernel(
    logits_ptr,  # (R, V), becomes the gradient
    token_ids_ptr,  # (R,) int64
    maximum_ptr,  # (R,)
    rest_ptr,  # (R,)
    row_stride,
    num_columns,
    INVERSE_TEMPERATURE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """z <- (one_hot(token) - p) / T."""
    row = tl.program_id(0).to(tl.int64)
    maximum = tl.load(maximum_ptr + row)
    scale = -INVERSE_TEMPERATURE / (1.0 + tl.load(rest_ptr + row))
    token = tl.load(token_ids_ptr + row)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = load_tile(logits_ptr + row * row_stride, columns, num_columns, INVERSE_TEMPERATURE)
        gradient = tl.exp(x - maximum) * scale
        keep = (columns < num_columns) & (columns != token)
        total += tl.where(keep, gradient, 0.0)
        tl.store(logits_ptr + row * row_stride + columns, gradient, mask=keep)
    tl.store(logits_ptr + row * row_stride + token, -tl.sum(total, axis=0))
