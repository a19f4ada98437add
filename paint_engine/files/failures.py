"""Writes that the system refuses: one exception, with the reason and the remedy."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class WriteFailed(OSError):
    """A file could not be written: the disk is full, a quota is reached, the disk is faulty or
    read-only. The message names the file, the system's reason and the remedy."""


_REMEDIES = {
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG): "free some space there, or raise the quota",
    (errno.EROFS, errno.EACCES, errno.EPERM): "make it writable",
}
_REMEDY = "check that file system"
# The libraries written in Rust (safetensors, tokenizers) give the system's error as text.
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")


def write_failure(error: Exception) -> WriteFailed | None:
    """The system's reason and the remedy, if the system refused what failed; else None."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := _RUST_ERROR.search(str(error))):
        number = int(found[1])
    if number is None:
        return None
    remedy = next((text for numbers, text in _REMEDIES.items() if number in numbers), _REMEDY)
    return WriteFailed(f"{os.strerror(number)}: {remedy}")


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
