"""Recipes, one file each: what a step prepares, its loss, its metrics, what is shown of it.

Declarations are read without PyTorch; a recipe imports it when its loss is computed.
"""

from paint_engine.recipes.base import (
    LossInputs,
    LossOutput,
    Recipe,
    StepContext,
    draws,
    recipe_of,
    recipe_that_recorded,
)

__all__ = [
    "LossInputs",
    "LossOutput",
    "Recipe",
    "StepContext",
    "draws",
    "recipe_of",
    "recipe_that_recorded",
]
