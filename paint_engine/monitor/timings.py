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
    finished. `synchronize` waits for the device; only benchmarks set it, because it costs time.
    """

    def __init__(self, synchronize: Callable[[], None] | None = None) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.synchronize = synchronize or (lambda: None)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Adds the time inside the context to the part `name`."""
        self.synchronize()
        started = time.perf_counter()
        with torch.profiler.record_function(name):
            yield
            self.synchronize()
        self.seconds[name] += time.perf_counter() - started
