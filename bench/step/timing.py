"""Times whole steps by part, times the loops, and measures the memory of each loop."""

import functools
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench import measure
from bench.measure import progress
from bench.step.cases import Case, load_case, open_run, read_rollouts, write_rollouts
from bench.step.loops import GemmLoop, Loop, OwnLoop, PlainPaint, no_op, part_seconds
from bench.step.trl_loop import TrlLoop
from paint_engine.recipes.paint import Paint
from paint_engine.training import step as training_step
from paint_engine.types import TrainExample

OURS, PLAIN, TRL = "paint_engine", "plain PyTorch loss", "TRL SDFTTrainer"
LOOPS = {OURS: "ours", PLAIN: "plain", TRL: "peer"}
GPU_ORDER = (OURS, TRL, PLAIN)
"""the most important comparison first, because time may run out"""
GEMMS = "matrix products"
PART_STEPS = 2
CHILD_PREFIX = "extra_bytes "
RETURNS_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "131072"}
"""Makes glibc return freed tensors to the system immediately. Memory that it keeps would be counted
and varies from run to run by about 30 MB at the tiny shape."""

Row = dict[str, Any]


@dataclass
class Bench:
    """One case on one device, and the directory of its runs."""

    case: Case
    device: torch.device
    folder: Path
    rollouts: list[TrainExample] = field(default_factory=list)
    most_rows: int = 1
    """largest number of rows per forward pass of our loop"""


def whole_steps(bench: Bench, number: int) -> dict[str, Any]:
    """Times `number` whole steps by part, including sampling, after a warm-up step.

    The rollouts of the warm-up step are kept in `bench` for the training part.
    """
    run = open_run(bench.case, bench.device, bench.folder / "whole")
    sample, tokens = training_step.sample_step, []

    def keep(*arguments: Any) -> Any:
        examples, lag = sample(*arguments)
        bench.rollouts = list(examples)
        return examples, lag

    def step() -> None:
        metrics, _ = training_step.train_step(run, run.step)
        run.step += 1
        tokens.append(metrics["num_loss_tokens"])

    with mock.patch.object(training_step, "sample_step", keep):
        step()
    parts = part_seconds(run, step, number)
    run.sampler.close()
    seconds = sum(parts.values())
    return {
        "num_steps": number,
        "seconds": seconds,
        "part_seconds": parts,
        "completion_tokens_per_s": statistics.mean(tokens[1:]) / seconds,
    }


def make_loop(name: str, bench: Bench) -> Loop:
    """Returns a loop with the case's initial weights and the rollouts of `bench`."""
    directory = Path(tempfile.mkdtemp(dir=bench.folder)) / "run"
    if name == TRL:
        command, base, tokenizer = load_case(bench.case, bench.device)
        given = (command.config, bench.rollouts, bench.most_rows, directory)
        return TrlLoop(base, tokenizer, *given)
    run = open_run(bench.case, bench.device, directory)
    return OwnLoop(run, bench.rollouts, Paint if name == OURS else PlainPaint)


def in_turn(loops: Mapping[str, Loop], rounds: int) -> dict[str, list[float]]:
    """Seconds of each loop's steps, without the first one, which warms up. The loops alternate.

    TRL's trainer cannot be paused, so the other loops step between the steps of the last one.
    """
    *others, leader = loops
    seconds: dict[str, list[float]] = {name: [] for name in others}

    def between() -> None:
        for name in others:
            seconds[name] += loops[name].steps(1, no_op)

    seconds[leader] = loops[leader].steps(rounds + 1, between)
    return {name: found[1:] for name, found in seconds.items()}


def row_of(loop: Loop, seconds: Sequence[float]) -> Row:
    """Returns a loop's times and first loss."""
    return {**measure.summary_of_times(list(seconds)), "first_loss": loop.losses[0]}


def part_ms(loop: Loop) -> Row:
    """Returns the times of the parts in milliseconds; only our own loops have parts."""
    if not isinstance(loop, OwnLoop):
        return {}
    parts = loop.part_seconds(PART_STEPS)
    return {"part_ms": {name: 1e3 * seconds for name, seconds in parts.items()}}


def rate(gemms: GemmLoop, seconds: Sequence[float]) -> float:
    """Returns the FLOP/s of the bare products."""
    return gemms.operations / statistics.median(seconds)


def time_on_cpu(bench: Bench, names: Sequence[str], rounds: int) -> tuple[dict[str, Row], float]:
    """Times all loops and bare products alternately; returns rows and the products' FLOP/s."""
    gemms = GemmLoop(bench.device)
    loops = {name: make_loop(name, bench) for name in names}
    seconds = in_turn({GEMMS: gemms, **loops}, rounds)
    rows = {name: row_of(loop, seconds[name]) for name, loop in loops.items()}
    for name, loop in loops.items():
        rows[name] |= part_ms(loop)
    return rows, rate(gemms, seconds[GEMMS])


def time_on_gpu(bench: Bench, name: str, rounds: int) -> Row:
    """Times one loop alone on the GPU and records the peak memory that it allocates."""
    loop = make_loop(name, bench)
    torch.cuda.reset_peak_memory_stats()
    row = row_of(loop, in_turn({name: loop}, rounds)[name])
    row["peak_bytes"] = torch.cuda.max_memory_allocated()
    return row | part_ms(loop)


def free_gpu() -> None:
    """Frees what a loop held; models and optimizers are in reference cycles."""
    gc.collect()
    torch.cuda.empty_cache()


def time_each_on_gpu(
    bench: Bench, names: Sequence[str], rounds: int, deadline: float
) -> tuple[dict[str, Row], float]:
    """Times one loop after another, then bare products on the warm GPU.

    deadline: value of time.monotonic after which no loop starts.

    Returns rows by loop and the products' FLOP/s.
    """
    rows: dict[str, Row] = {}
    free_gpu()
    for name in (name for name in GPU_ORDER if name in names):
        if time.monotonic() > deadline:
            rows[name] = {"reason": "the time budget was used up"}
            continue
        progress(f"{bench.case.name}: {name}")
        try:
            rows[name] = time_on_gpu(bench, name, rounds)
        except torch.cuda.OutOfMemoryError:
            rows[name] = {"reason": "out of memory"}
        free_gpu()
    gemms = GemmLoop(bench.device)
    seconds = in_turn({GEMMS: gemms}, rounds)[GEMMS]
    return rows, rate(gemms, seconds)


def extra_bytes(bench: Bench, name: str, arguments: Sequence[str]) -> int:
    """Returns the growth of the peak memory in a loop's first step, measured in another process.

    arguments: of `python -m bench.engine`; they select the case.
    """
    progress(f"{bench.case.name}: memory of {name}")
    path = bench.folder / "rollouts.json"
    write_rollouts(bench.rollouts, path)
    command = [sys.executable, "-m", "bench.engine", *arguments]
    command += ["--child", name, str(path), str(bench.most_rows)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | RETURNS_MEMORY)
    if done.returncode != 0:
        raise RuntimeError(f"{name} failed in the process that measures its memory:\n{done.stderr}")
    (line,) = (line for line in done.stdout.splitlines() if line.startswith(CHILD_PREFIX))
    return int(line.removeprefix(CHILD_PREFIX))


def child(bench: Bench, name: str, rollouts: Path, most_rows: int) -> None:
    """Prints the growth of this process's peak memory in a loop's first step.

    Another loop takes a step with two rollouts before it, which loads what the loop needs.
    """
    given = read_rollouts(rollouts)
    bench.rollouts = given[:2]
    make_loop(name, bench).steps(1, no_op)
    gc.collect()
    bench.rollouts, bench.most_rows = given, most_rows
    call: Callable[[], Any] = functools.partial(make_loop(name, bench).steps, 1, no_op)
    print(f"{CHILD_PREFIX}{measure.extra_bytes_on_cpu(call)}", flush=True)
