"""Weights by the student's entropy: uncertain tokens count more."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from paint_engine.recipes.token_weights.base import RolloutTokens


def entropy_weights(tokens: RolloutTokens) -> Float[Tensor, " n"]:
    """Returns w_t = H_S(t) / mean of H_S, or 1 for all tokens if every entropy is 0. Their mean
    is 1.

    TIP (arXiv 2604.14084) finds that half of the tokens, sampled by the student's entropy, teach as
    well as all. This is our soft form of that choice.
    """
    mean = tokens.student_entropy.mean()
    # No branch: on a GPU, the host would wait for the mean.
    return (tokens.student_entropy / mean).where(mean > 0, 1.0)


WEIGHTS = entropy_weights
