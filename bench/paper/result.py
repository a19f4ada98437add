"""Builds the result file, and repeats runs of the ledger."""

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.paper.claims import claim_numbers, exploratory_numbers
from bench.paper.ledger import Ledger, is_made_by
from bench.paper.mechanisms import row_mechanisms
from bench.paper.plan import (
    NUMBERS,
    PLANNED,
    Job,
    PlannedRun,
    Scale,
    arguments,
    base_directory,
    sweep_runs,
    table_runs,
)
from bench.paper.runs import Finished, perform_job
from bench.paper.stats import table_numbers
from paint_engine.config.command_line import load_config

Record = dict[str, Any]
SAMPLING = ("temperature", "top_p", "max_new_tokens")


def versions(records: Sequence[Record]) -> dict[str, str]:
    """Returns by package the versions that the runs were made with."""
    found: dict[str, set[str]] = {}
    for record in records:
        for name, version in record["versions"].items():
            found.setdefault(name, set()).add(version)
    return {name: " and ".join(sorted(several)) for name, several in found.items()}


def command(scale: Scale, numbers: Sequence[int]) -> str:
    """Returns the shortest command that makes the same result."""
    name, _, is_quick = scale.name.partition("-")
    parts = ["python -m bench.paper_tables"]
    parts += ["--quick"] if is_quick else []
    parts += [] if name == "laptop" else [f"--scale {name}"]
    parts += [] if tuple(numbers) == PLANNED else [f"--tables {' '.join(map(str, numbers))}"]
    return " ".join(parts)


def sampling() -> Record:
    """Returns how the answers are sampled, which is the same in all presets of the tables."""
    config = load_config(arguments("paint-tiny", {})).config
    return {name: getattr(config.eval, name) for name in SAMPLING}


def build_result(
    scale: Scale,
    numbers: Sequence[int],
    bases: Sequence[Record],
    finished: Finished,
    num_workers: int,
) -> Record:
    """Returns the result: everything that the documents show. The runs that it is computed from are
    in the ledger.

    `seconds` is the time on a processor core, summed over the runs, without the pretraining of the
    bases.
    """
    records, swept = finished.records, finished.swept
    everything = [*records.values(), *swept.values()]
    commits = sorted({record["commit"] for record in everything})
    devices = sorted({record["device"] for record in everything})
    return {
        "name": "paper-tables",
        "command": command(scale, numbers),
        "quick": scale.name.endswith("-quick"),
        "device": ", ".join(devices),
        "num_threads": 1,
        "versions": versions(everything),
        "commit": commits[0] if len(commits) == 1 else "",
        "commits": commits,
        "num_workers": num_workers,
        "num_runs": len(everything),
        "failed": list(finished.failed),
        "seconds": {
            "tables": sum(record["seconds"] for record in records.values()),
            "learning_rates": sum(record["seconds"] for record in swept.values()),
        },
        "scale": asdict(scale),
        "sampling": sampling(),
        "bases": list(bases),
        "learning_rates": list(finished.choices),
        "claims": claim_numbers(scale, numbers, records),
        "exploratory": exploratory_numbers(scale, numbers, records),
        "tables": table_numbers(scale, numbers, records),
        "mechanisms": row_mechanisms(scale, numbers, records),
    }


def find_runs(ledger: Ledger, scale: Scale, run_id: str) -> list[PlannedRun]:
    """Returns the run of the ledger with this id, or all runs of the row with this id.

    Raises ValueError if the ledger has neither.
    """
    planned = [*sweep_runs(scale, NUMBERS), *table_runs(scale, NUMBERS)]
    known = [run for run in planned if run.run_id in ledger.records]
    found = [run for run in known if f"{run.run_id}/".startswith(f"{run_id}/")]
    if not found:
        example = known[0].run_id if known else "none, because it has no run of this scale"
        raise ValueError(
            f"--rerun: got {run_id!r}, which is no run or row in {ledger.path}; needs one such as "
            f"{example}; --list prints those of Tables 1 to 5, --list --tables 6 those of Table 6, "
            "--ledger names another file"
        )
    return found


def rerun(
    ledger: Ledger, scale: Scale, run_id: str, bases: Path, directory: Path, pool: Executor
) -> list[str]:
    """Repeats runs from scratch in `directory`; returns a line per run.

    A line ends in "equal" or "DIFFERS". Raises ValueError if the base or the plan is not that of
    the recorded run.
    """
    jobs = []
    for run in find_runs(ledger, scale, run_id):
        old, base = ledger.records[run.run_id], base_directory(bases, run.base).resolve()
        if not (base / "model.safetensors").exists():
            raise ValueError(
                f"{run.run_id}: found no base in {base}; needs the {run.size} base; pass its "
                "directory by --bases, or choose a row of the bundled size"
            )
        job = Job(run, scale, old["learning_rate"], base, directory / run.run_id)
        if not is_made_by(old, job):
            raise ValueError(
                f"{run.run_id}: the base in {base}, its teacher or the plan differs from that of "
                "the recorded run; check --bases, or make the run again"
            )
        jobs.append(job)
    lines = []
    for job, new in zip(jobs, pool.map(perform_job, jobs), strict=True):
        old = ledger.records[job.run.run_id]
        lines.append(f"{job.run.run_id}: {_compare(old['evaluations'], new['evaluations'])}")
    return lines


def _compare(old: list[Record], new: list[Record]) -> str:
    """Compares the number of correct answers per problem, which is stricter than the mean."""
    key = [(e["step"], e["correct"]) for e in old]
    same = key == [(e["step"], e["correct"]) for e in new]
    shown = [" and ".join(f"{e['avg_at_k']:.4f}" for e in part) for part in (old, new)]
    return f"was {shown[0]}, is {shown[1]}: {'equal' if same else 'DIFFERS'}"
