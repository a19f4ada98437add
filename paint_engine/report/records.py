"""The files of a run directory as the report reads them, checked before anything is drawn."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from paint_engine.config.sections import Rollouts, Steps
from paint_engine.files import (
    BadFile,
    FileMissing,
    Record,
    checked,
    read_json_if_there,
    read_jsonl,
    read_tables,
)
from paint_engine.monitor import is_evaluation

_REMEDY = "restore it from a copy, or remove it: the report says what is missing"


# What float32 holds is far below, and twice as much is still a number.
Number = Annotated[float, Field(ge=-1e100, le=1e100)]
Step = Annotated[int, Field(ge=0, le=10**15)]
Count = Annotated[int, Field(ge=0, le=10**15)]
# The tokens of a whole evaluation may be spent on one correct answer.
Length = Annotated[float, Field(ge=0, le=1e18)]
Seconds = Annotated[float, Field(ge=0, le=1e12)]
Share = Annotated[float, Field(ge=0, le=1)]
# A little more than a whole, for what is rounded.
Difference = Annotated[float, Field(ge=-1.001, le=1.001)]


class _Step(Record):
    step: Step


class _Numbers(Record):
    avg_at_k: Share
    # An earlier version did not record these.
    accuracy_within: dict[Annotated[str, Field(pattern=r"^[0-9]{1,12}$")], Share] | None = None
    truncation_rate: Share = 0.0
    mean_length: Length | None = None
    mean_correct_length: Length | None = None
    median_correct_length: Length | None = None
    tokens_per_correct: Length | None = None


class _Evaluation(_Numbers):
    step: Step
    # Of several benchmarks.
    benchmarks: dict[str, _Numbers] = Field(default_factory=dict)


class _Shortening(Record):
    note: str


class _Final(Record):
    num_samples: Count
    max_new_tokens: Count
    base: _Evaluation | None = None
    last: _Evaluation | None = None
    best: _Evaluation | None = None


class _Summary(Record):
    num_problems: Count
    num_samples: Count
    seconds_train: Seconds
    seconds_eval: Seconds
    avg_at_k_before: Share | None
    avg_at_k_after: Share | None
    paired_difference: Difference | None
    paired_difference_ci95: Annotated[list[Difference], Field(min_length=2, max_length=2)] | None
    evaluations: list[_Evaluation] = Field(default_factory=list)
    shortenings: list[_Shortening] = Field(default_factory=list)
    pass_at_k_before: Share | None = None
    pass_at_k_after: Share | None = None
    final: _Final | None = None
    preset: str | None = None
    seed: Count | None = None

    @model_validator(mode="after")
    def _check_interval(self) -> Self:
        if (self.paired_difference is None) != (self.paired_difference_ci95 is None):
            raise ValueError("paired_difference and paired_difference_ci95 both, or neither")
        return self


class _Train(Record):
    num_steps: Steps | None = None
    batch_size: Rollouts | None = None


class _Anchor(Record):
    text: str
    found: bool


class _Sample(Record):
    step: Step
    problem_id: str
    problem: str
    solution: str
    answer: str | None
    truncated: bool
    tokens: list[str]
    correct: bool | None = None


class _Mask(Record):
    overlap: Share
    mask_ratio: Share
    anchors: list[_Anchor]
    text: str | None = None


class _TeacherView(Record):
    context: str
    source: str
    shown: str
    rationale: str = ""
    # Of other models alone. An earlier version did not record it.
    scored_by: list[str] = Field(default_factory=list)


class _Reward(Record):
    reward: Number
    advantage: Number


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` that are of steps: numbers by name, with `step`. Empty if there
    is no such file. The evaluations are in `summary.json`, too, and in more detail.

    Raises BadFile for other lines, and ReadFailed."""
    rows = _lines(path)
    for number, row in enumerate(rows, start=1):
        where = f"{path}: entry {number}"
        checked(_Step, row, where, _REMEDY)
        checked(dict[str, Number], row, where, _REMEDY)
    return [row for row in rows if not is_evaluation(row)]


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The lines of `samples.jsonl`, which `check_sample` checks. Empty if there is no such file."""
    return [_with_names_of_today(sample) for sample in _lines(path)]


def _with_names_of_today(sample: dict[str, Any]) -> dict[str, Any]:
    """Returns a sample with the names of this version. Earlier ones knew one context, the problem's
    own solution."""
    if "partial_solution" not in sample:
        return sample
    rest = {key: value for key, value in sample.items() if key != "partial_solution"}
    view = {"context": "solution", "source": sample.get("problem_id")}
    return {**rest, **view, "shown": sample["partial_solution"]}


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
    mask, view = _Mask.model_fields.keys(), _TeacherView.model_fields.keys()
    # A recipe records all of these, or none; a mask is a part of a view.
    kinds = ((_Mask, mask), (_TeacherView, view | mask), (_Reward, _Reward.model_fields.keys()))
    for kind, names in kinds:
        if names & sample.keys():
            checked(kind, sample, where, _REMEDY)
    there = {name: sample[name] for name in (color, *columns) if name in (color, *sample)}
    if "teacher_entropy" in there:
        there["student_entropy"] = sample.get("student_entropy")
    for name, values in there.items():
        numbers = checked(list[Number | bool], values, f"{where}: {name}", _REMEDY)
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
