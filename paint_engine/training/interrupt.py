"""Turns Ctrl-C and SIGTERM into a request: the run finishes its step, saves, and stops."""

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
    """A context manager in which the first signal becomes a request that `check` raises.

    A second Ctrl-C interrupts at once. So does a Ctrl-C before `begin`, when there is nothing to
    save. A second SIGTERM does not, because a scheduler and torchrun may both send one.
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
        """Marks that training has started: from now on there are steps to finish and save."""
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
        """Raises Stopped if this process has received a signal."""
        if self._signal is not None:
            raise Stopped(self._signal)

    def check_together(self) -> None:
        """Raises Stopped on every rank if any rank has received a signal. A collective call."""
        for number in gather_objects(self._signal):
            if number is not None:
                raise Stopped(number)
