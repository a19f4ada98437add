"""Weights of tokens in the divergence, one file each. Declared without PyTorch."""

from paint_engine.recipes.token_weights.base import (
    RolloutTokens,
    Weighting,
    load_weighting,
    weights_of,
)

__all__ = ["RolloutTokens", "Weighting", "load_weighting", "weights_of"]
