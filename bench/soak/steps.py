"""Part "steps" of the soak: a long run, whose memory, files and processes are counted from
outside."""

import re
import time
from pathlib import Path
from typing import Any

import psutil

from bench.measure import progress
from bench.soak.flat import MIB, judge_amount, judge_count
from bench.soak.launch import (
    LIMIT_S,
    Launch,
    arguments,
    shared_memory,
    steps_recorded,
    variants,
)
from bench.soak.server import serving
from paint_engine.files import BEST_LINK, EVALUATIONS_DIRECTORY

SAMPLERS = ("built-in sampler", "server, rollouts ahead")
LIMIT_BYTES = 10 * MIB
"""by which memory may grow"""
AMOUNTS = ("resident_bytes", "own_bytes", "children_bytes")
COUNTS = ("open_files", "threads", "processes", "shared_memory_entries", "run_files")


def measure(directory: Path, num_steps: int, sample_every: int) -> dict[str, Any]:
    """Runs `num_steps` steps with either sampler; returns the samples and what they say."""
    with serving() as url:
        runs = [
            {"variant": name, **measure_one(directory / name, num_steps, sample_every, variant)}
            for name, variant in variants(url).items()
            if name in SAMPLERS
        ]
    return {
        "num_steps": num_steps,
        "limit_bytes": LIMIT_BYTES,
        "runs": runs,
        "passed": all(verdict["is_flat"] for run in runs for verdict in run["verdicts"].values()),
    }


def measure_one(
    directory: Path, num_steps: int, sample_every: int, variant: dict[str, str]
) -> dict[str, Any]:
    """Runs with a checkpoint every twentieth of the steps and four evaluations."""
    settings = {
        **variant,
        "checkpoint.every": str(max(1, num_steps // 20)),
        "eval.every": str(max(1, num_steps // 4)),
        "eval.at_start": "false",
    }
    limit_s = LIMIT_S * max(1, num_steps / 1000)
    with Launch(directory, arguments(num_steps, settings), limit_s=limit_s) as launch:
        samples = take_samples(launch, num_steps, sample_every)
        seconds = launch.finish()
    series = {name: [sample[name] for sample in samples] for name in samples[0]}
    return {"seconds": seconds, "verdicts": judge(series), "series": series}


def judge(series: dict[str, list[int]]) -> dict[str, dict[str, Any]]:
    """Returns a verdict on each series of samples."""
    steps = series["step"]
    found = {name: judge_amount(steps, series[name], LIMIT_BYTES) for name in AMOUNTS}
    found |= {name: judge_count(steps, series[name]) for name in COUNTS}
    return {name: verdict.record() for name, verdict in found.items()}


def take_samples(launch: Launch, num_steps: int, every: int) -> list[dict[str, int]]:
    """Returns a sample after every so many steps that the run has recorded, until its last step or
    its end. Raises RuntimeError if it hangs."""
    samples: list[dict[str, int]] = []
    done = 0
    while done < num_steps and launch.is_running():
        time.sleep(0.02)
        recorded = steps_recorded(launch.run_dir)
        if recorded // every > done // every and recorded < num_steps:
            samples.append({"step": recorded, **sample(launch)})
            if recorded // (20 * every) > done // (20 * every):
                memory = samples[-1]["resident_bytes"] / MIB
                progress(f"step {recorded}: {memory:.0f} MiB, {samples[-1]['open_files']} files")
        done = recorded
    return samples


def sample(launch: Launch) -> dict[str, int]:
    """Returns what the process holds now.

    Not counted are the files of evaluations, each of which leaves two, and the checkpoints: the
    best one is kept beside the newest, or is one of them. What is being written is counted.
    """
    process = psutil.Process(launch.process.pid)
    children = process.children(recursive=True)
    files = [path.relative_to(launch.run_dir).parts for path in launch.run_dir.rglob("*")]
    others = [parts for parts in files if not _is_result(parts)]
    return {
        "resident_bytes": process.memory_info().rss,
        "own_bytes": own_bytes(process.pid),
        "children_bytes": sum(own_bytes(child.pid) for child in children),
        "open_files": process.num_fds(),
        "threads": process.num_threads(),
        "processes": 1 + len(children),
        "shared_memory_entries": len(shared_memory({process.pid, *(c.pid for c in children)})),
        "run_files": len(others),
    }


def _is_result(parts: tuple[str, ...]) -> bool:
    is_checkpoint = parts[-1] == BEST_LINK or any(part.startswith("step-") for part in parts)
    return parts[0] == EVALUATIONS_DIRECTORY or is_checkpoint


def own_bytes(pid: int) -> int:
    """Returns the memory of a process that is of no file, the part in swap space included: a leak
    that is never read again leaves the resident set where the system swaps it out."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.findall(r"^(?:RssAnon|VmSwap):\s+(\d+) kB$", status, re.MULTILINE)
    return 1024 * sum(map(int, found))
