"""What a directory's own files may say to the library `datasets`: nothing that leads out of it.

The head of a README.md, or .huggingface.yaml, says which files belong to a data set, and what its
columns are. It may name any address or path, and a column of images or sounds may hold addresses,
which the library opens when it reads a row. A directory comes from others as its rows do.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

_CARD, _SETTINGS = "README.md", ".huggingface.yaml"
_MARK = "---"
_MAX_BYTES = 1 << 24
# The one that reads a text and opens nothing.
_READS_TEXT = "Json"


def check_directory(directory: Path, section: str) -> None:
    """Raises ValueError where the directory's own files name data outside of it.

    section: the configuration section that names the directory, for the message.
    """
    import yaml

    for name in (_CARD, _SETTINGS):
        file = directory / name
        if not file.is_file():
            continue
        try:
            with file.open("rb") as opened:
                text = opened.read(_MAX_BYTES).decode()
            said = yaml.safe_load(_head(text) if name == _CARD else text)
            outside = next(filter(_leads_out, _texts(said)), None)
        except (ValueError, OSError, yaml.YAMLError, RecursionError) as error:
            reason = str(error).partition("\n")[0][:200]
            raise ValueError(
                f"--{section}.path {directory}: {name} cannot be read ({reason}); needs YAML "
                "that says which files the data set has; correct or remove it, or give one file"
            ) from error
        if outside is not None:
            raise ValueError(
                f"--{section}.path {directory}: {name} names {outside[:60]!r} as data, which is "
                "not in the directory; needs paths below it; put the data there, or give one file"
            )


def _head(text: str) -> str:
    """Returns the YAML at the start of a card, between two lines of dashes; "" if there is none."""
    lines = text.splitlines()
    marks = [place for place, line in enumerate(lines) if line.rstrip() == _MARK]
    return "\n".join(lines[marks[0] + 1 : marks[1]]) if len(marks) > 1 else ""


def _texts(said: Any) -> Iterator[str]:
    """Yields every text below `configs`, each object once: YAML may name one a million times."""
    seen: set[int] = set()
    unread = [said.get("configs")] if isinstance(said, dict) else []
    while unread:
        value = unread.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list) and id(value) not in seen:
            seen.add(id(value))
            unread += [*value.keys(), *value.values()] if isinstance(value, dict) else value


def _leads_out(text: str) -> bool:
    # "::" joins the file systems of fsspec: zip://a::http://b.
    path = PurePosixPath(text)
    is_address = "://" in text or "::" in text
    return is_address or path.is_absolute() or ".." in path.parts or text.startswith("~")


def opened_columns(features: Any) -> list[str]:
    """Returns the columns for which `datasets` opens files or addresses that a row names: images,
    sounds and the like.

    features: of a data set, by column.
    """
    return [name for name, feature in features.items() if _opens(feature)]


def _opens(feature: Any) -> bool:
    if isinstance(feature, dict):
        return any(map(_opens, feature.values()))
    if isinstance(feature, list | tuple):
        return any(map(_opens, feature))
    inner = getattr(feature, "feature", None)
    if inner is not None:
        return _opens(inner)
    return hasattr(feature, "decode_example") and type(feature).__name__ != _READS_TEXT
