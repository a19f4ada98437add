"""Weights by the place in the rollout: later tokens count more."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from paint_engine.recipes.token_weights.base import RolloutTokens

# PW-OPSD's published values: the weight that the first tokens approach, where the weights rise
# (a share of the rollout), and how steeply.
FLOOR, MIDDLE, WIDTH = 0.25, 0.3, 0.1


def position_weights(tokens: RolloutTokens) -> Float[Tensor, " n"]:
    """Returns w_t = u_t / mean of u, u_t = FLOOR + (1 - FLOOR) sigmoid((x_t - MIDDLE) / WIDTH), at
    the place x_t = (t + 1/2) / n of token t = 0, 1, ..., n - 1. Their mean is 1.

    u_t is the weight of PW-OPSD (arXiv 2605.21606). Its code does not divide by the mean, and
    therefore also scales the loss down.
    """
    place = (tokens.position + 0.5).to(tokens.student_entropy) / tokens.length
    rising = FLOOR + (1 - FLOOR) * ((place - MIDDLE) / WIDTH).sigmoid()
    return rising / rising.mean()


WEIGHTS = position_weights
