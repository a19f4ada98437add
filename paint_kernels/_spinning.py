"""OpenMP threads that wait: they spin on a free machine, and sleep at once on a busy one.

libgomp, the OpenMP runtime of PyTorch's Linux wheels, lets a waiting thread spin 300,000 times,
some milliseconds, before it sleeps. On free processors that is right: many parallel regions of a
loss or of a small model last 20 µs, and waking a thread takes as long again. Beside another process
a spinning thread holds the processor that the thread it waits for needs, and every region takes a
slice of the scheduler's.

libgomp spins 100 times only while it manages more threads than there are processors (its manual,
GOMP_SPINCOUNT), and counts them all the time. So while other processes use the processors, Python
threads that each own a parked team of OpenMP threads push that count above the limit; they end when
the processors are free again. The teams that compute keep their size, so no result changes.
"""

import atexit
import os
import sys
import threading
import time
from pathlib import Path

import torch

INTERVAL_S = 0.5
BUSY, FREE = 0.4, 0.2
"""processors that others use beyond those that PyTorch's threads leave them: above the first,
threads are to sleep, below the second to spin"""
USER_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
PARALLEL_ELEMENTS = 2**16
"""of a sum that PyTorch divides among threads: above its grain of 2**15 elements"""
# user, nice, system, irq, softirq, steal; what is left out is idle, or counted as user already.
_USED_COLUMNS = (1, 2, 3, 6, 7, 8)


def uses_libgomp() -> bool:
    """Returns whether libgomp, and no other OpenMP runtime, is loaded, on a system with Linux's
    /proc."""
    if sys.platform != "linux":
        return False
    loaded = Path("/proc/self/maps").read_text()
    return "libgomp" in loaded and "libiomp" not in loaded and "libomp" not in loaded


def used_seconds() -> float:
    """Returns the seconds that all processes have used on this process's processors since boot."""
    names = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    lines = (line.split() for line in Path("/proc/stat").read_text().splitlines())
    ticks = sum(int(line[i]) for line in lines if line[0] in names for i in _USED_COLUMNS)
    return ticks / os.sysconf("SC_CLK_TCK")


def num_teams_above_limit(num_threads: int, num_processors: int) -> int:
    """Returns the number of parked teams that make libgomp's count, num_threads + teams *
    (num_threads - 1), exceed the number of processors."""
    return max(0, (num_processors - num_threads) // (num_threads - 1) + 1)


class ParkedTeams:
    """Threads that keep a team of OpenMP threads each, and do nothing, until they are released."""

    def __init__(self, number: int) -> None:
        self._released = threading.Event()
        self.threads = [
            threading.Thread(target=self._keep_team, name="parked-team", daemon=True)
            for _ in range(number)
        ]
        for thread in self.threads:
            thread.start()

    def _keep_team(self) -> None:
        torch.zeros(PARALLEL_ELEMENTS, dtype=torch.float32, device="cpu").add_(1.0)
        self._released.wait()

    def release(self) -> None:
        """Ends the threads and waits for them."""
        self._released.set()
        for thread in self.threads:
            thread.join()


class LoadFollower:
    """Parks teams while other processes use the processors."""

    def __init__(self) -> None:
        self.parked: ParkedTeams | None = None
        self._due = 0.0
        self._seen: tuple[float, float, float] | None = None
        self._lock = threading.Lock()
        self._applies: bool | None = None

    def __call__(self) -> None:
        """Checks every half second what others use. Otherwise returns within a microsecond."""
        if time.monotonic() < self._due or not self._lock.acquire(blocking=False):
            return
        try:
            self._look()
        finally:
            self._lock.release()

    def _look(self) -> None:
        if self._applies is None:
            user_chose = any(name in os.environ for name in USER_SETTINGS)
            self._applies = not user_chose and uses_libgomp()
        if not self._applies:
            self._due = float("inf")
            return
        now, used, own = time.monotonic(), used_seconds(), time.process_time()
        self._due = now + INTERVAL_S
        if self._seen is not None:
            then, used_then, own_then = self._seen
            self.adapt((used - used_then - (own - own_then)) / (now - then))
        self._seen = now, used, own

    def adapt(self, others: float) -> None:
        """Parks or releases teams. `others` is the mean number of processors that others use."""
        num_threads, num_processors = torch.get_num_threads(), len(os.sched_getaffinity(0))
        lacking = others - max(0, num_processors - num_threads)
        if self.parked is None and lacking > BUSY and num_threads > 1:
            self.parked = ParkedTeams(num_teams_above_limit(num_threads, num_processors))
            # A thread that is inside PyTorch when the interpreter ends would abort the process.
            atexit.register(self.parked.release)
        elif self.parked is not None and lacking < FREE:
            atexit.unregister(self.parked.release)
            self.parked.release()
            self.parked = None


follow_load = LoadFollower()
"""Called wherever much is computed on a CPU: see the module."""
