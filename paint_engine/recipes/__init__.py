"""Recipes, one file each: what a step prepares, its loss, its metrics, and what the displays show.

Declarations are read without PyTorch; a recipe imports PyTorch when it computes its loss.
"""

from paint_engine.recipes.base import (
    HeadWork,
    LossInputs,
    LossOutput,
    Recipe,
    SecondPass,
    StepContext,
    draws,
    keeps_base,
    recipe_of,
    recipe_that_recorded,
)

__all__ = [
    "HeadWork",
    "LossInputs",
    "LossOutput",
    "Recipe",
    "SecondPass",
    "StepContext",
    "draws",
    "keeps_base",
    "recipe_of",
    "recipe_that_recorded",
]
