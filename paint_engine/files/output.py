"""A command's output that does not end the command where it cannot be written."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast


class _LossyOutput:
    """A text stream that goes nowhere once the system has refused a write to it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._dropping():
            self._stream.flush()

    @contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            # What is in Python's buffer goes there too, when the process ends.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            with suppress(OSError):
                reason = os.strerror(error.errno or errno.EIO)
                print(f"note: the output is lost from here on ({reason})", file=sys.stderr)


@contextmanager
def lossy_output() -> Iterator[None]:
    """In a command: goes on without its output when that cannot be written, for a log on a full
    disk is no reason to lose a run on another one."""
    before = sys.stdout
    sys.stdout = cast(TextIO, _LossyOutput(before))
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout = before
