"""No link inside a run directory is followed: a directory that others packed cannot make a command
write, truncate or read anything outside.

The run directory itself, and what lies above it, may be links of the user's.
"""

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from paint_engine.files.failures import BadFile, reading
from paint_engine.files.names import (
    BEST_LINK,
    CHECKPOINTS_DIRECTORY,
    EVALUATIONS_DIRECTORY,
    LAUNCH_FILE,
    LOCK_FILE,
    TENSORBOARD_DIRECTORY,
    WANDB_DIRECTORY,
    WANDB_ID_FILE,
)

_CHECKPOINT = re.compile(r"step-\d+")
_DIRECTORIES = (CHECKPOINTS_DIRECTORY, EVALUATIONS_DIRECTORY, TENSORBOARD_DIRECTORY)
# W&B makes links of its own in its directory, and replaces them without following them.
# A run's own are three deep.
_MAX_DEPTH = 10
_NAMES = {*_DIRECTORIES, WANDB_DIRECTORY, LAUNCH_FILE, WANDB_ID_FILE}
_SUFFIXES = {".json", ".jsonl", ".toml", ".html"}
_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a directory",
}


def is_checkpoint_name(name: str) -> bool:
    """Whether a checkpoint has this name: step-N. A user's copy, such as step-40-old, has not."""
    return _CHECKPOINT.fullmatch(name) is not None


def open_regular(path: Path, flags: int) -> int:
    """Opens a regular file, without following a link at `path`; new files get 0666 less the umask.

    Returns the descriptor. Raises BadFile if something else is there, and OSError.
    """
    # Opening a device may have effects, and opening a pipe waits: hence before, and afterwards in
    # case it was exchanged.
    if os.path.lexists(path):
        _refuse_other(path, os.lstat(path).st_mode)
    flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    try:
        _refuse_other(path, os.fstat(descriptor).st_mode)
    except BadFile:
        os.close(descriptor)
        raise
    return descriptor


def _refuse_other(path: Path, mode: int, *, directory: bool = False) -> None:
    """Raises BadFile unless this is the mode of a regular file, or of a directory if allowed."""
    if stat.S_ISREG(mode) or (directory and stat.S_ISDIR(mode)):
        return
    needed = "a regular file" + (" or a directory of its own" if directory else "")
    found, remedy = _KINDS.get(stat.S_IFMT(mode), "no file"), "remove it"
    if stat.S_ISLNK(mode):
        found += f" to {os.readlink(path)!r}"
        needed += ", since nothing outside of the directory is read or written through it"
        remedy += (
            ", or put what it stands for in its place. The run directory itself may be a link to "
            "another disk"
        )
    raise BadFile(f"{path} is {found}; needs {needed}; {remedy}")


def check_no_devices(directory: Path) -> None:
    """Raises BadFile where a pipe, a socket or a device lies in the directory, or a link to one:
    the libraries that read a model wait for a pipe without end, or take it for no file. Other links
    are followed, as those of the hub's cache."""
    with reading(directory):
        for entry in sorted(_entries(directory), key=lambda entry: entry.name):
            try:
                mode = entry.stat().st_mode
            except OSError:
                continue  # A link to nothing is no file.
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                found = _KINDS.get(stat.S_IFMT(mode), "no file")
                raise BadFile(
                    f"{directory / entry.name} is {found}; needs a regular file; remove it, or "
                    "put the file in its place"
                )


def check_links(directory: Path) -> None:
    """Checks a run directory, a checkpoint or an evaluation before it is read or written.

    directory: may itself be a link to a directory. Files of names that no command uses are left
        out, at its top.

    Raises BadFile where a link, a pipe or a device lies where a command reads or writes, but for
    `checkpoints/best`, and ReadFailed where a directory cannot be listed.
    """
    with reading(directory):
        for path, entry in _used(directory):
            if path == directory / CHECKPOINTS_DIRECTORY / BEST_LINK and entry.is_symlink():
                check_best(path)
            else:
                _refuse_other(path, entry.stat(follow_symlinks=False).st_mode, directory=True)


def check_best(link: Path) -> None:
    """Raises BadFile unless the link `best` names a checkpoint beside it."""
    if not is_checkpoint_name(target := os.readlink(link)):
        raise BadFile(
            f"{link} is a link to {target!r}; needs the name of a checkpoint beside it, step-N; "
            "remove it: the next evaluation marks a checkpoint again"
        )


def _used(directory: Path) -> Iterator[tuple[Path, "os.DirEntry[str]"]]:
    top = sorted(_entries(directory), key=lambda entry: entry.name)
    is_checkpoint = is_checkpoint_name(directory.name)
    for entry in top:
        if is_checkpoint or _is_used(entry.name):
            path = directory / entry.name
            yield path, entry
            if entry.is_dir(follow_symlinks=False) and entry.name != WANDB_DIRECTORY:
                yield from _below(path)


def _is_used(name: str) -> bool:
    known = name in _NAMES or Path(name).suffix in _SUFFIXES
    return known or name.startswith(LOCK_FILE)


def _below(directory: Path) -> Iterator[tuple[Path, "os.DirEntry[str]"]]:
    unread = [(directory, 1)]
    while unread:
        parent, depth = unread.pop()
        if depth > _MAX_DEPTH:
            raise BadFile(
                f"{parent} is a directory in more than {_MAX_DEPTH} others below "
                f"{directory.parent}; needs what a run writes, which is less deep; move "
                f"{directory} elsewhere, or remove it"
            )
        for entry in _entries(parent):
            path = parent / entry.name
            yield path, entry
            if entry.is_dir(follow_symlinks=False):
                unread.append((path, depth + 1))


def _entries(directory: Path) -> list["os.DirEntry[str]"]:
    # A directory that another process removes meanwhile, such as an unfinished one, has none.
    try:
        with os.scandir(directory) as found:
            return list(found)
    except FileNotFoundError:
        return []
