"""Weights of tokens. One of 0 removes its token, whatever that computes: 0 * NaN would be NaN."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def weighted(
    token_loss: Float[Tensor, " N"], token_weights: Float[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """Returns token_loss * token_weights, and 0 where the weight is 0."""
    return torch.where(token_weights == 0, 0.0, token_loss * token_weights)


def without_rows(
    rows: Float[Tensor, "N H"], zero_weight: Bool[Tensor, " N"] | None
) -> Float[Tensor, "N H"]:
    """Returns the rows, with 0 in those whose weight is 0. A copy, where there are weights."""
    return rows if zero_weight is None else rows.masked_fill(zero_weight[:, None], 0.0)


def clear_rows(rows: Float[Tensor, "R C"], zero_weight: Bool[Tensor, " R"] | None) -> None:
    """Sets the rows whose weight is 0 to 0, in place."""
    if zero_weight is None:
        return
    if rows.device.type == "cpu":
        # Touches these rows alone. For their number, the host would wait for a GPU.
        rows.index_fill_(0, zero_weight.nonzero()[:, 0], 0.0)
    else:
        rows.masked_fill_(zero_weight[:, None], 0.0)
