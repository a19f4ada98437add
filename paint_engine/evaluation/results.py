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

LENGTH = "mean_length"
REWARD = "mean_reward"
_LABELS = {
    "format_rate": "answer in a box",
    "truncation_rate": "cut at the limit",
    LENGTH: "tokens, mean",
    REWARD: "reward, mean",
}


def measures(
    samples: Sequence[EvalSample], reward_function: str = DEFAULT_REWARD
) -> dict[str, np.ndarray]:
    """Returns (P,) values of each metric, one per problem: fractions, except `mean_length` in
    tokens and `mean_reward`.

    With n samples per problem: avg@n, pass@1, pass@2, pass@4, ... pass@n, maj@n, format_rate (share
    of samples with a boxed answer), truncation_rate (share cut at the length limit), mean_length.
    maj@n and format_rate need a reward function that finds answers. mean_reward is included unless
    the reward is the answer check, whose mean reward is avg@n.
    """
    rows, correct = list(by_problem(samples).values()), correct_matrix(samples)
    num_samples = correct.shape[1]
    truncated = [[sample.truncated for sample in row] for row in rows]
    lengths = [[sample.num_tokens for sample in row] for row in rows]
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
    return found | {
        "truncation_rate": np.mean(truncated, axis=1),
        LENGTH: np.mean(lengths, axis=1),
    }


def summarise_benchmarks(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """Returns the keys `benchmarks` and `macro` (the unweighted mean over benchmarks) of
    `results.json`.

    evaluations: at least one, all with the same settings.
    """
    found = {e.header.benchmark: measures(e.samples, e.reward_function) for e in evaluations}
    benchmarks = {}
    for evaluation in evaluations:
        name, samples = evaluation.header.benchmark, evaluation.samples
        benchmarks[name] = {
            "num_problems": len(evaluation.header.problems),
            "num_samples": evaluation.settings["num_samples"],
            "checker_errors": sum(sample.error is not None for sample in samples),
            "seconds": evaluation.seconds,
            **{key: _entry(bootstrap([values])) for key, values in found[name].items()},
        }
    names = next(iter(found.values()))
    macro = {key: _entry(bootstrap([of[key] for of in found.values()])) for key in names}
    return {"benchmarks": benchmarks, "macro": macro}


def _entry(estimate: Estimate) -> dict[str, Any]:
    return {"value": estimate.value, "ci95": [estimate.low, estimate.high]}


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
        label = _LABELS.get(key, key[:1].upper() + key[1:] if key.startswith("avg") else key)
        table.add_row(label, *(_cell(key, column[key]) for column in columns.values()))
    for key, label in (("num_problems", "problems"), ("checker_errors", "answers not checked")):
        counts = [str(column[key]) for column in benchmarks.values()]
        table.add_row(label, *counts, *[""] * (len(columns) - len(benchmarks)))
    return table


def _cell(key: str, entry: Mapping[str, Any]) -> str:
    low, high = entry["ci95"]
    if key == LENGTH:
        return f"{entry['value']:,.0f} [{low:,.0f}, {high:,.0f}]"
    if key == REWARD:
        return f"{entry['value']:.3f} [{low:.3f}, {high:.3f}]"
    return f"{100 * entry['value']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
