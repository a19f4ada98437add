"""Makes the planned runs that are missing, in one process per core or GPU.

A run's record goes to the ledger as the run ends. A command that was killed, or whose time was up,
resumes with the runs that the ledger lacks. Only the workers import PyTorch, after their thread and
device settings.
"""

import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

from bench.paper.ledger import Ledger
from bench.paper.plan import (
    EVALUATED,
    Job,
    PlannedRun,
    Scale,
    base_directory,
    base_sha256,
    sweep_runs,
    table_runs,
)

Record = dict[str, Any]
Rates = dict[tuple[str, str], float]


def perform_job(job: Job) -> Record:
    """Makes a run from scratch, in a worker; returns its record."""
    from bench.paper.worker import perform

    shutil.rmtree(job.directory, ignore_errors=True)
    job.directory.mkdir(parents=True)
    return perform(job)


def start_worker(devices: "Queue[str] | None") -> None:
    """Sets a worker's thread, instructions and device before it imports PyTorch.

    With one thread, sums have the same order on any number of cores; with AVX2, on processors with
    and without AVX-512. That is as fast here.

    devices: holds a GPU for each worker; None on CPUs.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    # Of PyTorch's own kernels, of MKL's products, and of oneDNN's.
    os.environ |= {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    os.environ["CUDA_VISIBLE_DEVICES"] = "" if devices is None else devices.get()
    import torch

    torch.set_num_threads(1)


def _end_with_parent() -> None:
    """Exits with the parent; otherwise a worker would write where the next command does."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def visible_gpus() -> list[str]:
    """Returns the GPUs that CUDA_VISIBLE_DEVICES may name: all, or those that it already restricts
    to."""
    import torch

    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        return allowed.split(",")[: torch.cuda.device_count()]
    return [str(index) for index in range(torch.cuda.device_count())]


def make_pool(num_workers: int, *, on_gpus: bool) -> ProcessPoolExecutor:
    """Returns a pool of workers with one thread each, and on GPUs with one GPU each if there are
    enough."""
    context = multiprocessing.get_context("spawn")
    devices = None
    if on_gpus:
        devices = context.Queue()
        visible = visible_gpus()
        for index in range(num_workers):
            devices.put(visible[index % len(visible)])
    return ProcessPoolExecutor(num_workers, context, initializer=start_worker, initargs=(devices,))


@dataclass(frozen=True)
class Crew:
    """Who makes the runs, and until when.

    num_workers: of the pool.
    deadline: of `time.monotonic`, after which no run starts; None for no limit.
    """

    pool: Executor
    num_workers: int
    deadline: float | None = None

    def has_time(self) -> bool:
        return self.deadline is None or time.monotonic() < self.deadline


def run_missing(
    jobs: Sequence[Job],
    crew: Crew,
    ledger: Ledger,
    *,
    perform: Callable[[Job], Record] = perform_job,
    say: Callable[[str], None] = print,
) -> None:
    """Makes the runs that the ledger lacks and enters them, until the crew's time is up. Runs that
    have begun are finished. The ledger also has each failure.

    Raises RuntimeError if runs failed, after the others are done.
    """
    waiting = deque(ledger.missing(jobs))
    done, failed = len(jobs) - len(waiting), []
    running: dict[Future[Record], Job] = {}
    started = time.monotonic()
    while running or (waiting and crew.has_time()):
        # No more than can run: what a pool has queued starts even if the time is up.
        while waiting and len(running) < crew.num_workers and crew.has_time():
            job = waiting.popleft()
            running[crew.pool.submit(perform, job)] = job
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            name, error = running.pop(future).run.run_id, future.exception()
            if error is None:
                ledger.add(future.result())
            else:
                ledger.add_failure(name, f"{type(error).__name__}: {error}")
                failed.append(f"{name}: {''.join(traceback.format_exception(error))}")
            done += 1
            say(_progress(name, future, done, len(jobs), started))
    if failed:
        raise RuntimeError("some runs failed; the others are stored:\n" + "\n".join(failed))


def _progress(name: str, future: Future[Record], done: int, total: int, started: float) -> str:
    error = future.exception()
    if error is None:
        record = future.result()
        last = record["evaluations"][-1]
        outcome = f"{last['avg_at_k']:.1%} after {last['step']} steps, {record['seconds']:.0f} s"
    else:
        outcome = "failed"
    return f"{done}/{total}  {(time.monotonic() - started) / 60:.1f} min  {name}  {outcome}"


def best_rates(scale: Scale, sweep: Sequence[Record]) -> tuple[Rates, list[Record]]:
    """Returns the learning rate with the highest accuracy, the mean over the sweep's seeds, by
    (size, recipe); the lower one of equals.

    Also returns all rates that were tried, for the result.
    """
    rates: Rates = {}
    found: list[Record] = []
    by_pair: dict[tuple[str, str], dict[float, list[float]]] = {}
    for record in sweep:
        tried = by_pair.setdefault((record["size"], record["setting"]), {})
        accuracy = record["evaluations"][-1]["avg_at_k"]
        tried.setdefault(record["learning_rate"], []).append(accuracy)
    for (size, recipe), tried in by_pair.items():
        means = {rate: statistics.fmean(tried[rate]) for rate in sorted(tried)}
        best = max(means, key=lambda rate: (means[rate], -rate))
        rates[size, recipe] = best
        found.append(
            {
                "size": size,
                "recipe": recipe,
                "chosen": best,
                "at_grid_edge": best in (min(scale.rates), max(scale.rates)),
                "tried": [
                    {"rate": rate, "avg_at_k": mean, "by_seed": tried[rate]}
                    for rate, mean in means.items()
                ],
            }
        )
    return rates, found


def make_bases(names: Sequence[str], bases: Path, say: Callable[[str], None] = print) -> None:
    """Pretrains the bases that are missing; each takes 15 minutes or more on two cores."""
    for name in names:
        directory = base_directory(bases, name)
        if (directory / "pretraining.json").exists():
            continue
        say(f"pretraining the {name} base in {directory}")
        command = [sys.executable, "-m", "paint_engine.tiny.pretrain", "--size", name]
        command += ["--device", "auto", "--output", str(directory)]
        subprocess.run(command, check=True)


def describe_bases(names: Sequence[str], bases: Path) -> list[Record]:
    """Returns the name (its size, or the teacher), number of steps and hash of the weights of each
    model, from its pretraining record."""
    described = []
    for name in names:
        directory = base_directory(bases, name)
        record = json.loads((directory / "pretraining.json").read_text())
        described.append(
            {
                "size": name,
                "num_parameters": record["num_parameters"],
                "num_steps": record["num_steps"],
                "sha256": base_sha256(directory),
            }
        )
    return described


def make_jobs(
    runs: Sequence[PlannedRun], scale: Scale, rates: Rates, bases: Path, directory: Path
) -> list[Job]:
    jobs = []
    for run in runs:
        rate = run.rate
        if rate is None and run.setting not in EVALUATED:
            rate = rates[run.size, run.recipe]
        base = base_directory(bases, run.base)
        jobs.append(Job(run, scale, rate, base.resolve(), directory / run.run_id))
    return jobs


@dataclass(frozen=True)
class Finished:
    """All runs of some tables.

    records, swept: of the tables and of the sweep, by run id.
    choices: the learning rates that were tried, and the best.
    failed: ids of runs that failed before they were repeated.
    """

    records: dict[str, Record]
    choices: list[Record]
    swept: dict[str, Record]
    failed: list[str]


def run_tables(
    scale: Scale,
    numbers: Sequence[int],
    bases: Path,
    directory: Path,
    crew: Crew,
    ledger: Ledger,
    say: Callable[[str], None] = print,
) -> Finished | int:
    """Runs the sweep, then the tables at the learning rates that it chose.

    Returns the number of runs that are left if the time was up before.
    """
    sweep = make_jobs(sweep_runs(scale, numbers), scale, {}, bases, directory)
    runs = table_runs(scale, numbers)
    say(f"learning rates: {len(sweep)} runs")
    run_missing(sweep, crew, ledger, say=say)
    if left := len(ledger.missing(sweep)):
        # The tables' runs wait for the rates.
        return left + len(runs)
    swept = _entries(ledger, sweep)
    rates, choices = best_rates(scale, list(swept.values()))
    jobs = make_jobs(runs, scale, rates, bases, directory)
    say(f"tables: {len(jobs)} runs")
    run_missing(jobs, crew, ledger, say=say)
    if left := len(ledger.missing(jobs)):
        return left
    records = _entries(ledger, jobs)
    made = records.keys() | swept.keys()
    failed = [one["id"] for one in ledger.failures if one["id"] in made]
    return Finished(records, choices, swept, failed)


def _entries(ledger: Ledger, jobs: Sequence[Job]) -> dict[str, Record]:
    return {job.run.run_id: ledger.records[job.run.run_id] for job in jobs}
