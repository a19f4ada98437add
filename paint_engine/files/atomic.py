"""Files and directories that are whole or absent.

They are written under a name that nobody can guess, so that no link can wait there, and renamed. A
rename replaces a link at its target and does not follow it. While they are written they are locked
(`flock`), so that nobody takes them for what a killed process has left. The directory of a
checkpoint is not, which several ranks write: the run's own lock keeps others out of its place.

Modes: files get 0666 and directories 0777, less the umask, as those of other programs do.
"""

import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from paint_engine.files.failures import writing

_UNFINISHED = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{16}\.unfinished", re.DOTALL)


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
    """Returns a new path at which a file or a directory is written before it is renamed to
    `path`."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.unfinished")


def finished_name(name: str) -> str | None:
    """The name that a file of this name would have got; None if it is none of `unfinished_path`."""
    found = _UNFINISHED.fullmatch(name)
    return None if found is None else found["name"]


@contextmanager
def _held(descriptor: int) -> Iterator[None]:
    """Locks an unfinished file or directory while it is written, and closes the descriptor then.

    Between its creation and this lock it may be removed. Writing then fails at the rename.
    """
    try:
        # Some network file systems have no locks. There, nobody removes what others left.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _is_held(path: Path) -> bool:
    """Whether another process may be writing the unfinished file or directory."""
    if path.is_symlink():
        return False
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def write_all(descriptor: int, content: bytes) -> None:
    """Writes all of the content; a single write may be short."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file under another name and renames it to `path`. A kill or a full disk leaves the
    earlier file at `path`, or none, but never a part. Removes what a killed process has left.

    content: text is encoded as UTF-8.

    Raises WriteFailed; the unfinished file is removed.
    """
    unfinished = unfinished_path(path)
    with writing(path):
        remove_left_overs(path.parent, path.name)
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(unfinished, flags, 0o666)
            with _held(descriptor):
                write_all(descriptor, content.encode() if isinstance(content, str) else content)
                os.fsync(descriptor)
                unfinished.replace(path)
        except BaseException:
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
        remove_left_overs(path.parent, path.name)
        unfinished.symlink_to(target, target_is_directory=True)
        unfinished.replace(path)
        flush(path.parent)


# ---- directories ---------------------------------------------------------------------------------


def is_ours(path: Path) -> bool:
    """Whether this user owns the file, the link or the directory itself."""
    return path.lstat().st_uid == os.geteuid()


def remove_left_overs(directory: Path, name: str | None = None) -> None:
    """Removes what killed processes of this user have left unfinished in the directory.

    name: only what would have become this file or directory; None = everything.
    """
    with os.scandir(directory) as entries:
        found = [
            entry
            for entry in entries
            if (finished := finished_name(entry.name)) is not None and name in (None, finished)
        ]
    for entry in found:
        with suppress(OSError):
            if is_ours(path := Path(entry.path)) and not _is_held(path):
                remove_tree(path)


def remove_tree(path: Path) -> None:
    """Removes a file, a link, or a directory with all that is in it. Links are not followed."""
    if path.is_dir() and not path.is_symlink():
        # On network storage a file that another process reads cannot be deleted yet; and Python
        # gives up on directories that are a thousand deep, which no run has made.
        with suppress(RecursionError):
            shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_at_once(path: Path) -> None:
    """Renames a directory, then removes it, so that a kill in between leaves nothing of its name.
    Raises WriteFailed."""
    doomed = unfinished_path(path)
    with writing(path):
        path.rename(doomed)
    remove_tree(doomed)


def make_unfinished(path: Path, unfinished: Path | None = None) -> Path:
    """Creates the empty directory that `publish_directory` renames to `path`; removes those that
    killed processes have left.

    unfinished: of `unfinished_path`, where several ranks agree on it; None = a new one.
    """
    unfinished = unfinished or unfinished_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_left_overs(path.parent, path.name)
    unfinished.mkdir()
    return unfinished


def publish_directory(unfinished: Path, path: Path) -> None:
    """Renames the unfinished directory, whose files are flushed already, to `path`.

    `path` does not exist, or is an empty directory.
    """
    for directory in (*(p for p in unfinished.rglob("*") if p.is_dir()), unfinished):
        flush(directory)
    unfinished.rename(path)
    flush(path.parent)


def _flush_files(directory: Path) -> list[Path]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    for file in files:
        flush(file)
    return files


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
            with _held(os.open(unfinished, os.O_RDONLY | os.O_CLOEXEC)):
                yield unfinished
                _flush_files(unfinished)
                publish_directory(unfinished, path)
        except BaseException:
            remove_tree(unfinished)
            raise


@contextmanager
def new_files(directory: Path) -> Iterator[Path]:
    """Yields an empty directory, whose files replace those of the same names in `directory` when
    the body ends, one by one. `directory` is created if needed. Raises WriteFailed."""
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        unfinished = make_unfinished(directory / "files")
        try:
            with _held(os.open(unfinished, os.O_RDONLY | os.O_CLOEXEC)):
                yield unfinished
                for file in _flush_files(unfinished):
                    file.replace(directory / file.relative_to(unfinished))
                flush(directory)
        finally:
            remove_tree(unfinished)
