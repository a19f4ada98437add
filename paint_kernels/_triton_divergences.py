"""The divergences in Triton: what a vocabulary entry adds to a divergence and to its gradient.

For student p, target q and d = log q - log p, the summand f is q d (forward KL), -p d (reverse KL)
or b q log(q/m) + (1-b) p log(p/m) with m = b q + (1-b) p (JSD). A new divergence is a branch of
`pointwise` that fills `weight`, and its gradient is that of `gradient_of`.

A loop over the vocabulary is bound by the number of its instructions. Exponentials and logarithms
are therefore those to base 2, which a GPU has as one instruction each, and all p and q of a row
carry one factor, 1 + rest_T, which is divided out of the row's sums.
"""

# pyright: reportOperatorIssue=false

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LARGEST_LOG_RATIO = tl.constexpr(80.0)
"""bound of |log q - log p| in the JSD, where one side has no weight left and exponentials are still
finite"""
MASKED_LOG_RATIO = tl.constexpr(1e37)
"""stands for an infinite |log q - log p|: finite, so that its product with a probability of 0 is
0"""
INFINITE_DIVERGENCE = tl.constexpr(1e9)
"""above any finite divergence, and below any with MASKED_LOG_RATIO at a probability above 1e-28"""
NEAR = tl.constexpr(0.25)
"""bound of |log q - log p| up to which a series is used: below it f, as it stands, loses digits"""


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
def log_ratio_of(student_rest, teacher_rest):
    """Returns log((1 + rest_S) / (1 + rest_T)), as one logarithm if the sums are close."""
    change = (student_rest - teacher_rest) / (1.0 + teacher_rest)
    near = tl.abs(change) < 0.5
    apart = log1p(student_rest) - log1p(teacher_rest)
    return tl.where(near, log1p(tl.where(near, change, 0.0)), apart)


@triton.jit
def between(x, bound):
    """Returns x clamped to [-bound, bound]; NaN, as of two logits of -inf, becomes -bound."""
    return tl.minimum(tl.maximum(x, -bound), bound)


@triton.jit
def kl_gap(f, left, log_ratio):
    """Returns a log(a/b) - a + b >= 0 from f = a log(a/b), left = a - b and log(a/b), accurate in
    float32 even for a close to b.

    Over a vocabulary -a + b sums to 0, so the sum of these is sum(a log(a/b)), without the
    cancellation of its first-order terms. With x = log(a/b) it is a (x^2/2 - x^3/6 + ...).
    """
    series = 1.0 / 720.0
    series = -1.0 / 120.0 + log_ratio * series
    series = 1.0 / 24.0 + log_ratio * series
    series = -1.0 / 6.0 + log_ratio * series
    series = 0.5 + log_ratio * series
    return tl.where(tl.abs(log_ratio) < NEAR, f * log_ratio * series, f - left)


@triton.jit
def jsd_near(p, d, b):
    """Returns f and log(p/m) of the JSD for |d| < NEAR, with relative errors below 2e-6.

    They are p F(d) and -L(d), where L(d) = log(1 - b + b exp(d)) = b d + d^2 (g0 + g1 d + ...) and
    F(d) = b d exp(d) - (1 - b + b exp(d)) L(d) = d^2 (f0 + f1 d + ...). n! times the coefficient of
    d^n in L is the n-th cumulant of a coin that falls on 1 with probability b.
    """
    v = b * (1.0 - b)
    skew = v * (1.0 - 2.0 * b)
    g0 = v / 2.0
    g1 = skew / 6.0
    g2 = v * (1.0 - 6.0 * v) / 24.0
    g3 = skew * (1.0 - 12.0 * v) / 120.0
    g4 = v * (1.0 - 30.0 * v + 120.0 * v * v) / 720.0
    # F = d^2 (v E - g - b d E g) with E = (exp(d) - 1) / d = 1 + d/2 + d^2/6 + ...
    f0 = v - g0
    f1 = v / 2.0 - g1 - b * g0
    f2 = v / 6.0 - g2 - b * (g1 + g0 / 2.0)
    f3 = v / 24.0 - g3 - b * (g2 + g1 / 2.0 + g0 / 6.0)
    f4 = v / 120.0 - g4 - b * (g3 + g2 / 2.0 + g1 / 6.0 + g0 / 24.0)
    f = p * d * d * (f0 + d * (f1 + d * (f2 + d * (f3 + d * f4))))
    return f, -d * (b + d * (g0 + d * (g1 + d * (g2 + d * g3))))


@triton.jit
def jsd_terms(student, teacher, d, b):
    """Returns p, q, f and log(p/m), from log2 p, log2 q and d.

    With the larger of p and q, and r the smaller divided by it, m is the larger times a number
    between the weight b or 1-b and 1, whose logarithm is accurate.
    """
    teacher_larger = d > 0.0
    larger = tl.exp2(tl.maximum(student, teacher, propagate_nan=tl.PropagateNan.ALL))
    ratio = tl.exp2(-tl.abs(d) * LOG2_E)
    smaller = larger * ratio
    p = tl.where(teacher_larger, smaller, larger)
    q = tl.where(teacher_larger, larger, smaller)
    weight_of_larger = tl.where(teacher_larger, b, 1.0 - b)
    weighted_ratio = (1.0 - weight_of_larger) * ratio
    mixture = weight_of_larger + weighted_ratio
    mixture_log = LN_2 * tl.log2(mixture)  # log m - log of the larger
    f = -larger * (mixture * mixture_log + weighted_ratio * tl.abs(d))
    near_f, near_log = jsd_near(p, d, b)
    near = tl.abs(d) < NEAR
    student_log = -mixture_log - tl.maximum(d, 0.0)
    return p, q, tl.where(near, near_f, f), tl.where(near, near_log, student_log)


@triton.jit
def pointwise(
    student,  # z_S - m_S
    teacher,  # z_T - m_T, of the target
    log_ratio,  # log((1 + rest_S) / (1 + rest_T))
    inverse_temperature,
    DIVERGENCE: tl.constexpr,
    jsd_weight,
):
    """Returns p, q, f, its two parts gap + left, and weight.

    All but weight carry the factor 1 + rest_T. `left` sums to 0 over a row. The gradient of an
    unclipped f by log p, divided by p, is weight + 1 (reverse KL) or weight (JSD). The forward KL
    does not use it.
    """
    d = (teacher - student) * inverse_temperature + log_ratio
    scale = LOG2_E * inverse_temperature
    student = student * scale - LOG2_E * log_ratio
    teacher = teacher * scale
    if DIVERGENCE == "forward_kl":
        d = between(d, MASKED_LOG_RATIO)
        p, q = tl.exp2(student), tl.exp2(teacher)
        f = q * d
        left = q - p
        gap = kl_gap(f, left, d)
        weight = d
    elif DIVERGENCE == "reverse_kl":
        weight = -between(d, MASKED_LOG_RATIO)
        p, q = tl.exp2(student), tl.exp2(teacher)
        f = p * weight
        left = p - q
        gap = kl_gap(f, left, weight)
    else:
        tl.static_assert(DIVERGENCE == "jsd", "this divergence has no Triton formula")
        p, q, f, student_log = jsd_terms(
            student, teacher, between(d, LARGEST_LOG_RATIO), jsd_weight
        )
        gap, left = f, tl.zeros_like(f)
        weight = (1.0 - jsd_weight) * student_log
    return p, q, f, gap, left, weight


@triton.jit
def clipped_weight(weight, clipped, DIVERGENCE: tl.constexpr):
    """Returns `weight`, or what stands for it in a clipped entry, whose f has no gradient."""
    return tl.where(clipped, -1.0 if DIVERGENCE == "reverse_kl" else 0.0, weight)


@triton.jit
def gradient_of(p, q, weight, clipped, constant, DIVERGENCE: tl.constexpr):
    """Returns the gradient by x_S = z_S / T, with the factor of p and q.

    `constant` is the sum of q over the unclipped entries (forward KL), else the sum of p times
    `clipped_weight`.
    """
    if DIVERGENCE == "forward_kl":
        return p * constant - tl.where(clipped, 0.0, q)
    return p * (clipped_weight(weight, clipped, DIVERGENCE) - constant)
