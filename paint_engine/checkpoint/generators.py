"""Random states that a checkpoint holds, checked: the libraries take over some that make them read
beyond their own memory at the next draw."""

import math
import struct
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field
from torch import Tensor

from paint_engine.files import BadFile, Record, checked, parse_json

_State = TypeVar("_State", bound=Record)

_NUM_KEYS = 624
_Key = Annotated[int, Field(ge=0, lt=2**32)]
# PyTorch's state on a CPU: the seed, how many keys are left, whether it is seeded, the next key;
# the keys; three numbers of a normal distribution and whether they are valid; one of float32 and
# whether it is valid.
_TORCH = struct.Struct(f"=QiiQ{_NUM_KEYS}Q3di4xf?3x")
_LEFT, _NEXT, _NORMALS = 1, 3, (*range(-6, -3), -2)


class _Numpy(Record):
    generator: Literal["MT19937"]
    keys: Annotated[list[_Key], Field(min_length=_NUM_KEYS, max_length=_NUM_KEYS)]
    position: Annotated[int, Field(ge=0, le=_NUM_KEYS)]
    has_normal: Annotated[int, Field(ge=0, le=1)]
    normal: float


class _Python(Record):
    version: Literal[3]
    # The last is the position.
    keys: Annotated[list[_Key], Field(min_length=_NUM_KEYS + 1, max_length=_NUM_KEYS + 1)]
    normal: float | None


def numpy_state(text: str, file: Path, remedy: str) -> tuple[Any, ...]:
    """What `numpy.random.set_state` takes. Raises BadFile."""
    found = _fields(_Numpy, text, f"{file}: numpy", remedy)
    return found.generator, found.keys, found.position, found.has_normal, found.normal


def python_state(text: str, file: Path, remedy: str) -> tuple[Any, ...]:
    """What `random.setstate` takes. Raises BadFile."""
    found = _fields(_Python, text, f"{file}: python", remedy)
    if found.keys[-1] > _NUM_KEYS:
        raise BadFile(
            f"{file}: python: got the position {found.keys[-1]}; needs at most {_NUM_KEYS}; "
            f"{remedy}"
        )
    return found.version, tuple(found.keys), found.normal


def _fields(kind: type[_State], text: str, where: str, remedy: str) -> _State:
    """The record of a JSON list that has its fields in their order."""
    found = checked(list[Any], parse_json(text), where, remedy)
    if len(found) != len(kind.model_fields):
        raise BadFile(
            f"{where}: got {len(found)} values; needs {', '.join(kind.model_fields)}; {remedy}"
        )
    return checked(kind, dict(zip(kind.model_fields, found, strict=True)), where, remedy)


def check_torch_state(state: Tensor, file: Path, remedy: str) -> None:
    """Raises BadFile unless this is a state of PyTorch's generator on the CPU whose next keys all
    exist: PyTorch checks its two counts one by one, and not their sum."""
    content = state.numpy().tobytes()
    if len(content) != _TORCH.size:
        raise BadFile(f"{file}: torch: got {len(content)} bytes; needs {_TORCH.size}; {remedy}")
    values = _TORCH.unpack(content)
    left, following = values[_LEFT], values[_NEXT]
    # The last draw before the keys are renewed reads the key `following + left - 2`.
    if not 0 < left <= _NUM_KEYS or following + left > _NUM_KEYS + 1:
        raise BadFile(
            f"{file}: torch: got the next key {following} with {left} left; needs "
            f"{_NUM_KEYS} keys in all; {remedy}"
        )
    if not all(math.isfinite(values[place]) for place in _NORMALS):
        raise BadFile(f"{file}: torch: got a normal number that is not finite; {remedy}")
