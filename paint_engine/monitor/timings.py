"""Where the time of a training step goes."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class Timings:
    """Where the time of steps goes: seconds by the name of a part, added up.

    with timings.span("student"):
        ...

    The spans are also ranges in a trace of torch.profiler. A device that works on after the call
    returns is waited for only with `synchronize`, which benchmarks set: it costs time.
    """

    def __init__(self, synchronize: Callable[[], None] | None = None) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.synchronize = synchronize or (lambda: None)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Adds the time inside to the part's."""
        self.synchronize()
        started = time.perf_counter()
        with torch.profiler.record_function(name):
            yield
            self.synchronize()
        self.seconds[name] += time.perf_counter() - started
