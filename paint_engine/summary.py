"""What a run came to: `summary.json` and the lines printed at its end."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from paint_engine.evaluate import (
    Evaluation,
    avg_at_k,
    correct_matrix,
    evaluation_settings,
    paired_bootstrap,
    pass_at_k,
    read_evaluations,
)
from paint_engine.report import SUMMARY_FILE
from paint_engine.setup import Run


def best_step(evaluations: Mapping[int, Evaluation]) -> int | None:
    """The training step with the highest Avg@k, of equals the later one; None where there is
    none."""
    averages = {
        step: avg_at_k(correct_matrix(evaluation.samples))
        for step, evaluation in evaluations.items()
        if step > 0
    }
    return max(averages, key=lambda step: (averages[step], step), default=None)


def summarise(run: Run) -> dict[str, Any]:
    """Writes and returns `summary.json`: Avg@k before and after on the same problems, the best
    evaluation in between, and what it took. Evaluations with other settings are left out."""
    settings = evaluation_settings(run.config.eval, run.config.train.seed)
    complete = read_evaluations(run.run_dir)
    correct = {
        step: correct_matrix(evaluation.samples)
        for step, evaluation in complete.items()
        if evaluation.settings == settings
    }
    averages = {step: avg_at_k(matrix) for step, matrix in correct.items()}
    passes = {step: pass_at_k(matrix) for step, matrix in correct.items()}
    last = run.config.train.num_steps
    paired = None
    if 0 in correct and last in correct:
        paired = paired_bootstrap(correct[0], correct[last])
    best = best_step({step: complete[step] for step in correct})
    num_problems, num_samples = next(iter(correct.values())).shape if correct else (0, 0)
    seconds_eval = sum(evaluation.seconds for evaluation in complete.values())
    summary = {
        "avg_at_k_before": averages.get(0),
        "avg_at_k_after": averages.get(last),
        "paired_difference": paired.difference if paired else None,
        "paired_difference_ci95": [paired.low, paired.high] if paired else None,
        "pass_at_k_before": passes.get(0),
        "pass_at_k_after": passes.get(last),
        "evaluations": [{"step": step, "avg_at_k": value} for step, value in averages.items()],
        "best_step": best,
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
    (run.run_dir / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def print_summary(console: Console, summary: dict[str, Any], report: Path) -> None:
    """The summary in a few lines."""
    for moment in ("before", "after"):
        if (value := summary[f"avg_at_k_{moment}"]) is not None:
            label = f"Avg@{summary['num_samples']} {moment}:"
            console.print(f"{label:15}{value:.1%}  ({summary['num_problems']} held-out problems)")
    if summary["paired_difference"] is not None:
        low, high = (100 * bound for bound in summary["paired_difference_ci95"])
        difference = f"{100 * summary['paired_difference']:+.1f} points"
        console.print(f"difference:    {difference}  (95% interval {low:+.1f} to {high:+.1f})")
    if summary["best_step"] not in (None, summary["num_steps"]):
        best = {row["step"]: row["avg_at_k"] for row in summary["evaluations"]}
        step = summary["best_step"]
        console.print(f"best:          {best[step]:.1%} after {step} steps")
    console.print(
        f"time:          {summary['seconds']:.0f} s ({summary['seconds_train']:.0f} s for "
        f"{summary['num_steps']} steps, {summary['seconds_eval']:.0f} s for evaluation)"
    )
    console.print(f"run directory: {summary['run_dir']}\nreport:        {report}", soft_wrap=True)
