"""A command's output: it shows what others wrote and does not obey it, and may be lost without
ending the command."""

import errno
import os
import re
import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, TextIO, cast

from paint_engine.files.printable import printable

# What progress bars of libraries write: one that begins its line again, and one that moves up to
# its line, in a write of its own.
_LINE_START = "\r"
_MOVE_UP = re.compile(r"\n*(\x1b\[A)+")
# Colours and other controls of the terminal.
_CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")


class _Output(ABC):
    """A text stream with a `write` of its own in front of another stream."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @abstractmethod
    def write(self, text: str) -> int: ...

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)


class _LossyOutput(_Output):
    """A text stream that goes nowhere once the system has refused a write to it."""

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


class _PrintableOutput(_Output):
    """A text stream that writes printable text. Libraries' colours are left out."""

    @property
    def unescaped(self) -> TextIO:
        """The stream behind it, for a `Terminal`, which has controls of its own."""
        return self._stream

    def write(self, text: str) -> int:
        if not _MOVE_UP.fullmatch(text):
            start = _LINE_START if text.startswith(_LINE_START) else ""
            text = start + printable(_CONTROL.sub("", text.removeprefix(start)))
        return self._stream.write(text)


@contextmanager
def printable_output() -> Iterator[None]:
    """Whatever prints to standard output and error, a library's warning too, prints text that a
    terminal only shows."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, _PrintableOutput(stream)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


@contextmanager
def command_output() -> Iterator[None]:
    """In a command: `printable_output`, which goes on without an output that cannot be written, for
    a log on a full disk is no reason to lose a run on another one."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, _LossyOutput(stream)) for stream in before)
    # Not put back: the interpreter calls it when the command has ended.
    sys.excepthook = _show_exception
    try:
        with printable_output():
            yield
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = before


def _show_exception(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    sys.stderr.write(printable("".join(traceback.format_exception(kind, error, trace))))
