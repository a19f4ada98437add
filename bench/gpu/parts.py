"""Runs the parts of the GPU check, each in its own process with a time limit.

`python -m bench.gpu.parts ORDER_FILE` is such a process.
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.gpu.job import Job, slug
from bench.measure import ROOT, progress

LOG_LINES = 60
"""last lines of a part's output that the results keep"""


@dataclass(frozen=True)
class Part:
    name: str
    module: str
    """has `run(job)`, which does the work and returns one line of text"""
    share: float
    """share of the total time that is reserved for this part"""
    needs_gpu: bool = False


# The most important parts of a first run on a GPU come first. The shares add up to 1.
PARTS = (
    Part("environment", "bench.gpu.environment", 0.06),
    Part("tests", "bench.gpu.tests", 0.20),
    Part("waits", "bench.gpu.waits", 0.07, needs_gpu=True),
    Part("kernels", "bench.gpu.kernels", 0.24),
    Part("steps", "bench.gpu.steps", 0.08),
    Part("engine", "bench.gpu.engine", 0.25),
    Part("questions", "bench.gpu.questions", 0.10, needs_gpu=True),
)


@dataclass(frozen=True)
class Settings:
    device: torch.device
    quick: bool
    output: Path
    seconds: float
    environment: dict[str, Any]


def child(part: Part, settings: Settings, found_file: Path, deadline: float) -> int:
    """Runs a part in this process; returns the exit status, 1 if something in it failed."""
    job = Job(
        settings.device,
        settings.quick,
        settings.output,
        found_file,
        deadline,
        settings.environment,
    )
    summary = importlib.import_module(part.module).run(job)
    job.save(summary=summary)
    for failure in job.failures:
        print(f"failed: {failure}", flush=True)
    return 1 if job.failures else 0


def stop(process: subprocess.Popen) -> None:
    """Kills the part and every process that it started; they form one session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def read_found(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {"found": {}, "failures": []}


def text_of(row: dict[str, Any], lines: list[str]) -> str:
    """Returns the text in the table: the part's summary, or why it failed."""
    summary, last = row["found"].get("summary"), lines[-1] if lines else "no output"
    if row["status"] == "passed":
        return summary or last
    if row["status"] == "stopped":
        return f"stopped after {row['limit_s']:.0f} s; last line: {last}"
    if row["failures"]:
        failures = "; ".join(row["failures"][:3])
        more = len(row["failures"]) - 3
        failures += f" and {more} more" if more > 0 else ""
        return f"{failures}; {summary}" if summary else failures
    return f"exit status {row['exit_status']}: {last}"


def write_order(
    part: Part, settings: Settings, found_file: Path, deadline: float, order_file: Path
) -> None:
    """Writes what `follow` reads. All processes share the deadline's clock, CLOCK_MONOTONIC."""
    paths = {"device": str(settings.device), "output": str(settings.output)}
    order = {"part": vars(part), "settings": {**vars(settings), **paths}}
    order |= {"found_file": str(found_file), "deadline": deadline}
    order_file.write_text(json.dumps(order))


def follow(order_file: Path) -> int:
    """Runs the part of an order file in this process; returns the exit status."""
    order = json.loads(order_file.read_text())
    settings = order["settings"]
    settings["device"] = torch.device(settings["device"])
    settings["output"] = Path(settings["output"])
    found_file = Path(order["found_file"])
    return child(Part(**order["part"]), Settings(**settings), found_file, order["deadline"])


def wait_for(order_file: Path, log_file: Path, limit_s: float) -> int | None:
    """Starts the part and waits; returns its exit status, or None if it was stopped."""
    with log_file.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "bench.gpu.parts", str(order_file)],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=ROOT,
        )
        try:
            return process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            stop(process)


def run_part(part: Part, settings: Settings, limit_s: float, folder: Path) -> dict[str, Any]:
    """Runs a part in its own process; returns its row of the results, also after a failure."""
    order_file, log_file = folder / f"{part.name}-order.json", folder / f"{part.name}.log"
    found_file = folder / f"{part.name}.json"
    begin = time.monotonic()
    write_order(part, settings, found_file, begin + limit_s, order_file)
    exit_status = wait_for(order_file, log_file, limit_s)
    statuses = {None: "stopped", 0: "passed"}
    lines = [line for line in log_file.read_text(errors="replace").splitlines() if line.strip()]
    row = {
        "part": part.name,
        "status": statuses.get(exit_status, "failed"),
        "seconds": time.monotonic() - begin,
        "limit_s": limit_s,
        "exit_status": exit_status,
        **read_found(found_file),
    }
    return {**row, "text": text_of(row, lines), "last_lines": lines[-LOG_LINES:]}


def skipped(part: Part) -> dict[str, Any]:
    row = {"part": part.name, "status": "skipped", "seconds": 0.0, "found": {}, "failures": []}
    return {**row, "text": "needs a GPU", "last_lines": []}


def run_parts(parts: tuple[Part, ...], settings: Settings) -> list[dict[str, Any]]:
    """Runs the parts in order; writes all rows to the results after each part."""
    rows: list[dict[str, Any]] = []
    deadline = time.monotonic() + settings.seconds
    with tempfile.TemporaryDirectory() as temporary:
        for index, part in enumerate(parts):
            if part.needs_gpu and settings.device.type == "cpu":
                rows.append(skipped(part))
                continue
            left = deadline - time.monotonic()
            kept = settings.seconds * sum(later.share for later in parts[index + 1 :])
            limit_s = max(1.0, left - kept)
            progress(f"{part.name}: limit {limit_s:.0f} s of the remaining {left:.0f} s")
            rows.append(run_part(part, settings, limit_s, Path(temporary)))
            progress("\n".join(f"  {line}" for line in rows[-1]["last_lines"]))
            progress(f"{part.name}: {rows[-1]['status']}, {rows[-1]['seconds']:.0f} s")
            write(settings, rows)
    write(settings, rows)
    return rows


def result_file(settings: Settings) -> Path:
    return settings.output / f"gpu-check-{slug(settings.device)}.json"


def write(settings: Settings, rows: list[dict[str, Any]]) -> None:
    result = {"name": "gpu-check", **settings.environment, "quick": settings.quick}
    result |= {"seconds": sum(row["seconds"] for row in rows), "parts": rows}
    result_file(settings).write_text(json.dumps(result, indent=1) + "\n")


def chosen_parts(names: str) -> tuple[Part, ...]:
    """Returns the named parts in the order of PARTS; ValueError for an unknown name."""
    known, wanted = [part.name for part in PARTS], names.split(",")
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ValueError(f"--parts: got {', '.join(unknown)}; choose from {', '.join(known)}")
    return tuple(part for part in PARTS if part.name in wanted)


if __name__ == "__main__":
    sys.exit(follow(Path(sys.argv[1])))
