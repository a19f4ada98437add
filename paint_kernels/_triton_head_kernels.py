"""The Triton kernels of what a head does beside its product, each in one pass over the logits.

Arithmetic is in float32. Offsets are int64.
"""

# pyright: reportOperatorIssue=false, reportArgumentType=false
# constexpr is annotated as if it took no Python values.

import triton
import triton.language as tl

from paint_kernels._triton_divergences import LOG2_E


@triton.jit
def tanh(x):
    """Returns tanh(x) with relative errors below 1e-6, also near 0: the GPU's own instruction has
    11 bits.

    Below 1 it is a quotient of polynomials, the sixth convergent of Lambert's continued fraction
    x / (1 + x^2 / (3 + x^2 / (5 + ...))), above (1 - u) / (1 + u) with u = exp(-2 |x|).
    """
    square = x * x
    near_top = x * (10395.0 + square * (1260.0 + 21.0 * square))
    near_bottom = 10395.0 + square * (4725.0 + square * (210.0 + square))
    u = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    near = tl.abs(x) < 1.0
    top = tl.where(near, near_top, tl.where(x < 0.0, u - 1.0, 1.0 - u))
    return top / tl.where(near, near_bottom, 1.0 + u)


@triton.jit
def head_logits_kernel(
    logits_ptr,  # (R, V): h W^T, overwritten by the logits
    bias_ptr,  # (V,)
    temperatures_ptr,  # (R,)
    row_stride,
    num_columns,
    scale,  # divided by softcap, if there is one
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Computes BLOCK columns of z = softcap * tanh(scale * (h W^T + bias)) or scale * (h W^T +
    bias), divided by T."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    row_ptr = logits_ptr + row * row_stride
    logits = tl.load(row_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        logits += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    logits *= scale
    if HAS_SOFTCAP:
        logits = softcap * tanh(logits)
    if HAS_TEMPERATURES:
        logits /= tl.load(temperatures_ptr + row).to(tl.float32)
    tl.store(row_ptr + columns, logits, mask=inside)


@triton.jit
def cap_gradient_kernel(
    gradient_ptr,  # (R, V): by the logits, overwritten
    logits_ptr,  # (R, V): z, or z / T
    temperatures_ptr,  # (R,)
    gradient_stride,
    row_stride,
    num_columns,
    inverse_softcap,
    HAS_TEMPERATURES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Multiplies BLOCK columns of the gradient by 1 - (z / softcap)^2, the derivative of z by
    scale * (h W^T + bias)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    factor = inverse_softcap
    if HAS_TEMPERATURES:
        factor *= tl.load(temperatures_ptr + row).to(tl.float32)
    logits = tl.load(logits_ptr + row * row_stride + columns, mask=inside, other=0.0)
    share = logits.to(tl.float32) * factor
    gradient_row_ptr = gradient_ptr + row * gradient_stride
    gradient = tl.load(gradient_row_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    # The product keeps the digits of 1 - |share| in an entry near the cap.
    slope = (1.0 - share) * (1.0 + share)
    tl.store(gradient_row_ptr + columns, gradient * slope, mask=inside)
