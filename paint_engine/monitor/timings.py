"""Measures the time of each part of a training step."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class Timings:
    """Seconds by the name of a part, added up over steps.

    with timings.span("student"):
        ...

    The spans are also ranges in a trace of torch.profiler. A call may return before the device has
    finished. `synchronize` waits for the device; only benchmarks set it, because it costs time, and
    `clock`, to measure processor time.
    """

    def __init__(self, synchronize: Callable[[], None] | None = None) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.synchronize = synchronize or (lambda: None)
        self.clock = time.perf_counter

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Adds the time inside the context to the part `name`."""
        self.synchronize()
        started = self.clock()
        with torch.profiler.record_function(name):
            yield
            self.synchronize()
        self.seconds[name] += self.clock() - started
