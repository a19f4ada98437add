"""What can be wrong with a file: one exception for each kind, with the reason and the remedy."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class WriteFailed(OSError):
    """A file could not be written: the disk is full, a quota is reached, the disk is faulty or
    read-only. The message names the file, the system's reason and the remedy."""


class ReadFailed(OSError):
    """The system refused to read a file: permissions, a stale handle, a faulty disk. The file may
    be intact, so nothing is concluded about its content. The message is as for WriteFailed."""


class FileMissing(ReadFailed):
    """There is no such file."""


class BadFile(ValueError):
    """A file is there, but it is not what belongs there: a link in its place, other types, text cut
    short. The message names the file, what was found, what is needed and the remedy."""


class LockLost(Exception):
    """This process no longer holds the directory in which it writes. The message says why."""


FILE_FAILURES = (WriteFailed, ReadFailed, BadFile, LockLost)
"""all of these, for ranks that must agree on them (`distributed.together`)"""

_WRITE_REMEDIES = {
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG): "free some space there, or raise the quota",
    (errno.EROFS, errno.EACCES, errno.EPERM): "make it writable",
}
_READ_REMEDIES = {
    (errno.EACCES, errno.EPERM): "make it readable",
    (errno.ESTALE,): "mount that file system again",
    (errno.ENOENT, errno.ENOTDIR): "restore it from a copy",
}
_REMEDY = "check that file system"
# The libraries written in Rust (safetensors, tokenizers) give the system's error as text.
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")


def _system_reason(error: Exception, remedies: dict[tuple[int, ...], str]) -> str | None:
    """The system's reason and the remedy, if the system refused what failed; else None."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := _RUST_ERROR.search(str(error))):
        number = int(found[1])
    if number is None:
        return None
    remedy = next((text for numbers, text in remedies.items() if number in numbers), _REMEDY)
    return f"{os.strerror(number)}: {remedy}"


def write_failure(error: Exception) -> WriteFailed | None:
    """The system's reason and the remedy, if the system refused what failed; else None."""
    reason = _system_reason(error, _WRITE_REMEDIES)
    return None if reason is None else WriteFailed(reason)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around writes below or at `path`: raises WriteFailed if the system refuses one."""
    try:
        yield
    except WriteFailed:
        raise
    except Exception as error:
        if (reason := write_failure(error)) is None:
            raise
        raise WriteFailed(f"{path} could not be written ({reason})") from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Around reads below or at `path`: raises ReadFailed if the system refuses one, and FileMissing
    if there is no such file."""
    try:
        yield
    except (ReadFailed, WriteFailed):
        raise
    except Exception as error:
        if (reason := _system_reason(error, _READ_REMEDIES)) is None:
            raise
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        kind = FileMissing if missing else ReadFailed
        raise kind(f"{path} could not be read ({reason})") from error
