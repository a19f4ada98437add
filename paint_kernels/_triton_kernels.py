"""The Triton row kernels: one program per row, the vocabulary in tiles, arithmetic in float32.

Each lane of a tile keeps its own running maximum, so that statistics read a row once and lanes are
merged only at the end. Every sum leaves the row's largest entry out, as in `_torch_backend`. Logits
may have any float dtype. Row offsets are int64, because N x V passes 2^31 at 14,135 rows of
151,936. Numbers that a trainer may schedule (temperature, weights, clip) are arguments, which
Triton passes as float32: a new value compiles nothing.
"""

# pyright: reportOperatorIssue=false, reportArgumentType=false
# tl.sum and tl.max are annotated as if they could return tuples here, constexpr as if they took no
# Python values.

import triton
import triton.language as tl

from paint_kernels._triton_divergences import (
    constant_term,
    gradient_of,
    log1p,
    log_ratio_of,
    pointwise,
)

# Below any logit, and far enough apart that exp(FAR_BELOW - EMPTY) is 0; finite, so that no
# difference of two of them is NaN.
EMPTY = tl.constexpr(-1e30)
"""running maximum of a lane that has seen no finite logit"""
FAR_BELOW = tl.constexpr(-2e30)
"""stands for -inf and for columns past the vocabulary"""
MISSED_SHARE = tl.constexpr(1e-6)
"""of the clipped mass: two orders of one sum differ by less, an entry without effect may be less"""


@triton.jit
def load_logits(row_ptr, columns, num_columns):
    inside = columns < num_columns
    return tl.load(row_ptr + columns, mask=inside, other=float("-inf")).to(tl.float32)


@triton.jit
def load_target(
    student_row_ptr,
    teacher_row_ptr,
    columns,
    num_columns,
    interpolated,
    INTERPOLATE: tl.constexpr,
    interpolation_weight,
):
    """Loads (1-k) z_T + k z_S if the row is interpolated (Eq. 12), with 0 times -inf taken as 0."""
    teacher = load_logits(teacher_row_ptr, columns, num_columns)
    if INTERPOLATE:
        student = load_logits(student_row_ptr, columns, num_columns)
        kept = tl.where(interpolation_weight < 1.0, teacher, 0.0)
        mixed = (1.0 - interpolation_weight) * kept + interpolation_weight * student
        teacher = tl.where(interpolated, mixed, teacher)
    return teacher


@triton.jit
def scaled(logits, inverse_temperature):
    """Returns z / T, finite throughout."""
    return tl.where(logits == float("-inf"), FAR_BELOW, logits * inverse_temperature)


@triton.jit
def scan_tile(x, columns, maximum, largest, rest, energy):
    """Adds a tile to each lane's maximum m, the column of m, and the sums of exp(x - m) and
    (x - m) exp(x - m), both without the maximum itself."""
    # One exponential serves both cases: it shrinks the old sums, or it is the new summand.
    above = x > maximum
    distance = tl.where(above, maximum - x, x - maximum)
    ratio = tl.exp(distance)
    energy = tl.where(above, ratio * (energy + distance * (1.0 + rest)), energy + ratio * distance)
    rest = tl.where(above, ratio * (1.0 + rest), rest + ratio)
    return tl.where(above, x, maximum), tl.where(above, columns, largest), rest, energy


@triton.jit
def merge_lanes(maximum, rest, energy, BLOCK: tl.constexpr):
    """Returns the row's maximum, the lane that holds it, and the row's two sums."""
    lanes = tl.arange(0, BLOCK)
    row_maximum = tl.max(maximum, axis=0)
    winner = tl.min(tl.where(maximum == row_maximum, lanes, BLOCK), axis=0)
    distance = maximum - row_maximum
    weight = tl.where(maximum == EMPTY, 0.0, tl.exp(distance))
    row_rest = tl.sum(weight * (rest + tl.where(lanes == winner, 0.0, 1.0)), axis=0)
    row_energy = tl.sum(weight * (energy + distance * (1.0 + rest)), axis=0)
    return row_maximum, winner, row_rest, row_energy


@triton.jit
def largest_of_groups(maximum, largest, num_columns, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """Returns the column of the largest entry in each of GROUPS groups of lanes; num_columns where
    a group has seen no finite logit. Neighbouring columns, such as those of the digits, are in
    different groups."""
    values = tl.reshape(maximum, [BLOCK // GROUPS, GROUPS])
    columns = tl.reshape(largest, [BLOCK // GROUPS, GROUPS])
    top = tl.max(values, axis=0)
    column = tl.min(tl.where(values == tl.expand_dims(top, 0), columns, num_columns), axis=0)
    return tl.where(top == EMPTY, num_columns, column)


@triton.jit
def stats_kernel(
    logits_ptr,  # (R, V)
    maximum_ptr,  # (R,)
    rest_ptr,  # (R,)
    entropy_ptr,  # (R,)
    largest_ptr,  # (R,) int32
    candidates_ptr,  # (R, GROUPS) int32
    row_stride,
    num_columns,
    inverse_temperature,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Computes the row maximum m of x = z / T, its column, the sum of exp(x - m) without it, the
    entropy, and the columns of GROUPS large entries of the row, the largest of BLOCK / GROUPS lanes
    each."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    maximum = tl.full([BLOCK], EMPTY, tl.float32)
    largest = tl.zeros([BLOCK], tl.int32)
    rest = tl.zeros([BLOCK], tl.float32)
    energy = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_columns, BLOCK):
        columns = start + lanes
        logits = load_logits(logits_ptr + row * row_stride, columns, num_columns)
        x = scaled(logits, inverse_temperature)
        maximum, largest, rest, energy = scan_tile(x, columns, maximum, largest, rest, energy)
    row_maximum, winner, row_rest, row_energy = merge_lanes(maximum, rest, energy, BLOCK)
    tl.store(maximum_ptr + row, row_maximum)
    tl.store(rest_ptr + row, row_rest)
    tl.store(entropy_ptr + row, log1p(row_rest) - row_energy / (1.0 + row_rest))
    tl.store(largest_ptr + row, tl.sum(tl.where(lanes == winner, largest, 0), axis=0))
    candidates = largest_of_groups(maximum, largest, num_columns, GROUPS, BLOCK)
    tl.store(candidates_ptr + row * GROUPS + tl.arange(0, GROUPS), candidates)


@triton.jit
def target_stats(
    student_row_ptr,
    teacher_row_ptr,
    num_columns,
    interpolation_weight,
    inverse_temperature,
    BLOCK: tl.constexpr,
):
    """Returns the maximum m of an interpolated target, and its sum of exp(x - m) without it."""
    lanes = tl.arange(0, BLOCK)
    maximum = tl.full([BLOCK], EMPTY, tl.float32)
    largest = tl.zeros([BLOCK], tl.int32)
    rest = tl.zeros([BLOCK], tl.float32)
    energy = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_columns, BLOCK):
        columns = start + lanes
        logits = load_target(
            student_row_ptr, teacher_row_ptr, columns, num_columns, True, True, interpolation_weight
        )
        x = scaled(logits, inverse_temperature)
        maximum, largest, rest, energy = scan_tile(x, columns, maximum, largest, rest, energy)
    row_maximum, _, row_rest, _ = merge_lanes(maximum, rest, energy, BLOCK)
    return row_maximum, row_rest


@triton.jit
def load_terms(
    student_row_ptr,
    teacher_row_ptr,
    columns,
    num_columns,
    student_maximum,
    teacher_maximum,
    log_ratio,
    inverse_student,
    inverse_teacher,
    interpolated,
    INTERPOLATE: tl.constexpr,
    interpolation_weight,
    DIVERGENCE: tl.constexpr,
    jsd_weight,
    inverse_temperature,
):
    """Loads a tile and returns its `pointwise` values."""
    student = load_logits(student_row_ptr, columns, num_columns)
    teacher = load_target(
        student_row_ptr,
        teacher_row_ptr,
        columns,
        num_columns,
        interpolated,
        INTERPOLATE,
        interpolation_weight,
    )
    return pointwise(
        scaled(student, inverse_temperature) - student_maximum,
        scaled(teacher, inverse_temperature) - teacher_maximum,
        log_ratio,
        inverse_student,
        inverse_teacher,
        DIVERGENCE,
        jsd_weight,
    )


@triton.jit
def clipped_mass_at(
    columns,
    student_row_ptr,
    teacher_row_ptr,
    num_columns,
    student_maximum,
    teacher_maximum,
    log_ratio,
    inverse_student,
    inverse_teacher,
    interpolated,
    clip,
    INTERPOLATE: tl.constexpr,
    interpolation_weight,
    DIVERGENCE: tl.constexpr,
    jsd_weight,
    inverse_temperature,
):
    """Returns the target mass of those of the columns that are clipped."""
    _p, q, _d, f, _gap, _left, _slope = load_terms(
        student_row_ptr,
        teacher_row_ptr,
        columns,
        num_columns,
        student_maximum,
        teacher_maximum,
        log_ratio,
        inverse_student,
        inverse_teacher,
        interpolated,
        INTERPOLATE,
        interpolation_weight,
        DIVERGENCE,
        jsd_weight,
        inverse_temperature,
    )
    return tl.sum(tl.where(f > clip, q, 0.0), axis=0)


@triton.jit
def loss_kernel(
    student_ptr,  # (R, V)
    teacher_ptr,  # (R, V)
    gradient_ptr,  # (R, V), filled
    interpolated_ptr,  # (R,) int8
    student_maximum_ptr,  # (R,)
    student_rest_ptr,  # (R,)
    largest_ptr,  # (R,) int32, of the student
    teacher_maximum_ptr,  # (R,)
    teacher_rest_ptr,  # (R,)
    candidates_ptr,  # (R, GROUPS) int32, of the teacher
    loss_ptr,  # (R,)
    divergence_ptr,  # (R,)
    clipped_mass_ptr,  # (R,)
    student_stride,
    teacher_stride,
    gradient_stride,
    num_columns,
    interpolation_weight,
    jsd_weight,
    clip,  # inf for no clip
    gradient_scale,
    inverse_temperature,
    INTERPOLATE: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Computes loss, divergence and clipped mass of a row, and its gradient times gradient_scale.

    The gradient of the forward KL needs one number of the whole row, the target mass that is not
    clipped. Clipped entries have a large target probability, so nearly always they are among the
    teacher's candidates: the first loop writes the gradient for the mass that these predict. A
    second loop runs for the rows whose clipped mass turns out to be another. The other divergences
    always need both.
    """
    gradient_factor = inverse_temperature * gradient_scale
    PREDICTS: tl.constexpr = WITH_GRADIENT and HAS_CLIP and DIVERGENCE == "forward_kl"
    SUMS_CONSTANT: tl.constexpr = WITH_GRADIENT and DIVERGENCE != "forward_kl"
    row = tl.program_id(0).to(tl.int64)
    student_row_ptr = student_ptr + row * student_stride
    teacher_row_ptr = teacher_ptr + row * teacher_stride
    gradient_row_ptr = gradient_ptr + row * gradient_stride
    student_maximum = tl.load(student_maximum_ptr + row)
    student_rest = tl.load(student_rest_ptr + row)
    teacher_maximum = tl.load(teacher_maximum_ptr + row)
    teacher_rest = tl.load(teacher_rest_ptr + row)
    interpolated = False
    if INTERPOLATE:
        interpolated = tl.load(interpolated_ptr + row) != 0
        if interpolated:
            teacher_maximum, teacher_rest = target_stats(
                student_row_ptr,
                teacher_row_ptr,
                num_columns,
                interpolation_weight,
                inverse_temperature,
                BLOCK,
            )
    # A row without a finite logit on either side has loss 0.
    usable = (student_maximum != EMPTY) & (teacher_maximum != EMPTY)
    inverse_student = tl.where(usable, 1.0 / (1.0 + student_rest), 0.0)
    inverse_teacher = tl.where(usable, 1.0 / (1.0 + teacher_rest), 0.0)
    log_ratio = log_ratio_of(student_rest, teacher_rest)
    largest = tl.load(largest_ptr + row)
    predicted_mass = 0.0
    if PREDICTS:
        predicted_mass = clipped_mass_at(
            tl.load(candidates_ptr + row * GROUPS + tl.arange(0, GROUPS)),
            student_row_ptr,
            teacher_row_ptr,
            num_columns,
            student_maximum,
            teacher_maximum,
            log_ratio,
            inverse_student,
            inverse_teacher,
            interpolated,
            clip,
            INTERPOLATE,
            interpolation_weight,
            DIVERGENCE,
            jsd_weight,
            inverse_temperature,
        )

    loss = tl.zeros([BLOCK], tl.float32)
    divergence = tl.zeros([BLOCK], tl.float32)
    clipped_mass = tl.zeros([BLOCK], tl.float32)
    constant = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        p, q, d, f, gap, left, slope = load_terms(
            student_row_ptr,
            teacher_row_ptr,
            columns,
            num_columns,
            student_maximum,
            teacher_maximum,
            log_ratio,
            inverse_student,
            inverse_teacher,
            interpolated,
            INTERPOLATE,
            interpolation_weight,
            DIVERGENCE,
            jsd_weight,
            inverse_temperature,
        )
        clipped = f > clip
        divergence += gap
        if HAS_CLIP:
            loss += tl.where(clipped, clip - left, gap)
            clipped_mass += tl.where(clipped, q, 0.0)
        if SUMS_CONSTANT:
            constant += constant_term(p, q, d, slope, clipped, DIVERGENCE)
        if WITH_GRADIENT and DIVERGENCE == "forward_kl":
            gradient = gradient_of(p, q, d, slope, clipped, 1.0 - predicted_mass, DIVERGENCE)
            gradient *= gradient_factor
            inside = columns < num_columns
            total += tl.where(inside & (columns != largest), gradient, 0.0)
            tl.store(gradient_row_ptr + columns, gradient, mask=inside)

    row_divergence = tl.sum(divergence, axis=0)
    row_clipped_mass = tl.sum(clipped_mass, axis=0)
    tl.store(divergence_ptr + row, row_divergence)
    tl.store(clipped_mass_ptr + row, row_clipped_mass)
    if HAS_CLIP:
        tl.store(loss_ptr + row, tl.sum(loss, axis=0))
    else:
        tl.store(loss_ptr + row, row_divergence)
    if PREDICTS or SUMS_CONSTANT:
        row_constant = tl.sum(constant, axis=0)
        if PREDICTS:
            row_constant = 1.0 - row_clipped_mass
        missed = tl.abs(row_clipped_mass - predicted_mass) > MISSED_SHARE * row_clipped_mass
        if SUMS_CONSTANT | missed:
            total = tl.zeros([BLOCK], tl.float32)
            for start in range(0, num_columns, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                p, q, d, f, gap, left, slope = load_terms(
                    student_row_ptr,
                    teacher_row_ptr,
                    columns,
                    num_columns,
                    student_maximum,
                    teacher_maximum,
                    log_ratio,
                    inverse_student,
                    inverse_teacher,
                    interpolated,
                    INTERPOLATE,
                    interpolation_weight,
                    DIVERGENCE,
                    jsd_weight,
                    inverse_temperature,
                )
                clipped = f > clip
                gradient = gradient_of(p, q, d, slope, clipped, row_constant, DIVERGENCE)
                gradient *= gradient_factor
                inside = columns < num_columns
                total += tl.where(inside & (columns != largest), gradient, 0.0)
                tl.store(gradient_row_ptr + columns, gradient, mask=inside)
    if WITH_GRADIENT:
        # A row's gradient adds up to 0: minus the sum of the others keeps its digits in a confident
        # row. It is written last, so that tiles are stored whole, 8 bytes at a time.
        tl.debug_barrier()
        tl.store(gradient_row_ptr + largest, -tl.sum(total, axis=0))


@triton.jit
def logprobs_gradient_kernel(
    logits_ptr,  # (R, V)
    gradient_ptr,  # (R, V), filled
    token_ids_ptr,  # (R,) int64
    maximum_ptr,  # (R,)
    rest_ptr,  # (R,)
    row_stride,
    gradient_stride,
    num_columns,
    gradient_scale,
    inverse_temperature,
    BLOCK: tl.constexpr,
):
    """Computes (one_hot(token) - p) / T, times gradient_scale."""
    row = tl.program_id(0).to(tl.int64)
    gradient_row_ptr = gradient_ptr + row * gradient_stride
    maximum = tl.load(maximum_ptr + row)
    scale = -inverse_temperature * gradient_scale / (1.0 + tl.load(rest_ptr + row))
    token = tl.load(token_ids_ptr + row)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        logits = load_logits(logits_ptr + row * row_stride, columns, num_columns)
        gradient = tl.exp(scaled(logits, inverse_temperature) - maximum) * scale
        inside = columns < num_columns
        total += tl.where(inside & (columns != token), gradient, 0.0)
        tl.store(gradient_row_ptr + columns, gradient, mask=inside)
    tl.debug_barrier()
    tl.store(gradient_row_ptr + token, -tl.sum(total, axis=0))
