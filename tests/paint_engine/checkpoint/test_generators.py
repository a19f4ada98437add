"""Random states of others: refused where a library would read beyond its memory with them."""

import json
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paint_engine.checkpoint.generators import check_torch_state, numpy_state, python_state
from paint_engine.files import BadFile

FILE, REMEDY = Path("rng-0.safetensors"), "restore it"
KEYS = [5] * 624


@pytest.mark.parametrize(
    ("values", "said"),
    [
        *((["MT19937", KEYS, place, 0, 0.0], "position") for place in (10**9, -5, 625, 1.0, True)),
        *((["MT19937", keys, 0, 0, 0.0], "keys") for keys in (KEYS[1:], [*KEYS, 1], 5, "x" * 624)),
        *((["MT19937", [key, *KEYS[1:]], 0, 0, 0.0], "keys") for key in (-1, 2**32, 0.5, "1")),
        *((["MT19937", KEYS, 0, has, 0.0], "has_normal") for has in (2, -1, None)),
        *((["MT19937", KEYS, 0, 0, normal], "normal") for normal in ("x", None, 10**400)),
        *((["PCG64", KEYS, 0, 0, 0.0], "generator"), ([], "got 0 values"), ({"a": 1}, "list")),
        *((["MT19937", KEYS, 0, 0], "got 4 values"), (5, "list")),
    ],
)
def test_a_crafted_state_of_numpy_is_refused(values: Any, said: str) -> None:
    with pytest.raises(BadFile, match=f"rng-0.safetensors: numpy: .*{said}.*restore it"):
        numpy_state(json.dumps(values), FILE, REMEDY)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        *(([3, [*KEYS, place], None], "position|keys") for place in (10**9, 625, -1, 0.5)),
        *(([3, keys, None], "keys") for keys in (KEYS, [2**32] * 625, 5)),
        *(([3, [*KEYS, 1], "x"], "normal"), ([2, [*KEYS, 1], None], "version"), ([3], "1 values")),
    ],
)
def test_a_crafted_state_of_python_is_refused(values: Any, said: str) -> None:
    with pytest.raises(BadFile, match=f"rng-0.safetensors: python: .*({said}).*restore it"):
        python_state(json.dumps(values), FILE, REMEDY)


@pytest.mark.parametrize("text", ["[" * 100_000, "NaN", "", "[NaN]"])
def test_no_json_is_no_state(text: str) -> None:
    for read in (numpy_state, python_state):
        with pytest.raises(ValueError):
            read(text, FILE, REMEDY)


@pytest.mark.parametrize("num_draws", [0, 1, 623, 624, 625])
def test_their_own_states_are_taken(num_draws: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        torch.rand(num_draws)
        torch.randn(())
        check_torch_state(torch.get_rng_state(), FILE, REMEDY)
    theirs = random.Random(num_draws)
    theirs.gauss()
    state = python_state(json.dumps(theirs.getstate()), FILE, REMEDY)
    assert state == theirs.getstate()
    drawn = np.random.RandomState(num_draws)
    drawn.normal()
    name, keys, *rest = drawn.get_state(legacy=True)
    restored = np.random.RandomState()
    text = json.dumps([name, np.asarray(keys).tolist(), *rest])
    restored.set_state(numpy_state(text, FILE, REMEDY))
    assert restored.normal() == drawn.normal() and restored.random() == drawn.random()


@pytest.mark.parametrize(
    ("place", "kind", "value"),
    [
        *((8, "i", left) for left in (0, -1, 625, 2**31 - 1)),
        *((16, "Q", following) for following in (625, 2**62)),
        *((place, "d", float("nan")) for place in (5016, 5024, 5032)),
        (5048, "f", float("inf")),
    ],
)
def test_a_crafted_state_of_pytorch_is_refused(place: int, kind: str, value: Any) -> None:
    content = bytearray(torch.Generator().manual_seed(1).get_state().numpy().tobytes())
    struct.pack_into(kind, content, place, value)
    with pytest.raises(BadFile, match=r"rng-0\.safetensors: torch: got .*restore it"):
        check_torch_state(torch.frombuffer(content, dtype=torch.uint8), FILE, REMEDY)


def test_keys_beyond_the_last_are_refused() -> None:
    """PyTorch takes each of the two counts, and reads twice as many keys as there are."""
    content = bytearray(torch.Generator().manual_seed(1).get_state().numpy().tobytes())
    struct.pack_into("i", content, 8, 624)
    struct.pack_into("Q", content, 16, 624)
    state = torch.frombuffer(content, dtype=torch.uint8)
    torch.Generator().set_state(state)
    with pytest.raises(BadFile, match="got the next key 624 with 624 left; needs 624 keys in all"):
        check_torch_state(state, FILE, REMEDY)
    with pytest.raises(BadFile, match="got 3 bytes; needs 5056"):
        check_torch_state(state[:3], FILE, REMEDY)
