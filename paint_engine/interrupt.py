"""Ctrl-C and SIGTERM as a request: the step that runs is finished, then the run is saved."""

import signal
import sys
from types import FrameType
from typing import Self


class Stopped(Exception):
    """The user asked the run to stop; everything up to the last finished step is intact."""


class StopRequest:
    """While entered, the first signal is a request that `check` honours; the second interrupts at
    once."""

    def __init__(self) -> None:
        self._requested = False

    def __enter__(self) -> Self:
        self._previous = {
            number: signal.signal(number, self._on_signal)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._requested:
            raise KeyboardInterrupt
        self._requested = True
        print(
            "\nstopping after this step or evaluation batch (again: at once, without saving)",
            file=sys.stderr,
        )

    def check(self) -> None:
        """Raises Stopped where a signal has come."""
        if self._requested:
            raise Stopped
