"""Reads JSON and TOML that a run has written, and that may have been changed, cut or crafted since.

What comes back has the declared types, or the file is refused by name, place and value.
"""

import dataclasses
import json
import os
import tomllib
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, create_model

from paint_engine.files.failures import BadFile, FileMissing, reading
from paint_engine.files.links import open_regular
from paint_engine.files.printable import shown

T = TypeVar("T")

_MAX_BYTES = 1 << 30
# Deeper than anything that is written, and far from where Python's own functions give up.
_MAX_DEPTH = 64
_MAX_PLACE_CHARS = 200
_STRICT = ConfigDict(strict=True, allow_inf_nan=False)
_RESTORE = "restore it from a copy"


class Record(BaseModel):
    """The keys of a JSON object that are read, with their types. Its numbers are finite; further
    keys are left out."""

    model_config = _STRICT | ConfigDict(extra="ignore")


@lru_cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    if not dataclasses.is_dataclass(kind):
        is_model = isinstance(kind, type) and issubclass(kind, BaseModel)
        return TypeAdapter(kind, config=None if is_model else _STRICT)
    assert isinstance(kind, type)
    # pydantic's own support of dataclasses takes no dictionary where it converts nothing.
    hints, fields = get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        required = field.default is dataclasses.MISSING
        fields[field.name] = (hints[field.name], ... if required else field.default)
    config = _STRICT | ConfigDict(extra="forbid")
    return TypeAdapter(create_model(kind.__name__, __config__=config, **fields))


def read_bytes(path: Path) -> bytes:
    """The content of a regular file; links are not followed.

    Raises ReadFailed if the system refuses it, FileMissing if there is none, and BadFile for a
    link, a pipe and a file of more than a gibibyte.
    """
    with reading(path), open(open_regular(path, os.O_RDONLY), "rb") as file:
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise BadFile(f"{path} is too large; needs at most {_MAX_BYTES:,} bytes; {_RESTORE}")
    return content


def parse_json(content: bytes | str, *, constants: bool = False) -> Any:
    """What the JSON text stands for.

    constants: NaN and Infinity are read, as transformers writes them in configurations.

    Raises ValueError, for nesting that is too deep too.
    """
    try:
        value = json.loads(content, parse_constant=None if constants else _refuse_constant)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    _refuse_deep(value)
    return value


def _refuse_deep(value: Any) -> None:
    """Raises ValueError for what is nested so deeply that a later function of Python's (a copy,
    `repr`) might not take it."""
    level = [[value]]
    for _ in range(_MAX_DEPTH + 1):
        level = [
            inner.values() if type(inner) is dict else inner
            for outer in level
            for inner in outer
            if type(inner) in (dict, list)
        ]
        if not level:
            return
    raise ValueError(f"nested too deeply, with more than {_MAX_DEPTH} levels")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} has no JSON form")


def checked(kind: type[T], value: object, where: str, remedy: str = _RESTORE) -> T:
    """The value as this type (a Record, a dataclass, `list[int]`), without conversions.

    where: the file, and the line if it has several, for the message.

    Raises BadFile.
    """
    try:
        found = _adapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])[:_MAX_PLACE_CHARS] or "the whole"
        came = "nothing" if first["type"] == "missing" else shown(first["input"])
        needed = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
        raise BadFile(f"{where}: {place}: got {came}; needs: {needed}; {remedy}") from error
    if dataclasses.is_dataclass(kind):
        assert isinstance(value, dict)
        return kind(**value)
    return found


def read_json(path: Path, kind: type[T], *, remedy: str = _RESTORE, constants: bool = False) -> T:
    """Reads a file of JSON as this type; see `checked` and `parse_json`.

    Raises BadFile if it is no JSON, of other types or not a regular file, ReadFailed if the system
    refuses it, and FileMissing if there is none.
    """
    content = read_bytes(path)
    try:
        value = parse_json(content, constants=constants)
    except ValueError as error:
        raise BadFile(f"{path}: not valid JSON ({error}); needs a whole file; {remedy}") from error
    return checked(kind, value, str(path), remedy)


def read_tables(path: Path, *, remedy: str = _RESTORE, follow_link: bool = False) -> dict[str, Any]:
    """Reads the tables of a file of TOML.

    follow_link: the file may be a link, as one that the user names, but none of a run directory.

    Raises BadFile if it is no TOML or not a regular file, ReadFailed if the system refuses it, and
    FileMissing if there is none.
    """
    content = read_bytes(path.resolve() if follow_link else path)
    try:
        tables = tomllib.loads(content.decode())
        _refuse_deep(tables)
    except (ValueError, RecursionError) as error:
        came = "nested too deeply" if isinstance(error, RecursionError) else error
        raise BadFile(
            f"{path}: not valid TOML ({came}); needs lines such as `num_steps = 40` under [train], "
            f"with text in quotes; {remedy}"
        ) from error
    return tables


def read_json_if_there(path: Path, kind: type[T]) -> T | None:
    """As `read_json`; None if there is no such file."""
    try:
        return read_json(path, kind)
    except FileMissing:
        return None
