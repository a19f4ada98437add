"""What a head does beside its product, as launches of Triton kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
from torch import Tensor

from paint_kernels import _triton_head_kernels as kernels
from paint_kernels._triton_backend import launch_grid

if TYPE_CHECKING:
    from jaxtyping import Float

BLOCK = 2048
"""columns of one program"""


def logits_from_product(
    product: Float[Tensor, "R V"],
    bias: Float[Tensor, " V"] | None,
    scale: float,
    softcap: float | None,
    temperatures: Float[Tensor, " R"] | None,
) -> None:
    """Turns rows of h W^T into logits in place, and divides them by the temperatures."""
    num_rows, num_columns = product.shape
    assert product.stride(1) == 1
    launch_grid(
        kernels.head_logits_kernel,
        (num_rows, triton.cdiv(num_columns, BLOCK)),
        product,
        product if bias is None else bias.contiguous(),
        product if temperatures is None else temperatures.contiguous(),
        row_stride=product.stride(0),
        num_columns=num_columns,
        scale=scale if softcap is None else scale / softcap,
        softcap=1.0 if softcap is None else softcap,
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=softcap is not None,
        HAS_TEMPERATURES=temperatures is not None,
        BLOCK=BLOCK,
    )


def gradient_through_cap(
    gradient: Float[Tensor, "R V"],
    logits: Float[Tensor, "R V"],
    softcap: float,
    temperatures: Float[Tensor, " R"] | None,
) -> None:
    """Multiplies the gradient by 1 - (z / softcap)^2, in place. `logits` are z, or z divided by the
    temperatures; they are kept."""
    num_rows, num_columns = gradient.shape
    assert gradient.stride(1) == logits.stride(1) == 1
    launch_grid(
        kernels.cap_gradient_kernel,
        (num_rows, triton.cdiv(num_columns, BLOCK)),
        gradient,
        logits,
        logits if temperatures is None else temperatures.contiguous(),
        gradient_stride=gradient.stride(0),
        row_stride=logits.stride(0),
        num_columns=num_columns,
        inverse_softcap=1 / softcap,
        HAS_TEMPERATURES=temperatures is not None,
        BLOCK=BLOCK,
    )
