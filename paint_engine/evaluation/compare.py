"""Compares evaluations: `python -m paint_engine.evaluate compare RUN_A RUN_B ...`."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from paint_engine.checkpoint.directory import list_checkpoints, split_place
from paint_engine.evaluation.accuracy import Estimate, best_step, bootstrap, by_problem
from paint_engine.evaluation.lengths import (
    LENGTHS,
    Answers,
    answers_of,
    length_budgets,
    length_estimates,
    length_statistics,
)
from paint_engine.evaluation.results import label_of
from paint_engine.evaluation.store import (
    EvalSample,
    Evaluation,
    evaluation_directory,
    read_evaluation,
    read_evaluations,
)
from paint_engine.files import CONFIG_FILE, check_links, one_line, write_json, writing
from paint_engine.files.terminal import Terminal
from paint_engine.monitor import FALL, compare_lengths, lengths_of

Evaluations = Mapping[str, Evaluation]

_SEED = "seed"
_FINAL = "final-"


@dataclass(frozen=True)
class Change:
    """A statistic of `length_statistics` in the first run and in the other, and its difference."""

    before: float
    after: float
    difference: Estimate


@dataclass(frozen=True)
class Difference:
    """One benchmark of two runs, in fractions.

    before, after: Avg@k of the first run and of the other.
    lengths: accuracy by length budget and lengths in tokens, by the statistic's name.
    gained: problems for which more than half of the samples are correct in the other run, but not
        in the first one; lost: the reverse.
    """

    before: float
    after: float
    difference: Estimate
    gained: tuple[str, ...]
    lost: tuple[str, ...]
    lengths: Mapping[str, Change]


def read_run(text: str) -> dict[str, Evaluation]:
    """Returns the complete evaluations of a run, by benchmark.

    text: the directory of an evaluation, or of a training run, which :last (the default), :best or
        :STEP may follow, and :final-last, :final-best or :final-STEP for what was evaluated by the
        full protocol after training.

    Raises ValueError if there is none, or if its files are not what an evaluation writes.
    """
    path, which = split_place(text)
    if not path.is_dir():
        raise ValueError(
            f"{text}: no such directory; needs the directory of an evaluation (its --output), or a "
            "training run's, with :STEP, :best, :last or :final-last after it"
        )
    check_links(path)
    if evaluation_directory(path).is_dir():
        evaluations, which = read_evaluations(path), which or "last"
        if not evaluations:
            raise ValueError(_no_evaluation(text, path))
        step = _choose_step(text, evaluations, which)
        if which.startswith(_FINAL):
            evaluations = read_evaluations(path, final=True)
        if step not in evaluations:
            raise ValueError(_no_such(text, which, evaluations))
        return evaluations[step]
    heads = [head for head in sorted(path.glob("*.json")) if head.with_suffix(".jsonl").is_file()]
    if not heads and is_training_run(path):
        raise ValueError(_no_evaluation(text, path))
    if not heads:
        raise ValueError(
            f"{text}: holds no complete evaluation; to resume an interrupted one, run its command "
            "again"
        )
    if which:
        raise ValueError(
            f"{text}: {path} is one evaluation, not a training run with several; leave out :{which}"
        )
    found = [read_evaluation(head) for head in heads]
    return {evaluation.header.benchmark: evaluation for evaluation in found}


def is_training_run(path: Path) -> bool:
    """Returns whether the directory is a training run's."""
    return (path / CONFIG_FILE).is_file() or bool(list_checkpoints(path))


def _no_evaluation(text: str, run_dir: Path) -> str:
    return (
        f"{text}: this training run has no complete evaluation (its eval.enabled was false, or it "
        f"stopped before one); make one with python -m paint_engine.evaluate --adapter {run_dir} "
        "--benchmarks ... --output DIR, with the settings of the other side, and compare DIR"
    )


def _choose_step(text: str, evaluations: Mapping[int, dict[str, Evaluation]], which: str) -> int:
    """The step that `which` names, best by the evaluations during training."""
    step: int | None = None
    name = which.removeprefix(_FINAL)
    if name == "best":
        # A resumed run may have other benchmarks than before.
        names = evaluations[max(evaluations)].keys()
        step = best_step({s: found for s, found in evaluations.items() if found.keys() == names})
    elif name == "last":
        step = max(evaluations)
    elif name.removeprefix("step-").isdecimal():
        step = int(name.removeprefix("step-"))
    if step is None:
        raise ValueError(_no_such(text, which, evaluations))
    return step


def _no_such(text: str, which: str, evaluations: Mapping[int, object]) -> str:
    there = ", ".join(map(str, evaluations)) or "none"
    kind = " (by the full protocol)" if which.startswith(_FINAL) else ""
    return (
        f"{text}: the run has no complete evaluation {which!r}; needs best, last or one of the "
        f"evaluated steps{kind}: {there}"
    )


def check_pairs(first: str, other: str, before: Evaluations, after: Evaluations) -> None:
    """Raises ValueError if the two evaluations differ in their problems, or in a setting other than
    the seed."""
    if before.keys() != after.keys():
        raise ValueError(
            f"{first} has {', '.join(sorted(before))}, and {other} has {', '.join(sorted(after))}; "
            "needs the same benchmarks in both; evaluate the missing ones with the same --output"
        )
    for name in before:
        a, b = before[name], after[name]
        keys = sorted((a.settings.keys() | b.settings.keys()) - {_SEED})
        differing = [
            f"{key} ({a.settings.get(key)!r} and {b.settings.get(key)!r})"
            for key in keys
            if a.settings.get(key) != b.settings.get(key)
        ]
        if differing:
            raise ValueError(
                f"{name}: {first} and {other} differ in {', '.join(differing)}, which changes the "
                "answers even of equal weights; evaluate one of them again with the settings of "
                "the other"
            )
        if sorted(a.header.problems.values()) != sorted(b.header.problems.values()):
            raise ValueError(
                f"{name}: {first} and {other} are of different problems "
                f"({len(a.header.problems)} and {len(b.header.problems)}); needs the same problems "
                "with the same answers; evaluate both on one data set"
            )


def notes(before: Evaluations, after: Evaluations) -> list[str]:
    """Returns notes on differences apart from the weights that `check_pairs` accepts: which, on
    which benchmarks, and what they mean."""
    effects = {
        _SEED: "the problems are paired, the random numbers are not",
        "dtype": "this alone changes some answers",
        "engine": "this alone changes some answers",
    }
    found: dict[tuple[str, str], list[str]] = {}
    for name in before:
        # Evaluations during training do not record dtype and engine.
        a, b = (
            {_SEED: header.settings[_SEED]} | header.subject
            for header in (before[name].header, after[name].header)
        )
        for key in effects:
            if key in a and key in b and a[key] != b[key]:
                found.setdefault((key, f"{a[key]} and {b[key]}"), []).append(name)
    return [
        f"differ in {key} ({values}) on {', '.join(names)}: {effects[key]}"
        for (key, values), names in found.items()
    ]


def shortenings(first: str, other: str, before: Evaluations, after: Evaluations) -> list[str]:
    """Returns a note for each benchmark whose answers are a quarter shorter in the other run."""
    found = []
    for name, evaluation in before.items():
        pair = evaluation, after[name]
        change = compare_lengths(
            *(lengths_of((s.num_tokens, s.truncated) for s in side.samples) for side in pair),
            step=after[name].header.step or 0,
            what=f"{name}: the answers of {other}",
            than=f"those of {first}",
        )
        if change is not None and change.fall >= FALL:
            found.append(change.note)
    return found


def _answers(evaluation: Evaluation, order: Evaluation) -> Answers:
    """Returns the answers in the order of `order`'s problems, whose names and order may differ."""
    rows, marks = by_problem(evaluation.samples), evaluation.header.problems
    wanted = list(order.header.problems.values())
    # Both sorted by fingerprint; copies of a problem are paired in their order.
    places = sorted(range(len(wanted)), key=wanted.__getitem__)
    found: list[list[EvalSample]] = [[] for _ in wanted]
    for place, name in zip(places, sorted(marks, key=marks.__getitem__), strict=True):
        found[place] = rows[name]
    return answers_of(found)


def _length_changes(before: Answers, after: Answers, budgets: Sequence[int]) -> dict[str, Change]:
    """Returns how each statistic changed."""
    first, second = (length_statistics(answers, budgets) for answers in (before, after))
    return {
        key: Change(float(first[key][0]), float(second[key][0]), difference)
        for key, difference in length_estimates([after], budgets, [before]).items()
    }


def compare(before: Evaluations, after: Evaluations) -> tuple[dict[str, Difference], Estimate]:
    """Returns the difference on each benchmark, and the unweighted mean over benchmarks, with
    intervals by a paired bootstrap over the problems of each benchmark.

    before, after: a pair that passes `check_pairs`.
    """
    found, groups = {}, []
    for benchmark, evaluation in before.items():
        names = list(evaluation.header.problems)
        pair = _answers(evaluation, evaluation), _answers(after[benchmark], evaluation)
        first, second = (answers.correct.mean(axis=1) for answers in pair)
        groups.append(second - first)
        found[benchmark] = Difference(
            float(first.mean()),
            float(second.mean()),
            bootstrap([second - first]),
            _named(names, (first <= 0.5) & (second > 0.5)),
            _named(names, (first > 0.5) & (second <= 0.5)),
            _length_changes(*pair, length_budgets(evaluation.settings["max_new_tokens"])),
        )
    return found, bootstrap(groups)


def _named(names: Sequence[str], where: np.ndarray) -> tuple[str, ...]:
    return tuple(name for name, here in zip(names, where, strict=True) if here)


def _record(differences: Mapping[str, Difference], macro: Estimate) -> dict[str, Any]:
    def entry(estimate: Estimate) -> dict[str, Any]:
        return {"difference": estimate.known, "ci95": estimate.ci95}

    def changed(change: Change) -> dict[str, Any]:
        values = {"before": change.before, "after": change.after}
        known = {name: None if np.isnan(value) else value for name, value in values.items()}
        return known | entry(change.difference)

    benchmarks = {
        name: {
            "before": d.before,
            "after": d.after,
            **entry(d.difference),
            "gained": list(d.gained),
            "lost": list(d.lost),
            "lengths": {key: changed(change) for key, change in d.lengths.items()},
        }
        for name, d in differences.items()
    }
    return {"benchmarks": benchmarks, "macro": entry(macro)}


def _table(first: str, other: str, differences: Mapping[str, Difference], macro: Estimate) -> Table:
    table = Table(
        title=one_line(f"{other} against {first}"),
        caption="Avg@k in percent; 95% intervals by paired bootstrap over problems;\n"
        "gained: solved by more than half of the samples only after",
    )
    table.add_column("")
    for heading in ("before", "after", "difference", "95% interval", "gained", "lost"):
        table.add_column(heading, justify="right", no_wrap=True)

    def interval(estimate: Estimate) -> tuple[str, str]:
        low, high = 100 * estimate.low, 100 * estimate.high
        return f"{100 * estimate.value:+.1f}", f"{low:+.1f} to {high:+.1f}"

    for name, d in differences.items():
        counts = str(len(d.gained)), str(len(d.lost))
        values = f"{100 * d.before:.1f}", f"{100 * d.after:.1f}"
        table.add_row(one_line(name), *values, *interval(d.difference), *counts)
    if len(differences) > 1:
        table.add_row("macro", "", "", *interval(macro), "", "")
    return table


def _length_table(name: str, changes: Mapping[str, Change]) -> Table:
    table = Table(
        title=one_line(f"{name}: accuracy by length budget, and lengths"),
        caption="percent, and tokens; 95% intervals by paired bootstrap over problems",
    )
    table.add_column("")
    for heading in ("before", "after", "difference", "95% interval"):
        table.add_column(heading, justify="right", no_wrap=True)
    for key, change in changes.items():
        difference = change.difference
        bounds = [_number(key, bound, "+") for bound in difference.ci95 or ()]
        table.add_row(
            label_of(key),
            _number(key, change.before),
            _number(key, change.after),
            _number(key, difference.value, "+"),
            " to ".join(bounds) or "-",
        )
    return table


def _number(key: str, value: float, sign: str = "") -> str:
    if np.isnan(value):
        return "-"
    return f"{value:{sign},.0f}" if key in LENGTHS else f"{100 * value:{sign}.1f}"


def run_comparison(arguments: argparse.Namespace, console: Terminal) -> None:
    """Prints tables for each run after the first, and the problems that it gained and lost.

    arguments: `parse_comparison`'s.

    Raises ValueError if two runs cannot be compared.
    """
    before, records = read_run(arguments.first), []
    for other in arguments.others:
        after = read_run(other)
        check_pairs(arguments.first, other, before, after)
        differences, macro = compare(before, after)
        found = notes(before, after)
        shorter = shortenings(arguments.first, other, before, after)
        for note in [*(f"{arguments.first} and {other} {note}" for note in found), *shorter]:
            console.say(f"note: {note}")
        console.print(_table(arguments.first, other, differences, macro))
        for name, difference in differences.items():
            for label, problems in (("gained", difference.gained), ("lost", difference.lost)):
                if problems:
                    console.say(f"{name}, {label}: {', '.join(problems)}")
            console.print(_length_table(name, difference.lengths))
        record = _record(differences, macro)
        records.append({"run": other, "notes": found, "shortenings": shorter, **record})
    if arguments.json is not None:
        with writing(arguments.json):
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.json, {"first": arguments.first, "others": records})
