"""Builds the result file, and repeats some of its runs."""

import platform
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.paper.plan import (
    PAPER,
    SCALES,
    TEACHER,
    Job,
    PlannedRun,
    Scale,
    base_directory,
    quick,
    sweep_runs,
    table_runs,
)
from bench.paper.runs import perform_job
from bench.paper.stats import table_numbers

Record = dict[str, Any]
PACKAGES = ("torch", "transformers", "peft")
# Only needed to resume: a table's runs share the base, and the setting implies the preset.
_NOT_KEPT = ("preset", "base_sha256", "teacher_sha256")


def versions() -> dict[str, str]:
    found = {name: metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **found}


def command(scale: Scale, numbers: Sequence[int]) -> str:
    """Returns the shortest command that makes the same result."""
    name, _, is_quick = scale.name.partition("-")
    parts = ["python -m bench.paper_tables"]
    parts += ["--quick"] if is_quick else []
    parts += [] if name == "laptop" else [f"--scale {name}"]
    parts += [] if tuple(numbers) == PAPER else [f"--tables {' '.join(map(str, numbers))}"]
    return " ".join(parts)


def build_result(
    scale: Scale,
    numbers: Sequence[int],
    bases: Sequence[Record],
    records: Mapping[str, Record],
    choices: Sequence[Record],
    swept: Mapping[str, Record],
    num_workers: int,
) -> Record:
    """Returns the result: everything that the documents show, and the runs that it is computed
    from.

    `seconds` is the time on a processor core, summed over the runs, without the pretraining of the
    bases.
    """
    everything = [*records.values(), *swept.values()]
    commits = sorted({record["commit"] for record in everything})
    devices = sorted({record["device"] for record in everything})
    return {
        "name": "paper-tables",
        "command": command(scale, numbers),
        "quick": scale.name.endswith("-quick"),
        "device": ", ".join(devices),
        "num_threads": 1,
        "versions": versions(),
        "commit": commits[0] if len(commits) == 1 else "",
        "commits": commits,
        "num_workers": num_workers,
        "seconds": {
            "tables": sum(record["seconds"] for record in records.values()),
            "learning_rates": sum(record["seconds"] for record in swept.values()),
        },
        "scale": asdict(scale),
        "bases": list(bases),
        "learning_rates": list(choices),
        "tables": table_numbers(scale, numbers, records),
        "runs": [_kept(record) for record in everything],
    }


def _kept(record: Record) -> Record:
    return {name: value for name, value in record.items() if name not in _NOT_KEPT}


def scale_of(result: Record) -> Scale:
    """Returns the current definition of the scale that the result was made with."""
    name, _, is_quick = result["scale"]["name"].partition("-")
    return quick(SCALES[name]) if is_quick else SCALES[name]


def find_runs(result: Record, run_id: str) -> list[PlannedRun]:
    """Returns the run with this id, or all runs of the row with this id.

    Raises ValueError if the result has neither.
    """
    scale, known = scale_of(result), {record["id"] for record in result["runs"]}
    numbers = sorted({panel["table"] for panel in result["tables"]})
    planned = [*sweep_runs(scale, numbers), *table_runs(scale, numbers)]
    found = [run for run in planned if f"{run.run_id}/".startswith(f"{run_id}/")]
    found = [run for run in found if run.run_id in known]
    if not found:
        raise ValueError(
            f"--rerun: got {run_id!r}, which is no run or row of the result; needs one such as "
            f"{sorted(known)[0]}; --list prints all; --tables 5 has a result of its own"
        )
    return found


def rerun(result: Record, run_id: str, bases: Path, directory: Path, pool: Executor) -> list[str]:
    """Repeats runs from scratch in `directory`; returns a line per run.

    A line ends in "equal" or "DIFFERS". Raises ValueError if the base or the plan is not that of
    the result.
    """
    recorded = {record["id"]: record for record in result["runs"]}
    hashes = {base["size"]: base["sha256"] for base in result["bases"]}
    jobs = []
    for run in find_runs(result, run_id):
        old, base = recorded[run.run_id], base_directory(bases, run.base).resolve()
        if not (base / "model.safetensors").exists():
            raise ValueError(
                f"{run.run_id}: found no base in {base}; needs the {run.size} base; pass its "
                "directory by --bases, or choose a row of the bundled size"
            )
        job = Job(run, scale_of(result), old["learning_rate"], base, directory / run.run_id)
        now = job.settings
        same_teacher = now.get("teacher_sha256") in (None, hashes.get(TEACHER))
        same_base = now["base_sha256"] == hashes[run.base] and same_teacher
        if not same_base or now["overrides"] != old["overrides"]:
            raise ValueError(
                f"{run.run_id}: the base in {base}, its teacher or the plan differs from that of "
                "the result; check --bases, or make the tables again"
            )
        jobs.append(job)
    lines = []
    for job, new in zip(jobs, pool.map(perform_job, jobs), strict=True):
        old = recorded[job.run.run_id]
        lines.append(f"{job.run.run_id}: {_compare(old['evaluations'], new['evaluations'])}")
    return lines


def _compare(old: list[Record], new: list[Record]) -> str:
    """Compares the number of correct answers per problem, which is stricter than the mean."""
    key = [(e["step"], e["correct"]) for e in old]
    same = key == [(e["step"], e["correct"]) for e in new]
    shown = [" and ".join(f"{e['avg_at_k']:.4f}" for e in part) for part in (old, new)]
    return f"was {shown[0]}, is {shown[1]}: {'equal' if same else 'DIFFERS'}"
