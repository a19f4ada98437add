"""The products around the row kernels, none of which rounds logits below float32.

bfloat16 logits cost 5 to 300% of the gradient at the divergences of self-distillation. On a GPU a
half-precision product leaves the GEMM in float32; on a CPU half-precision weights are widened tile
by tile.

What goes back through the head on a GPU is float16, whatever half precision the head has: rounding
the gradient by the logits to bfloat16 costs 1.3e-3 of the result by norm, to float16 2e-4. A
bfloat16 head fits into float16 when it is scaled, since float16 has three more digits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

WEIGHT_TILE = 2048
"""vocabulary rows of the head in one CPU product: up to 1.4 times faster than all in one"""
GRADIENT_SCALE = 256.0
"""of float16 gradients by the logits: rare tokens' entries stay above its smallest number, 6e-8"""
LARGEST_HALF = 2.0**14
"""that scaled float16 copies reach, a quarter of what float16 holds"""


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def runs_in_half(hidden_states: Tensor, weight: Tensor) -> bool:
    same = hidden_states.dtype == weight.dtype
    return same and weight.is_cuda and weight.dtype in (torch.float16, torch.bfloat16)


def half_product(
    a: Float[Tensor, "M K"], b: Float[Tensor, "K N"], out: Float[Tensor, "M N"], *, add: bool
) -> None:
    """out <- a @ b, or out += a @ b: half-precision factors, accumulated and left in float32."""
    if add:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)  # pyright: ignore
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


def project(
    hidden_states: Float[Tensor, "R H"], weight: Float[Tensor, "V H"], out: Float[Tensor, "R V"]
) -> Float[Tensor, "R V"]:
    """out <- hidden_states @ weight.T"""
    if runs_in_half(hidden_states, weight):
        half_product(hidden_states, weight.T, out, add=False)
        return out
    hidden_states = hidden_states.to(out.dtype)
    if weight.is_cuda and weight.dtype == out.dtype:
        return torch.mm(hidden_states, weight.T, out=out)
    for start in range(0, weight.shape[0], WEIGHT_TILE):
        tile = weight[start : start + WEIGHT_TILE].to(out.dtype)
        torch.mm(hidden_states, tile.T, out=out[:, start : start + WEIGHT_TILE])
    return out


def power_of_two_below(x: Tensor) -> Tensor:
    """The scalar tensor 2^floor(log2(x)), 1 for x = 0; without a wait for the device."""
    _, exponent = torch.frexp(x.float())
    return torch.where(x > 0, torch.ldexp(torch.ones_like(x.float()), exponent - 1), 1.0)


def largest_magnitude(x: Tensor) -> Tensor:
    """A scalar tensor; 0 for an empty x. No copy of x is made, as abs() would."""
    if x.numel() == 0:
        return x.new_zeros(())
    low, high = torch.aminmax(x)
    return torch.maximum(-low, high)


class GradientProduct:
    """Takes gradients by the logits back through the head, and into the head.

    `hidden` is gradient @ weight, `head` gradient.T @ weighted hidden states; both leave results
    scaled, and `unscale_hidden` and `unscale_head` divide once at the end. `dtype` is what
    gradients by the logits are to be stored in, times `scale`, which includes the temperature:
    those of the forward KL are within 1 / temperature.
    """

    def __init__(
        self,
        hidden_states: Float[Tensor, "N H"],
        weight: Float[Tensor, "V H"],
        temperature: float,
        result_dtype: torch.dtype,
    ) -> None:
        self.weight, self.hidden_states = weight, hidden_states
        self.result_dtype = result_dtype
        self.in_half = runs_in_half(hidden_states, weight)
        self.dtype = torch.float16 if self.in_half else self.result_dtype
        self.scale = GRADIENT_SCALE * temperature if self.in_half else 1.0

    def prepare_hidden(self) -> None:
        """A float16 copy of a bfloat16 head, times a power of two so that it fits."""
        self.weight_scale = None
        if self.in_half and self.weight.dtype == torch.bfloat16:
            self.weight_scale = LARGEST_HALF / power_of_two_below(largest_magnitude(self.weight))
            half = torch.empty_like(self.weight, dtype=torch.float16)
            self.weight = torch.mul(self.weight, self.weight_scale, out=half)

    def hidden(self, gradient: Float[Tensor, "R V"], out: Float[Tensor, "R H"]) -> None:
        if self.in_half:
            half_product(gradient, self.weight, out, add=False)
        elif self.weight.dtype == gradient.dtype:
            torch.mm(gradient, self.weight, out=out)
        else:
            out.zero_()
            for start in range(0, self.weight.shape[0], WEIGHT_TILE):
                tile = self.weight[start : start + WEIGHT_TILE].to(gradient.dtype)
                out.addmm_(gradient[:, start : start + WEIGHT_TILE], tile)

    def unscale_hidden(self, grad_hidden: Float[Tensor, "N H"]) -> None:
        if self.in_half:
            scale = 1.0 if self.weight_scale is None else self.weight_scale
            grad_hidden.div_(self.scale * scale)

    def prepare_head(self, token_weights: Float[Tensor, " N"]) -> None:
        self.token_weights = token_weights
        if self.in_half:
            largest = largest_magnitude(self.hidden_states) * largest_magnitude(token_weights)
            # Twice, because a product of two roundings may pass the next power of two.
            self.hidden_scale = LARGEST_HALF / (2 * power_of_two_below(largest))

    def head(
        self, gradient: Float[Tensor, "R V"], rows: slice | Tensor, sign: float, out: Tensor
    ) -> None:
        """out += sign * gradient.T @ (token weights * hidden states) of these rows"""
        weights = self.token_weights[rows, None] * sign
        hidden_states = self.hidden_states[rows].to(self.result_dtype) * weights
        if self.in_half:
            half = (hidden_states * self.hidden_scale).to(torch.float16)
            half_product(gradient.T, half, out, add=True)
        else:
            out.addmm_(gradient.T, hidden_states)

    def unscale_head(self, grad_weight: Float[Tensor, "V H"]) -> None:
        if self.in_half:
            grad_weight.div_(self.scale * self.hidden_scale)
