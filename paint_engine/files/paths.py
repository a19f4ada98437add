"""Paths that a user writes, refused before they are looked up where no file system takes them."""

import argparse
from pathlib import Path

# Of Linux, with room for what lies below a path.
_MAX_NAME_BYTES = 255
_MAX_PATH_BYTES = 3000
# Python's own functions take a path part by part, and give up at about a thousand.
_MAX_PATH_PARTS = 256


def path_text(text: str) -> str:
    """Returns the text if it can be a path; the message of the ValueError is what is needed."""
    parts = text.split("/")
    try:
        sizes = [len(part.encode()) for part in parts]
    except UnicodeEncodeError as error:
        raise ValueError("valid Unicode") from error
    is_long = max(sizes) > _MAX_NAME_BYTES or sum(sizes) > _MAX_PATH_BYTES
    if "\0" in text or is_long or len(parts) > _MAX_PATH_PARTS:
        raise ValueError(
            f"at most {_MAX_PATH_BYTES:,} bytes, of which at most {_MAX_NAME_BYTES} between two of "
            f"at most {_MAX_PATH_PARTS} slashes, and no null character, as file systems need it"
        )
    return text


def argument_text(text: str) -> str:
    """The type of a command's argument that is, or may be, a path, as argparse takes it."""
    try:
        return path_text(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"got {text[:60]!a}; needs {error}") from error


def argument_path(text: str) -> Path:
    """The type of a command's argument that is a path."""
    return Path(argument_text(text))
