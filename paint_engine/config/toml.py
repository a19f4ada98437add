"""Converts dotted keys and TOML text to a run's configuration, and back."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from paint_engine.config.schema import Config
from paint_engine.config.sections import HIDDEN
from paint_engine.files import is_hidden, shown


def leaf_fields(section: type[BaseModel] = Config, prefix: str = "") -> dict[str, FieldInfo]:
    """Returns the pydantic field of every dotted key that can be set ("data.columns.problem")."""
    leaves: dict[str, FieldInfo] = {}
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            leaves |= leaf_fields(field.annotation, f"{prefix}{name}.")
        else:
            leaves[prefix + name] = field
    return leaves


LEAVES: Mapping[str, FieldInfo] = leaf_fields()


def value_of(config: Config, key: str) -> Any:
    """Returns the value of a dotted key."""
    return reduce(getattr, key.split("."), config)


def build_config(layers: Sequence[tuple[str, Mapping[str, Any]]]) -> Config:
    """Builds a Config from (source, dotted keys and values) layers; later layers override.

    Imports the recipe that the configuration names.

    Raises ValueError with a line for each refused value: its source, its key, the value and what is
    needed.
    """
    values, sources = _merged(layers)
    try:
        return Config.model_validate(_nested(values))
    except ValidationError as error:
        raise ValueError(_explain(error, sources)) from error


def recorded_config(layers: Sequence[tuple[str, Mapping[str, Any]]]) -> Config:
    """Builds a Config from the layers of a run's record, to read values from it.

    Each value is checked, but not how they fit together: an older version may have allowed that.
    No recipe is imported.

    Raises ValueError as `build_config` does.
    """
    values, sources = _merged(layers)
    tables, sections, refused = _nested(values), {}, []
    for name, field in Config.model_fields.items():
        assert isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        try:
            sections[name] = field.annotation.model_validate(tables.get(name, {}))
        except ValidationError as error:
            refused.append(_explain(error, sources, (name,)))
    if refused:
        raise ValueError("\n".join(refused))
    return Config.model_construct(**sections)


def _merged(
    layers: Sequence[tuple[str, Mapping[str, Any]]],
) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the value and the source of every key."""
    merged = {key: (value, source) for source, flat in layers for key, value in flat.items()}
    values = {key: value for key, (value, _) in merged.items()}
    return values, {key: source for key, (_, source) in merged.items()}


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tables: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        reduce(lambda table, section: table.setdefault(section, {}), sections, tables)[name] = value
    return tables


def _explain(
    error: ValidationError, sources: Mapping[str, str], section: tuple[str, ...] = ()
) -> str:
    """section: the one that was validated by itself."""
    lines = []
    for item in error.errors():
        loc, message = (*section, *item["loc"]), item["msg"].removeprefix("Value error, ")
        # The index of a list's item follows the key itself.
        key = ".".join(str(part) for part in loc if isinstance(part, str))
        if key not in LEAVES:
            lines.append(message)
            continue
        field = LEAVES[key]
        got = "a value that is not shown" if item["type"] == HIDDEN else shown(item["input"])
        needed = re.sub(r"^\w+ should (be|have) | after validation.*", "", message)
        items = "numbers" if "float" in str(field.annotation) else "texts"
        needed = needed.replace("valid tuple", f"list of {items}")
        # An empty list shows no item's form.
        two = "[1.0, 2.0]" if items == "numbers" else '["one", "two"]'
        example = two if field.default == () else toml_value(field.default)
        # A shell would interpret TOML's backslashes, and the quotes of a list.
        example = shlex.quote(example) if "\\" in example or example[0] == "[" else example
        lines.append(
            f"{sources[key]}: {key}: got {got}; needs {needed} ({field.description}); "
            f"for example --{key} {example}"
        )
    return "\n".join(lines)


def toml_value(value: object) -> str:
    """Returns a value as TOML; None becomes "none"."""
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple):
        return f"[{', '.join(toml_value(item) for item in value)}]"
    assert isinstance(value, str), f"no TOML form for {value!r}"
    # JSON's escapes are TOML's. What a terminal would obey is escaped too.
    text = json.dumps(value, ensure_ascii=False)
    return "".join(f"\\U{ord(c):08X}" if is_hidden(c) else c for c in text)


def flag(key: str, value: object) -> str:
    """Returns a value as `--key value` for a shell. The command line reads an equal value from it,
    and all of it can be printed."""
    text = value if isinstance(value, str) else "none" if value is None else toml_value(value)
    if isinstance(value, str) and (not value.isprintable() or set(value) & {"'", '"'}):
        # Quotes may be TOML's, which the command line removes. TOML has escapes for the rest.
        escaped = (c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in value)
        text = f'"{"".join(escaped)}"'
    return f"--{key}{'=' if text.startswith('-') else ' '}{shlex.quote(text)}"


def to_toml(config: Config) -> str:
    """Returns the resolved configuration as TOML, which reads back as an equal `Config`."""
    # TOML allows each table header once, and [data] has keys before and after [data.columns].
    tables: dict[str, list[str]] = {}
    for key in LEAVES:
        section, name = key.rsplit(".", 1)
        lines = tables.setdefault(section, [f"[{section}]"])
        lines.append(f"{name} = {toml_value(value_of(config, key))}")
    return "\n\n".join("\n".join(lines) for lines in tables.values()) + "\n"
