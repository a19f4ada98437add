"""Time and extra memory of one call, and the environment that it was measured in."""

import json
import math
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
PACKAGES = (
    *("torch", "triton", "liger-kernel", "cut-cross-entropy", "quack-kernels", "trl"),
    "flash-linear-attention",
)


def seconds_once(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def times_on_gpu(call: Callable[[], Any], device: torch.device, seconds: float) -> list[float]:
    """Seconds of 5 to 30 calls, as many as fit into `seconds`, after one warm-up call."""
    estimate = seconds_once(call, device)
    repeats = min(30, max(5, math.ceil(seconds / max(estimate, 1e-6))))
    return [seconds_once(call, device) for _ in range(repeats)]


def times_round_robin(
    calls: dict[str, Callable[[], Any]], device: torch.device, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each call. The calls alternate, so that a slow spell of the machine hits all of
    them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(rounds + 1):
        for name, call in calls.items():
            duration = seconds_once(call, device)
            if round_number > 0:  # the first round warms up
                times[name].append(duration)
    return times


def extra_bytes_on_gpu(call: Callable[[], Any]) -> tuple[int, Any]:
    """Returns the peak memory that one call allocates, its result included; and the result."""
    call()  # the first call allocates libraries' workspaces and compiles kernels
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, result


def peak_bytes() -> int:
    """Returns the peak resident set size of this process, since `extra_bytes_on_cpu` last reset
    it."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where ru_maxrss starts at the parent's peak
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes * (1 if platform.system() == "Darwin" else 1024)


def extra_bytes_on_cpu(call: Callable[[], Any]) -> int:
    """Returns the growth of this process's peak memory in one call, its result included.

    Memory that an earlier call freed would be reused and not counted, so measure one call per
    process.
    """
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")  # Linux: resets the peak that compiling and loading left
    before = peak_bytes()
    kept = call()
    after = peak_bytes()
    del kept
    return after - before


def dtype_on(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def relative_error(actual: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm()).item()


def summary_of_times(times: list[float]) -> dict[str, float]:
    return {
        "median_ms": 1e3 * statistics.median(times),
        "fastest_ms": 1e3 * min(times),
        "slowest_ms": 1e3 * max(times),
        "repeats": len(times),
    }


def git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def commit(but: Sequence[str] = ()) -> str:
    """Returns the checkout's commit, with "+changes" if it has any; BENCH_COMMIT without a
    checkout; empty without either.

    but: folders, or patterns of files, that do not count: the last commit that changed anything
        else is returned.
    """
    rest = _all_but(but)
    head = git("log", "-1", "--format=%H", *(rest if but else ())) if shutil.which("git") else ""
    if not head:
        return os.environ.get("BENCH_COMMIT", "")
    return head + ("+changes" if changes(but) else "")


def changes(but: Sequence[str] = ()) -> str:
    """Returns git's lines of the files that differ from the commit, but those in `but`; empty
    for none, and without a checkout."""
    return git("status", "--porcelain", *_all_but(but)) if shutil.which("git") else ""


def _all_but(folders: Sequence[str]) -> tuple[str, ...]:
    return ("--", ".", *(f":(exclude){folder}" for folder in folders))


def version(package: str) -> str:
    """Returns the installed version of a package; empty if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def versions() -> dict[str, str]:
    """Versions of Python, CUDA and the installed packages among PACKAGES."""
    names = {item.metadata["Name"]: item.version for item in metadata.distributions()}
    installed = {name.lower().replace("_", "-"): names[name] for name in names if name}
    found = {name: installed[name] for name in PACKAGES if name in installed}
    return {"python": platform.python_version(), **found, **cuda_version()}


def cuda_version() -> dict[str, str]:
    return {"cuda": str(torch.version.cuda)} if torch.cuda.is_available() else {}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}"


def environment(device: torch.device, command: str) -> dict[str, Any]:
    return {
        "command": command,
        "commit": commit(),
        "device": device_name(device),
        "num_threads": torch.get_num_threads(),
        "versions": versions(),
    }


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def emit(result: dict[str, Any], output: Path | None) -> None:
    """Prints the result as one line of JSON, and writes it to `output` if given."""
    line = json.dumps(result)
    if output:
        output.write_text(line + "\n")
    print(line)
