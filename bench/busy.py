"""Measures training and the loss beside other processes: `python -m bench.busy`.

Six steps of the tiny preset, and one forward and backward pass of `paint_loss` at the vocabulary of
Qwen3, alone and beside a load, under three rules for OpenMP threads that wait: "follow" as this
project does (`paint_kernels/_spinning.py`), "spin" as libgomp does by itself, "sleep" as under
OMP_WAIT_POLICY=PASSIVE. `ratio` is to "spin" without a load. `others` is how many processors were
used by neither the measured process nor the load: a figure with more than 0.1 was disturbed. Cases
that are in the output file already, and are not measured again, stay there. The last line of stdout
is JSON.
"""

import argparse
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench import measure
from paint_kernels import paint_loss
from paint_kernels._spinning import used_seconds

NUM_TOKENS, HIDDEN, VOCAB_SIZE = 512, 256, 151_936
LIMIT_S = 200
"""of one measured process, which is killed then"""
POLICIES = {
    "spin": {"GOMP_SPINCOUNT": "300000"},
    "follow": {},
    "sleep": {"OMP_WAIT_POLICY": "PASSIVE"},
}
LOADS = {
    "none": "",
    "one process": "while True: pass",
    "two threads": "import torch\na = torch.ones(1000, 1000)\nwhile True: a @ a",
}
LOAD_STARTS_S = 4.0
"""until a load has imported what it needs"""
TRAINING = ["paint_engine.train", "--preset", "tiny", "--train.num_steps", "6"]
TRAINING += ["--eval.enabled", "false", "--run.overwrite", "true", "--run.dir"]


def clean_environment() -> dict[str, str]:
    """Returns the environment without the user's settings of OpenMP."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "MKL_"))}


@contextmanager
def busy(load: str) -> Iterator[subprocess.Popen[bytes] | None]:
    """Runs the load inside; its process, or None without one."""
    if not LOADS[load]:
        yield None
        return
    command = [sys.executable, "-c", LOADS[load]]
    with subprocess.Popen(command, env=clean_environment()) as process:
        time.sleep(LOAD_STARTS_S)
        try:
            yield process
        finally:
            process.kill()


def own_seconds() -> float:
    """Returns the processor seconds of this process and of those that it has started and waited
    for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def run_limited(command: list[str], policy: str, log: Path) -> float:
    """Seconds of a command whose output goes to `log`; it and its children are killed at LIMIT_S.

    Raises RuntimeError where it fails or takes longer.
    """
    start = time.perf_counter()
    environment = clean_environment() | POLICIES[policy]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            failed = process.wait(LIMIT_S) != 0
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            failed = True
    if failed:
        command_line = " ".join(command)
        raise RuntimeError(f"{command_line} failed, or took {LIMIT_S} s: {log.read_text()[-2000:]}")
    return time.perf_counter() - start


def measure_training(policy: str, directory: Path) -> float:
    run_dir = tempfile.mkdtemp(dir=directory)
    command = [sys.executable, "-m", *TRAINING, run_dir]
    return run_limited(command, policy, directory / "log.txt")


def measure_loss(policy: str, directory: Path) -> float:
    """Measures the median seconds of a call, in a process of its own."""
    log = directory / "log.txt"
    run_limited([sys.executable, "-m", "bench.busy", "--child"], policy, log)
    return statistics.median(json.loads(log.read_text().splitlines()[-1]))


def time_loss(repeats: int) -> list[float]:
    """Returns the seconds of each call, after one warm-up call."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, NUM_TOKENS, HIDDEN, generator=generator)
    weight = 0.02 * torch.randn(VOCAB_SIZE, HIDDEN, generator=generator)
    bounds = torch.tensor([0, NUM_TOKENS // 2, NUM_TOKENS], dtype=torch.int32)
    student.requires_grad_()
    seconds = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        paint_loss(student, teacher, weight, bounds).loss.backward()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


MEASURES = {"training": measure_training, "loss": measure_loss}


def measure_case(what: str, policy: str, load: str, directory: Path) -> dict[str, Any]:
    start, used, own = time.perf_counter(), used_seconds(), own_seconds()
    with busy(load):
        seconds = MEASURES[what](policy, directory)
    passed = time.perf_counter() - start
    others = (used_seconds() - used - (own_seconds() - own)) / passed
    text = f"{what}, {policy}, beside {load}: {seconds:.1f} s, others {others:.2f}"
    print(text, file=sys.stderr, flush=True)
    case = {"measure": what, "policy": policy, "load": load}
    return case | {"seconds": seconds, "others": others}


def merge(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the new cases, and those of the old ones that were not measured again, in a fixed
    order."""

    def key(case: dict[str, Any]) -> tuple[str, ...]:
        return case["measure"], case["load"], case["policy"]

    merged = {key(case): case for case in (*old, *new)}
    return [merged[name] for name in sorted(merged)]


def add_ratios(cases: list[dict[str, Any]]) -> None:
    """Adds each case's time relative to the same work under "spin" without a load, if that was
    run."""
    alone = {
        case["measure"]: case["seconds"]
        for case in cases
        if case["policy"] == "spin" and case["load"] == "none"
    }
    for case in cases:
        if case["measure"] in alone:
            case["ratio"] = case["seconds"] / alone[case["measure"]]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.busy", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--measures", nargs="+", choices=list(MEASURES), default=list(MEASURES))
    parser.add_argument("--policies", nargs="+", choices=list(POLICIES), default=list(POLICIES))
    parser.add_argument("--loads", nargs="+", choices=list(LOADS), default=list(LOADS))
    parser.add_argument(
        "--output", type=Path, help="also write the JSON to this file; its other cases stay"
    )
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        print(json.dumps(time_loss(repeats=3)))
        return
    with tempfile.TemporaryDirectory() as directory:
        cases = [
            measure_case(what, policy, load, Path(directory))
            for what in arguments.measures
            for load in arguments.loads
            for policy in arguments.policies
        ]
    if arguments.output and arguments.output.exists():
        cases = merge(json.loads(arguments.output.read_text())["cases"], cases)
    add_ratios(cases)
    command = " ".join(["python -m bench.busy", *argv])
    environment = measure.environment(torch.device("cpu"), command)
    measure.emit({"name": "busy", **environment, "cases": cases}, arguments.output)


if __name__ == "__main__":
    main(sys.argv[1:])
