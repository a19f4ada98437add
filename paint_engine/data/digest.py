"""The digest of a run's data in its directory, and what has changed when the run is resumed.

`data.json` holds, of the training and of the evaluation set, where the rows came from (with the
commit, from the hub), how many were used, one digest of all of them in order, and a few digits of
each row's own. These only find the first row that differs.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt

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
_TRAIN, _EVAL = "train", "eval"
_NAMES = {_TRAIN: "training", _EVAL: "evaluation"}
# What selects the rows of each set. Another selection of evaluation data is no mistake.
_SELECTION = {
    _TRAIN: ("path", "split", "columns", "revision", "max_rows", "max_prompt_tokens"),
    _EVAL: ("path", "split", "columns", "revision", "num_problems"),
}


class _SetRecord(Record):
    selection: dict[str, Any]
    num_rows: NonNegativeInt
    digest: str
    row_digests: str


class _DataRecord(Record):
    train: _SetRecord
    eval: _SetRecord | None = None


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


def _describe(section: Any, kind: str, problem_set: ProblemSet) -> dict[str, Any]:
    rows = [_row_digest(problem) for problem in problem_set.problems]
    return {
        "selection": section.model_dump(mode="json", include=set(_SELECTION[kind])),
        "commit": problem_set.commit,
        "num_rows": len(rows),
        "digest": hashlib.sha256("".join(rows).encode()).hexdigest(),
        "row_digests": "".join(row[:_ROW_DIGITS] for row in rows),
    }


def data_record(
    config: Config, train_set: ProblemSet, eval_set: ProblemSet | None
) -> dict[str, Any]:
    """What `data.json` holds of these sets.

    {"train": {"selection": {"path": "train.jsonl", ...}, "num_rows": 64, "digest": "9f3c...",
               "row_digests": "..."}, "eval": {...}}

    A collective: raises ValueError on every rank if a rank has other rows than rank 0, as on nodes
    with copies of their own.
    """
    record = {_TRAIN: _describe(config.data, _TRAIN, train_set)}
    if eval_set is not None:
        record[_EVAL] = _describe(config.eval, _EVAL, eval_set)
    first = gather_objects(record)[0]
    found = _differences(first, record, (train_set, eval_set), "rank 0", "this rank")
    raise_together(
        f"{'; '.join(found)}; needs the same rows on every node; copy the data, or use a shared "
        "file system"
        if found
        else None
    )
    return record


def _differences(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    sets: Sequence[ProblemSet | None],
    earlier: str,
    later: str,
) -> list[str]:
    """One text for each set whose rows differ, though the same rows were asked for."""
    found = []
    for kind, problem_set in zip((_TRAIN, _EVAL), sets, strict=True):
        old, new = before.get(kind), now.get(kind)
        if old is None or new is None or old["digest"] == new["digest"]:
            continue
        if kind == _EVAL and old["selection"] != new["selection"]:
            continue
        assert problem_set is not None
        found.append(
            f"the {_NAMES[kind]} data {new['selection']['path']} has {new['num_rows']} rows for "
            f"{later} and had {old['num_rows']} for {earlier}; "
            + _first_difference(old, new, problem_set.problems)
        )
    return found


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
    sets: tuple[ProblemSet, ProblemSet | None],
    *,
    allow_changed: bool,
    say: Callable[[str], object],
) -> None:
    """Compares a run's data with what its directory recorded.

    record: `data_record` of `sets`, the training and the evaluation set.
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
