"""The results of an evaluation: the printed table, `results.json` and `versions.json`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from paint_engine.evaluation.accuracy import (
    Estimate,
    bootstrap,
    by_problem,
    correct_matrix,
    majority,
    pass_at_k_by_problem,
    pass_ks,
)
from paint_engine.evaluation.lengths import (
    ACCURACY_WITHIN,
    CORRECT_LENGTH,
    CORRECT_MEDIAN,
    LENGTH,
    LENGTHS,
    PER_CORRECT,
    answers_of,
    length_budgets,
    length_estimates,
)
from paint_engine.evaluation.store import EvalSample, Evaluation
from paint_engine.files import (
    VERSIONS_FILE,
    one_line,
    present_versions,
    read_json_if_there,
    write_json,
)
from paint_engine.rewards import DEFAULT_REWARD, has_answers
from paint_engine.rewards.checker import equal_answers

REWARD = "mean_reward"
_LABELS = {
    "format_rate": "answer in a box",
    "truncation_rate": "cut at the limit",
    LENGTH: "tokens, mean",
    CORRECT_LENGTH: "tokens if correct, mean",
    CORRECT_MEDIAN: "tokens if correct, median",
    PER_CORRECT: "tokens per correct answer",
    REWARD: "reward, mean",
}


def measures(
    samples: Sequence[EvalSample], reward_function: str = DEFAULT_REWARD
) -> dict[str, np.ndarray]:
    """Returns (P,) values of each metric, one per problem: fractions, except `mean_reward`.

    With n samples per problem: avg@n, pass@1, pass@2, pass@4, ... pass@n, maj@n, format_rate (share
    of samples with a boxed answer), truncation_rate (share cut at the length limit). maj@n and
    format_rate need a reward function that finds answers. mean_reward is included unless the reward
    is the answer check, whose mean reward is avg@n.
    """
    rows, correct = list(by_problem(samples).values()), correct_matrix(samples)
    num_samples = correct.shape[1]
    truncated = [[sample.truncated for sample in row] for row in rows]
    found = {
        f"avg@{num_samples}": correct.mean(axis=1),
        **{f"pass@{k}": pass_at_k_by_problem(correct, k) for k in pass_ks(num_samples)},
    }
    if has_answers(reward_function):
        votes = [majority(row, equal_answers) for row in rows]
        boxed = [[sample.extracted is not None for sample in row] for row in rows]
        found |= {f"maj@{num_samples}": np.array(votes), "format_rate": np.mean(boxed, axis=1)}
    if reward_function != DEFAULT_REWARD:
        rewards = [[s.correct if s.reward is None else s.reward for s in row] for row in rows]
        found[REWARD] = np.mean(rewards, axis=1)
    return found | {"truncation_rate": np.mean(truncated, axis=1)}


def summarise_benchmarks(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """Returns the keys `benchmarks` and `macro` (the unweighted mean over benchmarks) of
    `results.json`.

    evaluations: at least one, all with the same settings.
    """
    found = {e.header.benchmark: measures(e.samples, e.reward_function) for e in evaluations}
    answers = [answers_of(by_problem(e.samples).values()) for e in evaluations]
    budgets, benchmarks = length_budgets(evaluations[0].settings["max_new_tokens"]), {}
    for evaluation, group in zip(evaluations, answers, strict=True):
        name, samples = evaluation.header.benchmark, evaluation.samples
        benchmarks[name] = {
            "num_problems": len(evaluation.header.problems),
            "num_samples": evaluation.settings["num_samples"],
            "checker_errors": sum(sample.error is not None for sample in samples),
            "seconds": evaluation.seconds,
            **{key: _entry(bootstrap([values])) for key, values in found[name].items()},
            **_entries(length_estimates([group], budgets)),
        }
    names = next(iter(found.values()))
    macro = {key: _entry(bootstrap([of[key] for of in found.values()])) for key in names}
    macro |= _entries(length_estimates(answers, budgets))
    return {"benchmarks": benchmarks, "macro": macro}


def _entry(estimate: Estimate) -> dict[str, Any]:
    return {"value": estimate.known, "ci95": estimate.ci95}


def _entries(estimates: Mapping[str, Estimate]) -> dict[str, dict[str, Any]]:
    return {key: _entry(estimate) for key, estimate in estimates.items()}


def read_versions(directory: Path) -> list[dict[str, Any]]:
    """Returns the entries of a directory's `versions.json`, oldest first; empty if there is
    none. Raises BadFile and ReadFailed."""
    return read_json_if_there(directory / VERSIONS_FILE, list[dict[str, Any]]) or []


def add_versions(directory: Path, num_processes: int) -> None:
    """Adds the present versions to `versions.json`, unless it has an equal entry. The main rank
    calls it before it samples."""
    earlier = read_versions(directory)
    now = present_versions("evaluate", num_processes)
    if now not in earlier:
        write_json(directory / VERSIONS_FILE, [*earlier, now])


def results_table(results: Mapping[str, Any]) -> Table:
    """Returns a table with one column per benchmark, and one for the mean of several; 95% intervals
    in brackets."""
    benchmarks = results["benchmarks"]
    columns = dict(benchmarks)
    if len(benchmarks) > 1:
        columns["macro"] = results["macro"]
    table = Table(caption="percent, with 95% intervals\nby bootstrap over problems")
    table.add_column("")
    for name in columns:
        table.add_column(one_line(name), justify="right", no_wrap=True)
    for key in results["macro"]:
        table.add_row(label_of(key), *(_cell(key, column[key]) for column in columns.values()))
    for key, label in (("num_problems", "problems"), ("checker_errors", "answers not checked")):
        counts = [str(column[key]) for column in benchmarks.values()]
        table.add_row(label, *counts, *[""] * (len(columns) - len(benchmarks)))
    return table


def label_of(key: str) -> str:
    """Returns the label of a metric in the printed tables."""
    if key.startswith(ACCURACY_WITHIN):
        return f"correct within {int(key.removeprefix(ACCURACY_WITHIN)):,} tokens"
    return _LABELS.get(key, key[:1].upper() + key[1:] if key.startswith("avg") else key)


def _cell(key: str, entry: Mapping[str, Any]) -> str:
    form, scale = ("{:,.0f}", 1) if key in LENGTHS else ("{:.1f}", 100)
    if key == REWARD:
        form, scale = "{:.3f}", 1
    if entry["value"] is None:
        return "-"
    value = form.format(scale * entry["value"])
    if entry["ci95"] is None:
        return value
    low, high = (form.format(scale * bound) for bound in entry["ci95"])
    return f"{value} [{low}, {high}]"
