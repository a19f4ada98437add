"""The digest of a run's data in its directory, and what has changed when the run is resumed.

`data.json` holds, of the training and of each evaluation set, where the rows came from (with the
commit, from the hub), how many were used, one digest of all of them in order, and a few digits of
each row's own. These only find the first row that differs.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, NonNegativeInt

from paint_engine.config.command_line import read_toml
from paint_engine.config.schema import Config
from paint_engine.data.problem_sets import ProblemSet
from paint_engine.distributed import gather_objects, raise_together
from paint_engine.files import (
    CONFIG_FILE,
    DATA_FILE,
    Record,
    checked,
    read_json_if_there,
    write_json,
)
from paint_engine.types import Problem

_ROW_DIGITS = 6
_TRAIN, _EVAL, _BENCHMARKS = "train", "eval", "benchmarks"
# What selects the rows of the training set. Another selection of evaluation data is no mistake.
_SELECTION = {"path", "split", "columns", "revision", "max_rows", "max_prompt_tokens"}

Sets = tuple[ProblemSet, Mapping[str, ProblemSet]]
"""the training set, and the evaluation sets by benchmark"""


class _SetRecord(Record):
    selection: dict[str, Any]
    num_rows: NonNegativeInt
    digest: str
    row_digests: str


class _DataRecord(Record):
    train: _SetRecord
    eval: _SetRecord | None = None
    benchmarks: dict[str, _SetRecord] = Field(default_factory=dict)


def _read_record(path: Path) -> dict[str, Any]:
    """`data.json`, empty if there is none. Raises BadFile and ReadFailed."""
    record = read_json_if_there(path, dict[str, Any])
    if record is None:
        return {}
    checked(_DataRecord, record, str(path))
    return record


def _row_digest(problem: Problem) -> str:
    """The id is part of it, since the seeds of a problem's rollouts depend on it."""
    row = (problem.problem_id, problem.problem, problem.solution, problem.answer)
    # A row without feedback, or a teacher of its own, keeps the digest that earlier versions have
    # recorded. The pair says which of the two a row has.
    row += (problem.feedback,) if problem.feedback else ()
    row += (("route", problem.route),) if problem.route else ()
    # JSON, for a lone surrogate has no UTF-8 form.
    return hashlib.sha256(json.dumps(row).encode()).hexdigest()


def _describe(problem_set: ProblemSet, selection: Mapping[str, Any]) -> dict[str, Any]:
    rows = [_row_digest(problem) for problem in problem_set.problems]
    return {
        "selection": dict(selection),
        "commit": problem_set.commit,
        "num_rows": len(rows),
        "digest": hashlib.sha256("".join(rows).encode()).hexdigest(),
        "row_digests": "".join(row[:_ROW_DIGITS] for row in rows),
    }


def data_record(
    config: Config, train_set: ProblemSet, eval_sets: Mapping[str, ProblemSet]
) -> dict[str, Any]:
    """What `data.json` holds of these sets. With `eval.benchmarks`, "benchmarks" holds each by its
    name, in place of "eval".

    {"train": {"selection": {"path": "train.jsonl", ...}, "num_rows": 64, "digest": "9f3c...",
               "row_digests": "..."}, "eval": {...}}

    A collective: raises ValueError on every rank if a rank has other rows than rank 0, as on nodes
    with copies of their own.
    """
    selection = config.data.model_dump(mode="json", include=_SELECTION)
    record: dict[str, Any] = {_TRAIN: _describe(train_set, selection)}
    shared = config.eval.model_dump(mode="json", include={"columns", "num_problems"})
    parts = {}
    for source in config.eval.sources if eval_sets else ():
        own = {"path": source.path, "split": source.split, "revision": source.revision}
        parts[source.name] = _describe(eval_sets[source.name], own | shared)
    if config.eval.benchmarks and parts:
        record[_BENCHMARKS] = parts
    elif parts:
        (record[_EVAL],) = parts.values()
    first = gather_objects(record)[0]
    found = _differences(first, record, (train_set, eval_sets), "rank 0", "this rank")
    raise_together(
        f"{'; '.join(found)}; needs the same rows on every node; copy the data, or use a shared "
        "file system"
        if found
        else None
    )
    return record


def _by_set(record: Mapping[str, Any]) -> dict[str | None, dict[str, Any]]:
    """The evaluation sets of a record by benchmark; None = the only one."""
    single = {None: record[_EVAL]} if record.get(_EVAL) is not None else {}
    return single | record.get(_BENCHMARKS, {})


def _differences(
    before: Mapping[str, Any], now: Mapping[str, Any], sets: Sets, earlier: str, later: str
) -> list[str]:
    """One text for each set whose rows differ, though the same rows were asked for."""
    train_set, eval_sets = sets
    pairs = [("training", before.get(_TRAIN), now.get(_TRAIN), train_set)]
    evaluated = _by_set(before)
    for name, part in _by_set(now).items():
        old = evaluated.get(name)
        if old is not None and old["selection"] == part["selection"]:
            problem_set = next(iter(eval_sets.values())) if name is None else eval_sets[name]
            pairs.append(("evaluation", old, part, problem_set))
    return [
        f"the {kind} data {new['selection']['path']} has {new['num_rows']} rows for "
        f"{later} and had {old['num_rows']} for {earlier}; "
        + _first_difference(old, new, problem_set.problems)
        for kind, old, new, problem_set in pairs
        if old is not None and new is not None and old["digest"] != new["digest"]
    ]


def _first_difference(
    old: Mapping[str, Any], new: Mapping[str, Any], problems: Sequence[Problem]
) -> str:
    both = min(old["num_rows"], new["num_rows"])
    for place in range(both):
        digits = slice(place * _ROW_DIGITS, (place + 1) * _ROW_DIGITS)
        if old["row_digests"][digits] != new["row_digests"][digits]:
            name = problems[place].problem_id
            return f"the first row that differs is number {place + 1} ({name})"
    if old["num_rows"] == new["num_rows"]:
        return "which row differs is not known"
    return f"the rows after number {both} are {'new' if new['num_rows'] > both else 'missing'}"


def check_same_data(
    run_dir: Path,
    record: Mapping[str, Any],
    sets: Sets,
    *,
    allow_changed: bool,
    say: Callable[[str], object],
) -> None:
    """Compares a run's data with what its directory recorded.

    record: `data_record` of `sets`.
    allow_changed: only say what has changed.

    Raises ValueError where rows were changed, added, removed or put in another order. Without a
    record, of a run of an earlier version, only the path is compared.
    """
    path = run_dir / DATA_FILE
    recorded = _read_record(path)
    found = _differences(recorded, record, sets, f"the run {run_dir}", "its resume")
    before = read_toml(run_dir / CONFIG_FILE).get("data.path")
    now = record[_TRAIN]["selection"]["path"]
    if not recorded and before != now:
        found.append(f"the training data is {now}, and was {before}; no digest of it is recorded")
    if not found:
        return
    if allow_changed:
        say(f"note: resuming with changed data: {'; '.join(found)}")
        return
    raise ValueError(
        f"{'; '.join(found)}; needs the same rows in the same order, because a resumed run "
        "continues the same training; restore the data, or accept the change with "
        "--allow-changed-data, or start a new run"
    )


def write_data_record(run_dir: Path, record: Mapping[str, Any]) -> None:
    """Writes `data.json`, unless it is there already."""
    path = run_dir / DATA_FILE
    if _read_record(path) != record:
        write_json(path, record)
