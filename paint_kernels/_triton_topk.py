"""The functions of `_torch_topk` as launches of Triton kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor

from paint_kernels import _triton_topk_kernels as kernels
from paint_kernels._triton_backend import launch_grid

if TYPE_CHECKING:
    from jaxtyping import Float, Int

ENTRIES = 16
"""rows of the head in one tile"""
WIDTH_BLOCK = 256
"""columns of a tile: with 16 rows, 16 entries per thread"""
SOFTMAX_BLOCK = 2048


def gathered_logits(
    hidden_states: Float[Tensor, "N H"], weight: Float[Tensor, "V H"], ids: Int[Tensor, "N K"]
) -> Float[Tensor, "N K"]:
    """Returns the logits of each token's ids, -inf where there is none."""
    hidden_states, weight, ids = row_major(hidden_states), row_major(weight), ids.contiguous()
    logits = torch.empty(ids.shape, dtype=torch.float32, device=ids.device)
    launch_grid(
        kernels.gathered_logits_kernel,
        (len(ids), triton.cdiv(ids.shape[1], ENTRIES)),
        *(hidden_states, weight, ids, logits),
        hidden_stride=hidden_states.stride(0),
        weight_stride=weight.stride(0),
        ids_stride=ids.stride(0),
        width=weight.shape[1],
        num_ids=ids.shape[1],
        ENTRIES=ENTRIES,
        BLOCK=WIDTH_BLOCK,
    )
    return logits


def hidden_gradient(
    values: Float[Tensor, "N K"],
    weight: Float[Tensor, "V H"],
    ids: Int[Tensor, "N K"],
    rest: tuple[Float[Tensor, "N H"], Float[Tensor, " N"]] | None,
    out: Float[Tensor, "N H"],
) -> None:
    """Computes out <- sum over k of values[n, k] * weight[ids[n, k]], plus rows times scales of
    `rest`."""
    num_tokens, num_ids = ids.shape
    bounds = torch.arange(0, (num_tokens + 1) * num_ids, num_ids, device=ids.device)
    weighted_rows(bounds, ids.flatten(), values.flatten(), weight, rest, out)


def add_head_gradient(
    values: Float[Tensor, "N K"],
    hidden_states: Float[Tensor, "N H"],
    ids: Int[Tensor, "N K"],
    out: Float[Tensor, "V H"],
) -> None:
    """Computes out[ids[n, k]] += values[n, k] * hidden_states[n]. One program adds all that a row
    gets, in the order of the tokens, so that the result is the same every time."""
    num_rows, num_ids = len(out), ids.shape[1]
    order = ids.flatten().sort(stable=True)
    every_row = torch.arange(num_rows + 1, device=ids.device)
    bounds = torch.searchsorted(order.values, every_row)
    tokens = order.indices // num_ids
    rest = out, torch.ones(num_rows, dtype=torch.float32, device=ids.device)
    weighted_rows(bounds, tokens, values.flatten()[order.indices], hidden_states, rest, out)


def weighted_rows(
    bounds: Int[Tensor, " M+1"],
    indices: Int[Tensor, " E"],
    values: Float[Tensor, " E"],
    matrix: Float[Tensor, "X H"],
    rest: tuple[Float[Tensor, "M H"], Float[Tensor, " M"]] | None,
    out: Float[Tensor, "M H"],
) -> None:
    """Computes each row of `out` from its entries e, bounds[m] <= e < bounds[m + 1]."""
    assert out.stride(1) == 1
    matrix = row_major(matrix)
    # Flattened columns of a wider matrix may have gaps.
    indices, values = indices.contiguous(), values.contiguous()
    rest_rows, rest_scale = (out, values) if rest is None else (rest[0], rest[1].contiguous())
    launch_grid(
        kernels.weighted_rows_kernel,
        (len(out), triton.cdiv(out.shape[1], WIDTH_BLOCK)),
        *(bounds, indices, values, matrix, rest_rows, rest_scale, out),
        matrix_stride=matrix.stride(0),
        rest_stride=rest_rows.stride(0),
        out_stride=out.stride(0),
        width=out.shape[1],
        HAS_REST=rest is not None,
        ENTRIES=ENTRIES,
        BLOCK=WIDTH_BLOCK,
    )


def softmax_rows(
    logits: Float[Tensor, "R V"],
    logsumexp: Float[Tensor, " R"],
    temperature: float,
    out: Float[Tensor, "R V"],
    scale: float,
) -> None:
    """Computes out <- exp(logits / temperature - logsumexp) * scale. `out` may be `logits`."""
    num_rows, num_columns = logits.shape
    assert logits.stride(1) == out.stride(1) == 1
    launch_grid(
        kernels.softmax_kernel,
        (num_rows, triton.cdiv(num_columns, SOFTMAX_BLOCK)),
        *(logits, logsumexp.contiguous(), out),
        row_stride=logits.stride(0),
        out_stride=out.stride(0),
        num_columns=num_columns,
        inverse_temperature=1 / temperature,
        scale=scale,
        BLOCK=SOFTMAX_BLOCK,
    )


def row_major(matrix: Float[Tensor, "M H"]) -> Float[Tensor, "M H"]:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
