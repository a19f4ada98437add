"""Products with a few rows of the head per token, in PyTorch.

Token n has K ids, of which -1 is none. Rows of the head are gathered for a few tokens at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from paint_kernels._matmul import compute_dtype
from paint_kernels._precision import full_precision
from paint_kernels._spinning import follow_load
from paint_kernels._torch_backend import LOG_2, row_blocks

if TYPE_CHECKING:
    from jaxtyping import Float, Int

GATHERED_ELEMENTS = {"cpu": 2**18, "other": 2**26}
"""of the head in one piece: 1 MiB of float32 stays in a processor's cache; a GPU takes 256 MiB"""


def token_pieces(ids: Int[Tensor, "N K"], hidden_size: int) -> Iterator[slice]:
    on_cpu = ids.device.type == "cpu"
    most = GATHERED_ELEMENTS["cpu" if on_cpu else "other"]
    piece = max(1, most // max(1, ids.shape[1] * hidden_size))
    for start in range(0, len(ids), piece):
        if on_cpu:
            follow_load()
        yield slice(start, min(start + piece, len(ids)))


@full_precision()
def gathered_logits(
    hidden_states: Float[Tensor, "N H"], weight: Float[Tensor, "V H"], ids: Int[Tensor, "N K"]
) -> Float[Tensor, "N K"]:
    """Returns the logits of each token's ids, -inf where there is none."""
    dtype = compute_dtype(hidden_states, weight)
    logits = torch.empty(ids.shape, dtype=dtype, device=weight.device)
    for piece in token_pieces(ids, weight.shape[1]):
        rows = weight[ids[piece].clamp(min=0)].to(dtype)
        torch.bmm(rows, hidden_states[piece, :, None].to(dtype), out=logits[piece, :, None])
    return logits.masked_fill_(ids < 0, -math.inf)


@full_precision()
def hidden_gradient(
    values: Float[Tensor, "N K"],
    weight: Float[Tensor, "V H"],
    ids: Int[Tensor, "N K"],
    rest: tuple[Float[Tensor, "N H"], Float[Tensor, " N"]] | None,
    out: Float[Tensor, "N H"],
) -> None:
    """Computes out <- sum over k of values[n, k] * weight[ids[n, k]], plus rows times scales of
    `rest`. Values are 0 where there is no id."""
    for piece in token_pieces(ids, weight.shape[1]):
        rows = weight[ids[piece].clamp(min=0)].to(values.dtype)
        total = torch.bmm(values[piece, None, :], rows)[:, 0]
        if rest is not None:
            total.addcmul_(rest[0][piece], rest[1][piece, None])
        out[piece] = total


def add_head_gradient(
    values: Float[Tensor, "N K"],
    hidden_states: Float[Tensor, "N H"],
    ids: Int[Tensor, "N K"],
    out: Float[Tensor, "V H"],
) -> None:
    """Computes out[ids[n, k]] += values[n, k] * hidden_states[n]. Values are 0 where there is no
    id."""
    for piece in token_pieces(ids, hidden_states.shape[1]):
        rows = values[piece, :, None] * hidden_states[piece, None, :].to(values.dtype)
        out.index_add_(0, ids[piece].clamp(min=0).flatten(), rows.flatten(0, 1))


def softmax_rows(
    logits: Float[Tensor, "R V"],
    logsumexp: Float[Tensor, " R"],
    temperature: float,
    out: Float[Tensor, "R V"],
    scale: float,
) -> None:
    """Computes out <- exp(logits / temperature - logsumexp) * scale. `out` may be `logits`."""
    # On a CPU exp2 is four times as fast as exp.
    same, shift = out.dtype == logits.dtype, logsumexp / LOG_2
    for rows in row_blocks(logits):
        factor = 1 / (LOG_2 * temperature)
        x = torch.mul(logits[rows], factor, out=out[rows] if same else None)
        x.sub_(shift[rows, None]).exp2_()
        if scale != 1:
            x.mul_(scale)
        if not same:
            out[rows] = x
