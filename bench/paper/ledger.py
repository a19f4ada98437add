"""The ledger: the records of finished runs in one JSON Lines file, which is kept in git.

Runs made on different days and machines add up in it: of two lines of one run, the later counts.
A file beside it has the runs that failed, which are repeated. One command at a time may write a
ledger.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.paper.plan import Job
from paint_engine.files import json_line, read_jsonl, write_atomic

Record = dict[str, Any]


class Ledger:
    """The records by run id, in the order in which the runs were first made; and the failures.

    Raises ValueError for a file that was cut short.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records = {record["id"]: record for record in _read(path)}
        self.failures_path = path.with_name(f"{path.stem}-failed.jsonl")
        self.failures = _read(self.failures_path)

    def find(self, job: Job) -> Record | None:
        """Returns the record of a run, if its settings and base are those of the job; else None."""
        record = self.records.get(job.run.run_id)
        return record if record is not None and is_made_by(record, job) else None

    def missing(self, jobs: Sequence[Job]) -> list[Job]:
        return [job for job in jobs if self.find(job) is None]

    def add(self, record: Record) -> None:
        """Writes the record, in the place of an earlier one of the same run."""
        self.records[record["id"]] = record
        _write(self.path, self.records.values())

    def add_failure(self, run_id: str, error: str) -> None:
        """Writes that a run failed, and with which exception."""
        self.failures.append({"id": run_id, "error": error})
        _write(self.failures_path, self.failures)


def is_made_by(record: Record, job: Job) -> bool:
    """Returns whether the job has the settings and the base of a recorded run."""
    settings = job.settings
    return {name: record.get(name) for name in settings} == settings


def _write(path: Path, records: Iterable[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, b"".join(map(json_line, records)))


def _read(path: Path) -> list[Record]:
    if not path.exists():
        return []
    text = path.read_bytes()
    if text and not text.endswith(b"\n"):
        number = text.count(b"\n") + 1
        raise ValueError(
            f"{path}: line {number}, the last one, is cut short; needs whole lines, a finished run "
            "each; take the file from git again, or remove that line to repeat its run"
        )
    return read_jsonl(path)
