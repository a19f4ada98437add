"""Random finite distributions, and their entropy, for the properties of the paper's Appendix D."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

Array = NDArray[np.float64]


def draw_distribution(
    generator: np.random.Generator, *shape: int, least: float = 0.0, zeros: float = 0.0
) -> Array:
    """Distributions over the last axis of `shape`, some flat and some sharp.

    Every entry is at least `least` / size. With `zeros`, each entry but one a row is 0 with that
    probability, so that the conventions for 0 log 0 and for impossible events count.
    """
    size = shape[-1]
    concentration = generator.choice([0.5, 1.0, 5.0])
    p = generator.dirichlet(np.full(size, concentration), size=shape[:-1])
    kept = generator.random(shape) >= zeros
    np.put_along_axis(kept, p.argmax(axis=-1, keepdims=True), True, axis=-1)
    p = (1 - least) * p * kept + least / size
    return p / p.sum(axis=-1, keepdims=True)


def entropy_in_nats(p: Array) -> Array:
    """Over the last axis, with 0 log 0 = 0."""
    return -np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), 0.0).sum(axis=-1)


@pytest.fixture(scope="session")
def draw() -> Callable[..., Array]:
    return draw_distribution


@pytest.fixture(scope="session")
def entropy() -> Callable[[Array], Any]:
    return entropy_in_nats
