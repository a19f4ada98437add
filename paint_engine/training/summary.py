"""The summary of a run: `summary.json` and the lines printed at the end."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paint_engine.evaluation.accuracy import (
    avg_at_k,
    best_step,
    by_problem,
    correct_matrix,
    paired_bootstrap,
    pass_at_k,
    pass_ks,
)
from paint_engine.evaluation.lengths import (
    ACCURACY_WITHIN,
    answers_of,
    length_budgets,
    length_statistics,
)
from paint_engine.evaluation.store import (
    Evaluation,
    evaluation_settings,
    fingerprints,
    read_evaluations,
)
from paint_engine.files import SUMMARY_FILE, write_json
from paint_engine.files.terminal import Terminal
from paint_engine.monitor import EVAL_PREFIX, FALL, Shortening, compare_lengths, lengths_of
from paint_engine.training.run import Run


def present_evaluations(
    run: Run, complete: Mapping[int, Evaluation] | None = None
) -> dict[int, Evaluation]:
    """Returns the run's complete evaluations by step that have the current settings and problems.

    complete: all complete evaluations; None reads them from the disk.
    """
    section, seed = run.config.eval, run.config.train.seed
    if complete is None:
        complete = read_evaluations(run.run_dir)
    settings = evaluation_settings(section, seed, run.config.prompts, run.config.reward.function)
    problems = None if run.eval_set is None else fingerprints(run.eval_set.problems)
    return {
        step: found
        for step, found in complete.items()
        if found.settings == settings and problems in (None, found.header.problems)
    }


def summarise(run: Run) -> dict[str, Any]:
    """Writes and returns `summary.json`: Avg@k before and after training on the same problems, the
    best evaluation in between, where completions became a quarter shorter, and the time taken.
    Evaluations with other settings are left out.

    `best` is selected on the problems that it is measured on, so it is biased upwards; `last` is
    not."""
    complete = read_evaluations(run.run_dir)
    present = present_evaluations(run, complete)
    correct = {step: correct_matrix(found.samples) for step, found in present.items()}
    evaluations = [evaluation_row(step, found) for step, found in present.items()]
    averages = {row["step"]: row["avg_at_k"] for row in evaluations}
    passes = {step: pass_at_k(matrix, matrix.shape[1]) for step, matrix in correct.items()}
    last = run.config.train.num_steps
    paired = None
    if 0 in correct and last in correct:
        paired = paired_bootstrap(correct[0], correct[last])
    best = best_step(present)
    trained = [row for row in evaluations if row["step"] > 0]
    num_problems, num_samples = next(iter(correct.values())).shape if correct else (0, 0)
    seconds_eval = sum(found.seconds for found in complete.values())
    summary = {
        "avg_at_k_before": averages.get(0),
        "avg_at_k_after": averages.get(last),
        "paired_difference": paired.value if paired else None,
        "paired_difference_ci95": [paired.low, paired.high] if paired else None,
        "pass_at_k_before": passes.get(0),
        "pass_at_k_after": passes.get(last),
        "evaluations": evaluations,
        "best": next((row for row in trained if row["step"] == best), None),
        "last": trained[-1] if trained else None,
        "best_step": best,
        "shortenings": [
            shortening.model_dump() | {"note": shortening.note}
            for shortening in (*evaluation_shortenings(present), *run.shortening.found)
        ],
        "num_problems": num_problems,
        "num_samples": num_samples,
        "seconds": run.seconds_train + seconds_eval,
        "seconds_train": run.seconds_train,
        "seconds_eval": seconds_eval,
        "num_steps": run.step,
        "num_rows_skipped": run.train_set.num_skipped,
        "seed": run.config.train.seed,
        "preset": run.name,
        "run_dir": str(run.run_dir),
    }
    write_json(run.run_dir / SUMMARY_FILE, summary)
    return summary


def evaluation_row(step: int, evaluation: Evaluation) -> dict[str, Any]:
    """Returns the numbers of one evaluation: accuracies, accuracy by length budget, and lengths in
    tokens, None for those of correct answers where there are none."""
    matrix = correct_matrix(evaluation.samples)
    budgets = length_budgets(evaluation.settings["max_new_tokens"])
    found = length_statistics(answers_of(by_problem(evaluation.samples).values()), budgets)
    values = {key: float(value[0]) for key, value in found.items()}
    within = {str(budget): values.pop(f"{ACCURACY_WITHIN}{budget}") for budget in budgets}
    return {
        "step": step,
        "avg_at_k": avg_at_k(matrix),
        "pass_at_k": {str(k): pass_at_k(matrix, k) for k in pass_ks(matrix.shape[1])},
        "accuracy_within": within,
        **{key: None if math.isnan(value) else value for key, value in values.items()},
        "truncation_rate": sum(s.truncated for s in evaluation.samples) / matrix.size,
    }


def evaluation_metrics(step: int, evaluation: Evaluation) -> dict[str, float]:
    """Returns the numbers of `evaluation_row` as metrics, `eval_avg_at_k` for one, without those
    that no correct answer gives."""
    row = evaluation_row(step, evaluation)
    within, passes = row.pop("accuracy_within"), row.pop("pass_at_k")
    row |= {f"{ACCURACY_WITHIN}{budget}": share for budget, share in within.items()}
    row |= {f"pass_at_{k}": share for k, share in passes.items()}
    numbers = {f"{EVAL_PREFIX}{name}": value for name, value in row.items() if name != "step"}
    return {"step": step, **{name: n for name, n in numbers.items() if n is not None}}


def evaluation_shortenings(evaluations: Mapping[int, Evaluation]) -> list[Shortening]:
    """Returns the evaluations whose answers are a quarter shorter than the base's, in the order of
    steps. Empty without an evaluation of the base."""
    if 0 not in evaluations:
        return []
    lengths = {
        step: lengths_of((s.num_tokens, s.truncated) for s in evaluation.samples)
        for step, evaluation in evaluations.items()
    }
    base = lengths.pop(0)
    changes = [
        compare_lengths(
            base, now, step=step, what=f"the answers after {step} steps", than="the base's"
        )
        for step, now in lengths.items()
    ]
    return [change for change in changes if change is not None and change.fall >= FALL]


def print_summary(console: Terminal, summary: dict[str, Any], report: Path | None) -> None:
    """Prints the summary in a few lines."""
    for moment in ("before", "after"):
        if (value := summary[f"avg_at_k_{moment}"]) is not None:
            label = f"Avg@{summary['num_samples']} {moment}:"
            console.print(f"{label:15}{value:.1%}  ({summary['num_problems']} held-out problems)")
    if summary["paired_difference"] is not None:
        low, high = (100 * bound for bound in summary["paired_difference_ci95"])
        difference = f"{100 * summary['paired_difference']:+.1f} points"
        console.print(f"difference:    {difference}  (95% interval {low:+.1f} to {high:+.1f})")
    for name in ("best", "last"):
        if summary[name] is not None:
            step = summary[name]["step"]
            value = f"{summary[name]['avg_at_k']:.1%}"
            console.print(f"{name + ':':15}{value}  (Avg@{summary['num_samples']}, step {step})")
    console.print(
        f"time:          {summary['seconds']:.0f} s ({summary['seconds_train']:.0f} s for "
        f"{summary['num_steps']} steps, {summary['seconds_eval']:.0f} s for evaluation)"
    )
    console.say(f"run directory: {summary['run_dir']}")
    if report is not None:
        console.say(f"report:        {report}")
