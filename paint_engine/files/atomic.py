"""Files and directories that are whole or absent."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from paint_engine.files.failures import writing


def flush(path: Path) -> None:
    """Puts a file's content, or the names in a directory, on the disk.

    A rename may reach the disk before the data of the renamed file, so the data goes first.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unfinished_path(path: Path) -> Path:
    """Returns the path at which a file or a directory is written before it is renamed to `path`."""
    return path.with_name(f".{path.name}.unfinished")


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file under another name and renames it to `path`. A kill or a full disk leaves the
    earlier file at `path`, or none, but never a part.

    content: text is encoded as UTF-8.

    Raises WriteFailed; the unfinished file is removed.
    """
    unfinished = unfinished_path(path)
    with writing(path):
        try:
            with unfinished.open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        except OSError:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
            raise
        flush(path.parent)


def write_json(path: Path, content: Any) -> None:
    """Writes indented JSON with `write_atomic`."""
    write_atomic(path, json.dumps(content, indent=2) + "\n")


def write_link(path: Path, target: str) -> None:
    """Makes `path` a link to a directory of the same parent; replaces an earlier link at once.
    Raises WriteFailed."""
    unfinished = unfinished_path(path)
    with writing(path):
        unfinished.unlink(missing_ok=True)
        unfinished.symlink_to(target, target_is_directory=True)
        unfinished.replace(path)
        flush(path.parent)


def make_unfinished(path: Path) -> Path:
    """Creates the empty directory that `publish_directory` renames to `path`; removes one that a
    killed process has left."""
    unfinished = unfinished_path(path)
    if unfinished.exists():
        shutil.rmtree(unfinished)
    unfinished.mkdir(parents=True)
    return unfinished


def publish_directory(path: Path) -> None:
    """Renames the unfinished directory of `path`, whose files are flushed already, to `path`.

    `path` does not exist, or is an empty directory.
    """
    unfinished = unfinished_path(path)
    for directory in (*(p for p in unfinished.rglob("*") if p.is_dir()), unfinished):
        flush(directory)
    unfinished.rename(path)
    flush(path.parent)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yields an empty directory, which is renamed to `path` when the body ends, or removed when it
    raises.

    `path` does not exist, or is an empty directory. The body only writes: raises WriteFailed if the
    system refuses it.
    """
    with writing(path):
        unfinished = make_unfinished(path)
        try:
            yield unfinished
            for file in unfinished.rglob("*"):
                if file.is_file():
                    flush(file)
            publish_directory(path)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
