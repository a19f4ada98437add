"""The files of a run directory as the report reads them, checked before anything is drawn."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt, PositiveInt

from paint_engine.files import (
    BadFile,
    FileMissing,
    Record,
    checked,
    read_json_if_there,
    read_jsonl,
    read_tables,
)

_REMEDY = "restore it from a copy, or remove it: the report says what is missing"


class _Step(Record):
    step: NonNegativeInt


class _Summary(Record):
    num_problems: NonNegativeInt
    num_samples: NonNegativeInt
    seconds_train: float
    seconds_eval: float
    avg_at_k_before: float | None
    avg_at_k_after: float | None
    paired_difference: float | None
    paired_difference_ci95: Annotated[list[float], Field(min_length=2, max_length=2)] | None
    pass_at_k_before: float | None = None
    pass_at_k_after: float | None = None


class _Train(Record):
    num_steps: PositiveInt | None = None
    batch_size: PositiveInt | None = None


class _Anchor(Record):
    text: str
    found: bool


class _Sample(Record):
    step: NonNegativeInt
    problem_id: str
    problem: str
    solution: str
    answer: str | None
    truncated: bool
    tokens: list[str]
    correct: bool | None = None


class _TeacherView(Record):
    overlap: float
    mask_ratio: float
    partial_solution: str
    anchors: list[_Anchor]
    rationale: str = ""


class _Reward(Record):
    reward: float
    advantage: float


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`: numbers by name, with `step`. Empty if there is no such file.

    Raises BadFile for other lines, and ReadFailed."""
    rows = _lines(path)
    for number, row in enumerate(rows, start=1):
        where = f"{path}: entry {number}"
        checked(_Step, row, where, _REMEDY)
        checked(dict[str, float], row, where, _REMEDY)
    return rows


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The lines of `samples.jsonl`, which `check_sample` checks. Empty if there is no such file."""
    return _lines(path)


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        return read_jsonl(path)
    except FileMissing:
        return []


def check_sample(sample: Mapping[str, Any], columns: Sequence[str], color: str) -> None:
    """Raises BadFile unless the report can show the sample.

    columns: the names of lists with one number per token, where the sample has them.
    color: the one that colours the tokens, which each sample has.
    """
    where = f"samples.jsonl: a sample of step {str(sample.get('step'))[:20]}"
    sample = dict(sample)
    checked(_Sample, sample, where, _REMEDY)
    for key, kind in (("partial_solution", _TeacherView), ("reward", _Reward)):
        if key in sample:
            checked(kind, sample, where, _REMEDY)
    there = {name: sample[name] for name in (color, *columns) if name in (color, *sample)}
    if "teacher_entropy" in there:
        there["student_entropy"] = sample.get("student_entropy")
    for name, values in there.items():
        numbers = checked(list[float | bool], values, f"{where}: {name}", _REMEDY)
        if len(numbers) != len(sample["tokens"]):
            raise BadFile(
                f"{where}: {name}: got {len(numbers)} numbers; needs one for each of its "
                f"{len(sample['tokens'])} tokens; {_REMEDY}"
            )


def read_summary(path: Path) -> dict[str, Any] | None:
    """`summary.json`, or None if there is none. Raises BadFile and ReadFailed."""
    summary = read_json_if_there(path, dict[str, Any])
    if summary is not None:
        checked(_Summary, summary, str(path), _REMEDY)
    return summary


def read_settings(path: Path) -> dict[str, dict[str, Any]] | None:
    """The sections of `config.toml`, or None if there is none. Raises BadFile and ReadFailed."""
    try:
        settings = read_tables(path, remedy=_REMEDY)
    except FileMissing:
        return None
    checked(dict[str, dict[str, Any]], settings, str(path), _REMEDY)
    checked(_Train, settings.get("train", {}), f"{path}: [train]", _REMEDY)
    return settings
