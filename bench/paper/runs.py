"""Makes the planned runs that are missing, in one process per core or GPU.

A run ends by writing `DIR/<run id>/result.json` atomically; a command that was killed resumes with
the runs that lack it. Only the workers import PyTorch, after their thread and device settings.
"""

import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

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
from paint_engine.files import write_atomic

Record = dict[str, Any]
Rates = dict[tuple[str, str], float]
RESULT = "result.json"


def perform_job(job: Job) -> Record:
    """Makes a run from scratch, in a worker; writes and returns its record."""
    from bench.paper.worker import perform

    shutil.rmtree(job.directory, ignore_errors=True)
    job.directory.mkdir(parents=True)
    record = perform(job)
    write_atomic(job.directory / RESULT, json.dumps(record) + "\n")
    return record


def stored(job: Job) -> Record | None:
    """Returns the stored record of a run, if its settings and base are those of the job; else
    None."""
    path = job.directory / RESULT
    if not path.exists():
        return None
    record: Record = json.loads(path.read_text())
    settings = job.settings
    return record if {name: record[name] for name in settings} == settings else None


def start_worker(devices: "Queue[str] | None") -> None:
    """Sets a worker's thread and device before it imports PyTorch.

    With one thread, sums have the same order on any number of cores.

    devices: holds a GPU for each worker; None on CPUs.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
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


def run_missing(
    jobs: Sequence[Job],
    pool: Executor,
    *,
    perform: Callable[[Job], Record] = perform_job,
    say: Callable[[str], None] = print,
) -> dict[str, Record]:
    """Makes the runs that are not stored; returns the records of all jobs by run id.

    Raises RuntimeError if runs failed, after the others are done.
    """
    records: dict[str, Record] = {}
    waiting: dict[Future[Record], Job] = {}
    for job in jobs:
        known = stored(job)
        if known is None:
            waiting[pool.submit(perform, job)] = job
        else:
            records[job.run.run_id] = known
    started, failed = time.monotonic(), []
    try:
        for future in as_completed(waiting):
            name = waiting[future].run.run_id
            error = future.exception()
            if error is None:
                records[name] = future.result()
            else:
                failed.append(f"{name}: {''.join(traceback.format_exception(error))}")
            say(_progress(name, future, len(records) + len(failed), len(jobs), started))
    except KeyboardInterrupt:
        # Otherwise leaving the pool would wait for all queued runs.
        pool.shutdown(cancel_futures=True)
        raise
    if failed:
        raise RuntimeError("some runs failed; the others are stored:\n" + "\n".join(failed))
    return {job.run.run_id: records[job.run.run_id] for job in jobs}


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
    """Returns the learning rate with the highest accuracy by (size, recipe); the lower one of
    equals.

    Also returns all rates that were tried, for the result.
    """
    rates: Rates = {}
    found: list[Record] = []
    pairs = dict.fromkeys((record["size"], record["setting"]) for record in sweep)
    for size, recipe in pairs:
        tried = {
            record["learning_rate"]: record["evaluations"][-1]["avg_at_k"]
            for record in sweep
            if (record["size"], record["setting"]) == (size, recipe)
        }
        best = max(tried, key=lambda rate: (tried[rate], -rate))
        rates[size, recipe] = best
        found.append(
            {
                "size": size,
                "recipe": recipe,
                "chosen": best,
                "at_grid_edge": best in (min(scale.rates), max(scale.rates)),
                "tried": [{"rate": r, "avg_at_k": tried[r]} for r in sorted(tried)],
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
        subprocess.run([*command, "--output", str(directory)], check=True)


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


def run_tables(
    scale: Scale,
    numbers: Sequence[int],
    bases: Path,
    directory: Path,
    pool: Executor,
    say: Callable[[str], None] = print,
) -> tuple[dict[str, Record], list[Record], dict[str, Record]]:
    """Runs the sweep, then the tables at the learning rates that it chose.

    Returns the tables' records by run id, the choice of rates, and the sweep's records by run id.
    """
    sweep = sweep_runs(scale, numbers)
    say(f"learning rates: {len(sweep)} runs")
    swept = run_missing(make_jobs(sweep, scale, {}, bases, directory), pool, say=say)
    rates, choices = best_rates(scale, list(swept.values()))
    runs = table_runs(scale, numbers)
    say(f"tables: {len(runs)} runs")
    jobs = make_jobs(runs, scale, rates, bases, directory)
    return run_missing(jobs, pool, say=say), choices, swept
