"""Ctrl-C and SIGTERM as a request: the step that runs is finished, then the run is saved."""

import os
import signal
from types import FrameType
from typing import Self

from paint_engine.distributed import gather_objects

_NOTICE = (
    b"\nstopping after this step or evaluation batch (Ctrl-C again: at once, without saving)\n"
)


class Stopped(Exception):
    """A signal asked the run to stop; everything up to the last finished step is intact."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


class StopRequest:
    """While entered, the first signal is a request that `check` honours.

    A second Ctrl-C interrupts at once, and so does the first before `begin`, when there is nothing
    to save. A second SIGTERM does not: a scheduler and torchrun may both send one.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._begun = False

    def __enter__(self) -> Self:
        self._previous = {
            number: signal.signal(number, self._on_signal)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def begin(self) -> None:
        """From here on there are steps to finish and to save."""
        self._begun = True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and (self._signal is not None or not self._begun):
            raise KeyboardInterrupt
        if self._signal is not None:
            return
        self._signal = number
        if os.environ.get("RANK", "0") == "0":
            # Not print: its buffer may be in use by what the signal has interrupted.
            os.write(2, _NOTICE)

    def check(self) -> None:
        """Raises Stopped where a signal has come to this process."""
        if self._signal is not None:
            raise Stopped(self._signal)

    def check_together(self) -> None:
        """Raises Stopped on every rank where a signal has come to any. A collective."""
        for number in gather_objects(self._signal):
            if number is not None:
                raise Stopped(number)
