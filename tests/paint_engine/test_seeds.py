"""The random streams of a run: pinned, told apart, and derived in one place."""

import re
from itertools import product
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import paint_engine
from paint_engine.seeds import (
    adapter_seed,
    dropout_seed,
    evaluation_seed,
    global_seed,
    mask_generator,
    other_generator,
    rationale_seed,
    rollout_seed,
    sibling_generator,
)


def test_streams_are_pinned() -> None:
    """A resumed run draws on another machine and in another version what this one drew."""
    assert rollout_seed(0, 3, "tiny-train:7", 1) == 1823083397119496062
    assert rationale_seed(0, 3, 1) == 4015589046219200128
    assert dropout_seed(0, 3, 1) == 3144130549731825538
    assert evaluation_seed(0, "tiny-test:7", 1) == 157499915080345366
    assert mask_generator(0, 3, "tiny-train:7", 1).random() == 0.6900667776962419
    assert other_generator(0, 3, "tiny-train:7", 1).random() == 0.7732037320530452
    assert sibling_generator(0, 3, "tiny-train:7", 1).random() == 0.006455154603215885
    assert (global_seed(5), adapter_seed(5)) == (5, 5)


def test_streams_and_their_draws_are_told_apart() -> None:
    numbers = (0, 1)
    seeds = [
        *(rollout_seed(*part) for part in product(numbers, numbers, "ab", numbers)),
        *(rationale_seed(*part) for part in product(numbers, numbers, numbers)),
        *(dropout_seed(*part) for part in product(numbers, numbers, numbers)),
        *(evaluation_seed(*part) for part in product(numbers, "ab", numbers)),
    ]
    assert len(set(seeds)) == len(seeds) == 16 + 3 * 8
    # Problem "1" at place 11 and problem "11" at place 1 are different rollouts.
    assert rollout_seed(0, 0, "1", 11) != rollout_seed(0, 0, "11", 1)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.integers(0), st.integers(0), st.text(), st.integers(0))
def test_seeds_suit_torchs_generator(seed: int, step: int, problem_id: str, index: int) -> None:
    found = rollout_seed(seed, step, problem_id, index)
    assert 0 <= found < 2**62
    torch.Generator().manual_seed(found)
    first, second = (mask_generator(seed, step, problem_id, index).random() for _ in range(2))
    assert first == second


def test_no_other_module_derives_a_seed() -> None:
    """Elsewhere a generator gets a seed as it comes from `seeds`. (The laptop's data set and its
    base, which are made once, have seeds of their own.)"""
    package = Path(str(paint_engine.__file__)).parent
    making = re.compile(r"\b(?:manual_seed|default_rng|Random|set_seed)\((.*)\)")
    given = {
        found[1]
        for file in package.rglob("*.py")
        if file.name != "seeds.py" and file.parent.name != "tiny"
        for found in making.finditer(file.read_text())
    }
    assert {argument for argument in given if "seed" in argument} == {
        "seed",
        "global_seed(command.config.train.seed)",
        "dropout_seed(config.train.seed, step, run.world.rank)",
    }
    # The estimate of the longest prompt, which no run draws from, and a bootstrap.
    assert {argument for argument in given if "seed" not in argument} == {"0", "BOOTSTRAP_SEED"}
