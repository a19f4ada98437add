"""The Triton row kernels: one program per row, the vocabulary in tiles, arithmetic in float32.

Statistics read a row once. Each lane of a tile keeps its own running maximum, that of a few entries
of every tile, and lanes are merged at the end. The row's largest entry is left out of every sum, as
in `_torch_backend`. Logits may have any float dtype. Row offsets are int64, because N x V passes
2^31 at 14,135 rows of 151,936. Numbers that a trainer may schedule (temperature, weights, clip) are
arguments, which Triton passes as float32: a new value compiles nothing.
"""

# pyright: reportOperatorIssue=false, reportArgumentType=false
# tl.sum and tl.max are annotated as if they could return tuples here, constexpr as if they took no
# Python values.

from typing import Any, NamedTuple

import triton
import triton.language as tl

from paint_kernels._triton_divergences import (
    INFINITE_DIVERGENCE,
    LN_2,
    LOG2_E,
    clipped_weight,
    gradient_of,
    log1p,
    log_ratio_of,
    pointwise,
)

EMPTY = tl.constexpr(-1e30)
"""maximum where no finite logit has been seen: below any, and finite, so that no difference to it
is NaN"""
VANISHED = tl.constexpr(-200.0)
"""exp2 of it is 0, and so is their product, which it would not be with -inf"""
CANDIDATE_RANGE = tl.constexpr(8.0)
"""natural units below its row's largest in which an entry is a candidate: what has 3e-4 of the
largest probability is clipped at log ratios above 180 only, for a clip of 0.06"""
STATS_LANE_TILE = tl.constexpr(4)
"""entries of a lane in a tile of statistics: with fewer, the lane's old sums are rescaled for each
few new entries"""
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
def exponential(logits, maximum, scale):
    """Returns t = (z - m) scale, for scale = log2(e) / T, and 2^t = exp((z - m) / T). NaN stays."""
    below = (logits - maximum) * scale
    t = tl.maximum(below, VANISHED, propagate_nan=tl.PropagateNan.ALL)
    return t, tl.exp2(t)


@triton.jit
def scan_tile(logits, start, maximum, largest_tile, total, energy, scale):
    """Adds a tile, (entries of a lane, lanes), to each lane's maximum m, the tile that has it, and
    the sums of 2^t and t 2^t for t = (z - m) log2(e) / T."""
    higher = tl.maximum(tl.max(logits, axis=0), maximum)
    t, ratio = exponential(maximum, higher, scale)
    energy = ratio * (energy + t * total)
    total = ratio * total
    largest_tile = tl.where(higher > maximum, start, largest_tile)
    t, exponentials = exponential(logits, tl.expand_dims(higher, 0), scale)
    total += tl.sum(exponentials, axis=0)
    energy += tl.sum(exponentials * t, axis=0)
    return higher, largest_tile, total, energy


@triton.jit
def row_statistics(
    student_row_ptr,
    target_row_ptr,
    num_columns,
    interpolation_weight,
    inverse_temperature,
    INTERPOLATE: tl.constexpr,
    LANES: tl.constexpr,
    LANE_TILE: tl.constexpr,
    LANE_COLUMNS: tl.constexpr,
):
    """Returns the row's largest logit m, its column, the sum of exp((z - m) / T) without it, the
    entropy, and each lane's maximum and the tile that has it.

    LANE_TILE: entries of a lane in one tile. LANE_COLUMNS: in the row, or more.
    """
    TILE: tl.constexpr = LANES * LANE_TILE
    scale = LOG2_E * inverse_temperature
    lanes = tl.arange(0, LANES)
    maximum = tl.full([LANES], EMPTY, tl.float32)
    largest_tile = tl.zeros([LANES], tl.int32)
    total = tl.zeros([LANES], tl.float32)
    energy = tl.zeros([LANES], tl.float32)
    for start in range(0, num_columns, TILE):
        logits = load_target(
            student_row_ptr,
            target_row_ptr,
            start + tl.arange(0, TILE),
            num_columns,
            True,
            INTERPOLATE,
            interpolation_weight,
        )
        logits = tl.reshape(logits, [LANE_TILE, LANES])
        maximum, largest_tile, total, energy = scan_tile(
            logits, start, maximum, largest_tile, total, energy, scale
        )
    row_maximum = tl.max(maximum, axis=0)
    winner = tl.min(tl.where(maximum == row_maximum, lanes, LANES), axis=0)
    t, ratio = exponential(maximum, row_maximum, scale)
    others = lanes != winner
    rest = tl.sum(tl.where(others, ratio * total, 0.0), axis=0)
    row_energy = tl.sum(tl.where(others, ratio * (energy + t * total), 0.0), axis=0)
    # The sum of the lane with the largest entry is taken again without it. Subtracting 1 would
    # cost a confident row its digits.
    columns = winner + LANES * tl.arange(0, LANE_COLUMNS)
    logits = load_target(
        student_row_ptr,
        target_row_ptr,
        columns,
        num_columns,
        True,
        INTERPOLATE,
        interpolation_weight,
    )
    largest = tl.min(tl.where(logits == row_maximum, columns, num_columns), axis=0)
    t, exponentials = exponential(logits, row_maximum, scale)
    # Its 2^0 - 1 is 0, or NaN for a logit of inf.
    rest += tl.sum(exponentials - tl.where(columns == largest, 1.0, 0.0), axis=0)
    row_energy += tl.sum(exponentials * t, axis=0)
    entropy = log1p(rest) - LN_2 * row_energy / (1.0 + rest)
    largest = tl.where(largest < num_columns, largest, 0)
    return row_maximum, largest, rest, entropy, maximum, largest_tile


@triton.jit
def candidates_of(
    row_ptr,
    num_columns,
    inverse_temperature,
    row_maximum,
    maximum,
    largest_tile,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    LANE_TILE: tl.constexpr,
):
    """Returns the column of the largest entry in each of GROUPS groups of lanes; num_columns where
    it is not near the row's largest. Neighbouring columns, such as those of the digits, are in
    different groups."""
    lanes = tl.arange(0, LANES)
    firsts = tl.reshape(largest_tile + lanes, [LANES // GROUPS, GROUPS])
    values = tl.reshape(maximum, [LANES // GROUPS, GROUPS])
    top = tl.max(values, axis=0)
    first = tl.min(tl.where(values == tl.expand_dims(top, 0), firsts, num_columns), axis=0)
    near = (row_maximum - top) * inverse_temperature < CANDIDATE_RANGE
    first = tl.where(near & (top != EMPTY), first, num_columns)
    columns = tl.expand_dims(first, 0) + LANES * tl.expand_dims(tl.arange(0, LANE_TILE), 1)
    logits = load_logits(row_ptr, columns, num_columns)
    found = logits == tl.expand_dims(top, 0)
    return tl.min(tl.where(found, columns, num_columns), axis=0)


@triton.jit
def stats_kernel(
    logits_ptr,  # (R, V), and as many rows of a second role `role_offset` entries behind them
    maximum_ptr,  # (roles, row_capacity), and so are the next three
    rest_ptr,
    entropy_ptr,
    largest_ptr,  # int32
    candidates_ptr,  # (R, GROUPS) int32, of the last role
    row_stride,
    role_offset,
    row_capacity,
    num_columns,
    inverse_temperature,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    LANE_COLUMNS: tl.constexpr,
):
    """Computes the row's largest logit m, its column, the sum of exp((z - m) / T) without it, the
    entropy, and for the last role the columns of at most GROUPS large entries, each the largest of
    as many lanes. Program (i, j) has row i of role j."""
    role = tl.program_id(1).to(tl.int64)
    row_ptr = logits_ptr + role * role_offset + tl.program_id(0).to(tl.int64) * row_stride
    row = role * row_capacity + tl.program_id(0)
    row_maximum, largest, rest, entropy, maximum, largest_tile = row_statistics(
        row_ptr,
        row_ptr,
        num_columns,
        0.0,
        inverse_temperature,
        False,
        LANES,
        STATS_LANE_TILE,
        LANE_COLUMNS,
    )
    tl.store(maximum_ptr + row, row_maximum)
    tl.store(rest_ptr + row, rest)
    tl.store(entropy_ptr + row, entropy)
    tl.store(largest_ptr + row, largest)
    if role == tl.num_programs(1) - 1:
        candidates = candidates_of(
            row_ptr,
            num_columns,
            inverse_temperature,
            row_maximum,
            maximum,
            largest_tile,
            GROUPS,
            LANES,
            STATS_LANE_TILE,
        )
        own_candidates_ptr = candidates_ptr + tl.program_id(0).to(tl.int64) * GROUPS
        tl.store(own_candidates_ptr + tl.arange(0, GROUPS), candidates)


class RowPair(NamedTuple):
    """A row of both models, and what `load_terms` needs of it."""

    student_ptr: Any
    teacher_ptr: Any
    num_columns: Any
    student_maximum: Any
    teacher_maximum: Any
    log_ratio: Any  # log((1 + rest_S) / (1 + rest_T))
    interpolated: Any
    interpolation_weight: Any
    inverse_temperature: Any
    jsd_weight: Any


@triton.jit
def load_terms(pair, columns, INTERPOLATE: tl.constexpr, DIVERGENCE: tl.constexpr):
    """Loads the columns of a `RowPair`, a tile or one, and returns their `pointwise` values."""
    student = load_logits(pair.student_ptr, columns, pair.num_columns)
    teacher = load_target(
        pair.student_ptr,
        pair.teacher_ptr,
        columns,
        pair.num_columns,
        pair.interpolated,
        INTERPOLATE,
        pair.interpolation_weight,
    )
    return pointwise(
        student - pair.student_maximum,
        teacher - pair.teacher_maximum,
        pair.log_ratio,
        pair.inverse_temperature,
        DIVERGENCE,
        pair.jsd_weight,
    )


@triton.jit
def largest_gradient(
    p,
    q,
    clipped,
    clipped_mass,
    constant,
    same_largest,
    student_rest,
    teacher_rest,
    DIVERGENCE: tl.constexpr,
):
    """Returns the gradient by x_S of the row's largest entry, which is minus the sum of the others.

    In a confident row p and q are both close to 1, and their difference has few digits; in terms of
    the rest it has all. `constant` is the row's sum of p times `clipped_weight`, relative to that
    of this entry (not used by the forward KL).
    """
    if DIVERGENCE == "forward_kl":
        by_rest = (teacher_rest - student_rest) / (1.0 + student_rest) / (1.0 + teacher_rest)
        difference = tl.where(same_largest, by_rest, p - q)
        return tl.where(clipped, p * (1.0 - clipped_mass), difference - p * clipped_mass)
    return -p * constant


@triton.jit
def predicted_clipped_q(
    pair,
    candidates_ptr,
    threshold,
    INTERPOLATE: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Returns the sum of q over the clipped entries among the row's candidates, with the factor of
    `pointwise`."""
    columns = tl.load(candidates_ptr + tl.arange(0, GROUPS))
    _p, q, f, _gap, _left, _weight = load_terms(pair, columns, INTERPOLATE, DIVERGENCE)
    return tl.sum(tl.where(f > threshold, q, 0.0), axis=0)


@triton.jit
def store_gradient(
    gradient_ptr,
    pair,
    threshold,
    constant,
    factor,
    INTERPOLATE: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    LANES: tl.constexpr,
):
    """Writes the row's gradient for the `constant` of `gradient_of`."""
    for start in range(0, pair.num_columns, LANES):
        columns = start + tl.arange(0, LANES)
        p, q, f, _gap, _left, weight = load_terms(pair, columns, INTERPOLATE, DIVERGENCE)
        gradient = gradient_of(p, q, weight, f > threshold, constant, DIVERGENCE)
        tl.store(gradient_ptr + columns, gradient * factor, mask=columns < pair.num_columns)


@triton.jit
def loss_kernel(
    student_ptr,  # (R, V)
    teacher_ptr,  # (R, V)
    gradient_ptr,  # (R, V), filled
    interpolated_ptr,  # (R,) int8
    student_maximum_ptr,  # (R,)
    student_rest_ptr,  # (R,)
    student_largest_ptr,  # (R,) int32
    teacher_maximum_ptr,  # (R,)
    teacher_rest_ptr,  # (R,)
    teacher_largest_ptr,  # (R,) int32
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
    LANES: tl.constexpr,
    LANE_COLUMNS: tl.constexpr,
):
    """Computes loss, divergence and clipped mass of a row, and its gradient times gradient_scale.

    The gradient of the forward KL needs one number of the whole row, the target mass that is not
    clipped. Clipped entries have a large target probability, so nearly always they are among the
    teacher's candidates: the first loop writes the gradient for the mass that these predict. A
    second loop runs for the rows whose clipped mass turns out to be another. The other divergences
    always need both.
    """
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
    largest = tl.load(student_largest_ptr + row)
    teacher_largest = tl.load(teacher_largest_ptr + row)
    interpolated = False
    if INTERPOLATE:
        interpolated = tl.load(interpolated_ptr + row) != 0
        if interpolated:
            teacher_maximum, teacher_largest, teacher_rest, _entropy, _m, _t = row_statistics(
                student_row_ptr,
                teacher_row_ptr,
                num_columns,
                interpolation_weight,
                inverse_temperature,
                True,
                LANES,
                STATS_LANE_TILE,
                LANE_COLUMNS,
            )
    pair = RowPair(
        student_row_ptr,
        teacher_row_ptr,
        num_columns,
        student_maximum,
        teacher_maximum,
        log_ratio_of(student_rest, teacher_rest),
        interpolated,
        interpolation_weight,
        inverse_temperature,
        jsd_weight,
    )
    # A row without a finite logit on either side has loss 0.
    usable = (student_maximum != EMPTY) & (teacher_maximum != EMPTY)
    share = tl.where(usable, 1.0 / (1.0 + teacher_rest), 0.0)  # of the factor of p and q
    factor = share * inverse_temperature * gradient_scale
    threshold = clip * (1.0 + teacher_rest) if HAS_CLIP else float("inf")
    own_p, own_q, own_f, _gap, _left, own_weight = load_terms(
        pair, largest, INTERPOLATE, DIVERGENCE
    )
    own_clipped = own_f > threshold
    own_weight = clipped_weight(own_weight, own_clipped, DIVERGENCE)
    predicted_mass = 0.0
    if PREDICTS:
        row_candidates_ptr = candidates_ptr + row * GROUPS
        predicted_mass = share * predicted_clipped_q(
            pair, row_candidates_ptr, threshold, INTERPOLATE, DIVERGENCE, GROUPS
        )

    loss = tl.zeros([LANES], tl.float32)
    divergence = tl.zeros([LANES], tl.float32)
    clipped_mass = tl.zeros([LANES], tl.float32)
    constant = tl.zeros([LANES], tl.float32)
    for start in range(0, num_columns, LANES):
        columns = start + tl.arange(0, LANES)
        p, q, f, gap, left, weight = load_terms(pair, columns, INTERPOLATE, DIVERGENCE)
        clipped = f > threshold
        divergence += gap
        if HAS_CLIP:
            loss += tl.where(clipped, threshold - left, gap)
            clipped_mass += tl.where(clipped, q, 0.0)
        if SUMS_CONSTANT:
            relative = clipped_weight(weight, clipped, DIVERGENCE) - own_weight
            constant += p * relative
        if WITH_GRADIENT and DIVERGENCE == "forward_kl":
            gradient = gradient_of(p, q, weight, clipped, 1.0 - predicted_mass, DIVERGENCE)
            tl.store(gradient_row_ptr + columns, gradient * factor, mask=columns < num_columns)

    row_divergence = tl.where(usable, share * tl.sum(divergence, axis=0), 0.0)
    row_divergence = tl.where(row_divergence > INFINITE_DIVERGENCE, float("inf"), row_divergence)
    row_clipped_mass = tl.where(usable, share * tl.sum(clipped_mass, axis=0), 0.0)
    row_constant = share * tl.sum(constant, axis=0)
    tl.store(divergence_ptr + row, row_divergence)
    tl.store(clipped_mass_ptr + row, row_clipped_mass)
    if HAS_CLIP:
        tl.store(loss_ptr + row, tl.where(usable, share * tl.sum(loss, axis=0), 0.0))
    else:
        tl.store(loss_ptr + row, row_divergence)
    if PREDICTS or SUMS_CONSTANT:
        whole_constant = 1.0 - row_clipped_mass if PREDICTS else own_weight + row_constant
        missed = tl.abs(row_clipped_mass - predicted_mass) > MISSED_SHARE * row_clipped_mass
        if SUMS_CONSTANT | missed:
            store_gradient(
                gradient_row_ptr,
                pair,
                threshold,
                whole_constant,
                factor,
                INTERPOLATE,
                DIVERGENCE,
                LANES,
            )
    if WITH_GRADIENT:
        own_gradient = largest_gradient(
            share * own_p,
            share * own_q,
            own_clipped,
            row_clipped_mass,
            row_constant,
            largest == teacher_largest,
            student_rest,
            teacher_rest,
            DIVERGENCE,
        )
        own_gradient *= inverse_temperature * gradient_scale
        # Written last, so that tiles are stored whole, 8 bytes at a time.
        tl.debug_barrier()
        tl.store(gradient_row_ptr + largest, tl.where(usable, own_gradient, 0.0))


@triton.jit
def logprobs_gradient_kernel(
    logits_ptr,  # (R, V)
    gradient_ptr,  # (R, V), filled
    token_ids_ptr,  # (R,) int64
    maximum_ptr,  # (R,)
    largest_ptr,  # (R,) int32
    rest_ptr,  # (R,)
    row_stride,
    gradient_stride,
    num_columns,
    gradient_scale,
    inverse_temperature,
    LANES: tl.constexpr,
):
    """Computes (one_hot(token) - p) / T, times gradient_scale."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    gradient_row_ptr = gradient_ptr + row * gradient_stride
    maximum = tl.load(maximum_ptr + row)
    rest = tl.load(rest_ptr + row)
    factor = -inverse_temperature * gradient_scale / (1.0 + rest)
    scale = LOG2_E * inverse_temperature
    for start in range(0, num_columns, LANES):
        columns = start + tl.arange(0, LANES)
        logits = load_logits(row_ptr, columns, num_columns)
        gradient = tl.exp2((logits - maximum) * scale) * factor
        tl.store(gradient_row_ptr + columns, gradient, mask=columns < num_columns)
    # 1 - p as the sum of the others, which has the digits that the difference lacks near 0.
    token = tl.load(token_ids_ptr + row)
    exponential_of_token = tl.exp2((tl.load(row_ptr + token).to(tl.float32) - maximum) * scale)
    is_largest = token == tl.load(largest_ptr + row)
    others = tl.where(is_largest, rest, 1.0 + rest - exponential_of_token)
    tl.debug_barrier()
    tl.store(gradient_row_ptr + token, -factor * others)
