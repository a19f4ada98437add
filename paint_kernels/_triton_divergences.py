"""The divergences in Triton: what a vocabulary entry adds to a divergence and to its gradient.

For student p, target q and d = log q - log p, the summand f is q d (forward KL), -p d (reverse KL)
or b q log(q/m) + (1-b) p log(p/m) with m = b q + (1-b) p (JSD). A new divergence is a branch of
`pointwise` that fills `slope`; the other two functions need a branch only for a better formula.
"""

# pyright: reportOperatorIssue=false

import triton
import triton.language as tl

MASKED = tl.constexpr(-5e29)
"""below any finite logit minus its row's largest, and above what replaces -inf"""
LARGEST_LOG_RATIO = tl.constexpr(80.0)
"""bound of |log q - log p|, where one side has no weight left and exponentials are still finite"""


@triton.jit
def log1p(x):
    """Returns log(1 + x) for x > -1, accurate in float32 even near 0, where the GPU's log is
    not."""
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
def second_order(x):
    """Returns x + exp(-x) - 1 = x^2/2 - x^3/6 + ..., for |x| < 0.5."""
    series = -1.0 / 362880.0
    series = 1.0 / 40320.0 + x * series
    series = -1.0 / 5040.0 + x * series
    series = 1.0 / 720.0 + x * series
    series = -1.0 / 120.0 + x * series
    series = 1.0 / 24.0 + x * series
    series = -1.0 / 6.0 + x * series
    series = 0.5 + x * series
    return x * x * series


@triton.jit
def expm1(x):
    """Returns exp(x) - 1, accurate in float32 even near 0."""
    near = tl.abs(x) < 0.5
    return tl.where(near, x + second_order(-tl.where(near, x, 0.0)), tl.exp(x) - 1.0)


@triton.jit
def divergence_gap(a, b, log_ratio):
    """Returns a log(a/b) - a + b >= 0 from log(a/b), accurate in float32 even for a close to b.

    Over a vocabulary -a + b sums to 0, so the sum of these is sum(a log(a/b)), without the
    cancellation of its first-order terms.
    """
    near = tl.abs(log_ratio) < 0.5
    series = a * second_order(tl.where(near, log_ratio, 0.0))
    return tl.where(near, series, a * (log_ratio - 1.0) + b)


@triton.jit
def log_ratio_of(student_rest, teacher_rest):
    """Returns log((1 + rest_S) / (1 + rest_T)), as one logarithm if the sums are close."""
    change = (student_rest - teacher_rest) / (1.0 + teacher_rest)
    near = tl.abs(change) < 0.5
    apart = log1p(student_rest) - log1p(teacher_rest)
    return tl.where(near, log1p(tl.where(near, change, 0.0)), apart)


@triton.jit
def pointwise(
    student,  # x_S - m_S
    teacher,  # x_T - m_T, of the target
    log_ratio,
    inverse_student,  # 1 / (1 + rest_S), 0 in a masked row
    inverse_teacher,
    DIVERGENCE: tl.constexpr,
    jsd_weight,
):
    """Returns p, q, d = log q - log p, f = gap + left, its parts, and slope = df / d log p.

    `left` sums to 0 over a row. The KLs do not use `slope`.
    """
    p = tl.exp(student) * inverse_student
    q = tl.exp(teacher) * inverse_teacher
    d = teacher - student + log_ratio
    slope = d
    if DIVERGENCE == "forward_kl":
        d = tl.where(q == 0.0, 0.0, tl.where(student < MASKED, float("inf"), d))
        f = q * d
        gap = tl.where(q == 0.0, p, divergence_gap(q, p, d))
        left = q - p
    elif DIVERGENCE == "reverse_kl":
        d = tl.where(p == 0.0, 0.0, tl.where(teacher < MASKED, float("-inf"), d))
        f = -p * d
        gap = tl.where(p == 0.0, q, divergence_gap(p, q, -d))
        left = p - q
    else:
        tl.static_assert(DIVERGENCE == "jsd", "this divergence has no Triton formula")
        d = tl.minimum(tl.maximum(d, -LARGEST_LOG_RATIO), LARGEST_LOG_RATIO)
        mixture = jsd_weight * q + (1.0 - jsd_weight) * p
        student_log = -log1p(jsd_weight * expm1(d))  # log p - log m
        teacher_log = -log1p((1.0 - jsd_weight) * expm1(-d))  # log q - log m
        gap = jsd_weight * divergence_gap(q, mixture, teacher_log)
        gap += (1.0 - jsd_weight) * divergence_gap(p, mixture, student_log)
        f = gap
        left = tl.zeros_like(gap)
        slope = (1.0 - jsd_weight) * p * student_log
    return p, q, d, f, gap, left, slope


@triton.jit
def gradient_of(p, q, d, slope, clipped, constant, DIVERGENCE: tl.constexpr):
    """Returns the gradient by x_S = z_S / T: g u - p sum(g u), where g is `slope` and u is 1 if
    unclipped.

    `constant` is the sum of q over the unclipped entries (forward KL), else the row's sum of
    `constant_term`: of p d over the unclipped and p over the clipped ones (reverse KL, where
    g = p (1 - d)), or of g u.
    """
    if DIVERGENCE == "forward_kl":
        return p * constant - tl.where(clipped, 0.0, q)
    if DIVERGENCE == "reverse_kl":
        return p * (constant - tl.where(clipped, 1.0, d))
    return tl.where(clipped, 0.0, slope) - p * constant


@triton.jit
def constant_term(p, q, d, slope, clipped, DIVERGENCE: tl.constexpr):
    """What an entry adds to the constant of `gradient_of`. Not called for the forward KL, whose
    constant is 1 minus the clipped mass."""
    if DIVERGENCE == "reverse_kl":
        return p * tl.where(clipped, 1.0, d)
    return tl.where(clipped, 0.0, slope)
