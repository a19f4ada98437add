"""The matrix products around the row kernels. None of them rounds logits below float32.

Rounding logits to bfloat16 changes the gradient by 5 to 300% at the divergences of
self-distillation. On a GPU a half-precision GEMM therefore writes float32. On a CPU half-precision
weights are converted tile by tile.

On a GPU the gradient by the logits goes back through the head in float16, also for a bfloat16 head:
rounding it to bfloat16 changes the result by 1.3e-3 of its norm, to float16 by 2e-4. Scaled, a
bfloat16 head fits into float16, which has three more bits of mantissa.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from paint_kernels._half_heads import (
    LARGEST_HALF,
    half_head,
    largest_magnitude,
    power_of_two_below,
)
from paint_kernels._onednn import onednn_product, runs_in_onednn
from paint_kernels._precision import full_precision

if TYPE_CHECKING:
    from jaxtyping import Float

WEIGHT_TILE = 2048
"""rows of the head in one product on a CPU: up to 1.4 times faster than all of them at once"""
GRADIENT_SCALE = 256.0
"""of float16 gradients by the logits: keeps the entries of rare tokens above 6e-8, its smallest"""


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
    """Computes out <- a @ b, or out += a @ b, of half-precision factors. Accumulates and writes
    float32."""
    if add:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)  # pyright: ignore
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


@full_precision()
def project(
    hidden_states: Float[Tensor, "R H"], weight: Float[Tensor, "V H"], out: Float[Tensor, "R V"]
) -> Float[Tensor, "R V"]:
    """Computes out <- hidden_states @ weight.T."""
    if runs_in_half(hidden_states, weight):
        half_product(hidden_states, weight.T, out, add=False)
        return out
    hidden_states = hidden_states.to(out.dtype)
    if weight.is_cuda and weight.dtype == out.dtype:
        return torch.mm(hidden_states, weight.T, out=out)
    in_onednn = runs_in_onednn(hidden_states)
    for start in range(0, weight.shape[0], WEIGHT_TILE):
        tile = weight[start : start + WEIGHT_TILE].to(out.dtype)
        columns = out[:, start : start + WEIGHT_TILE]
        if in_onednn:
            # The product is in the cache still.
            columns.copy_(onednn_product(hidden_states, tile))
        else:
            torch.mm(hidden_states, tile.T, out=columns)
    return out


class GradientProduct:
    """The products of the gradient by the logits: with the head, and with the hidden states.

    `hidden` computes gradient @ weight, `head` gradient.T @ weighted hidden states. Both leave
    scaled results, which `unscale_hidden` and `unscale_head` divide once, at the end. Gradients by
    the logits are to be stored as `dtype`, times `scale`. The scale includes the temperature,
    because the gradient of the forward KL is at most 1 / temperature.
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
        """Takes a float16 copy of a bfloat16 head, times a power of two so that it fits."""
        self.weight_scale = None
        if self.in_half and self.weight.dtype == torch.bfloat16:
            self.weight, self.weight_scale = half_head(self.weight)

    @full_precision()
    def hidden(self, gradient: Float[Tensor, "R V"], out: Float[Tensor, "R H"]) -> None:
        if self.in_half:
            half_product(gradient, self.weight, out, add=False)
        elif self.weight.dtype == gradient.dtype and runs_in_onednn(gradient):
            out.copy_(onednn_product(gradient, self.weight.T))
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
            # Twice, because a product of two rounded factors can pass the next power of two.
            self.hidden_scale = LARGEST_HALF / (2 * power_of_two_below(largest))

    @full_precision()
    def head(
        self, gradient: Float[Tensor, "R V"], rows: slice | Tensor, out: Tensor, *, add: bool
    ) -> None:
        """Computes out <- gradient.T @ (token weights * hidden states), over these rows, or adds it
        to `out`."""
        weights = self.token_weights[rows, None]
        hidden_states = self.hidden_states[rows].to(self.result_dtype) * weights
        if self.in_half:
            half = (hidden_states * self.hidden_scale).to(torch.float16)
            half_product(gradient.T, half, out, add=add)
        else:
            torch.addmm(out, gradient.T, hidden_states, beta=float(add), out=out)

    def unscale_head(self, grad_weight: Float[Tensor, "V H"]) -> None:
        if self.in_half:
            grad_weight.div_(self.scale * self.hidden_scale)
