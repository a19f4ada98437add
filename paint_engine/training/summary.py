"""The summary of a run: `summary.json` and the lines printed at the end."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paint_engine.evaluation.accuracy import (
    Estimate,
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
from paint_engine.files import SUMMARY_FILE, one_line, write_json
from paint_engine.files.terminal import Terminal
from paint_engine.monitor import (
    EVAL_PREFIX,
    FALL,
    Sample,
    Shortening,
    compare_lengths,
    joined,
    lengths_of,
)
from paint_engine.training.run import Run
from paint_engine.types import Problem

Evaluations = Mapping[int, Mapping[str, Evaluation]]
"""by step and benchmark"""


def current_evaluations(
    run: Run, complete: Evaluations | None = None, *, final: bool = False
) -> dict[int, dict[str, Evaluation]]:
    """Returns the run's complete evaluations by step and benchmark that have the current
    settings, benchmarks and problems.

    complete: all complete evaluations; None reads them from the disk.
    final: those by the full protocol, in place of those during training.
    """
    config = run.config
    if complete is None:
        complete = read_evaluations(run.run_dir, final=final)
    settings = evaluation_settings(
        run.eval_section(final=final), run.eval_seed, config.eval_prompts, config.reward.function
    )
    problems = {name: fingerprints(held_out.problems) for name, held_out in run.eval_sets.items()}

    def is_current(name: str, evaluation: Evaluation) -> bool:
        if evaluation.settings != settings:
            return False
        return not problems or problems.get(name) == evaluation.header.problems

    return {
        step: kept
        for step, found in complete.items()
        if (kept := {name: one for name, one in found.items() if is_current(name, one)})
    }


def present_evaluations(
    run: Run, complete: Evaluations | None = None, *, final: bool = False
) -> dict[int, dict[str, Evaluation]]:
    """Returns `current_evaluations` of the steps that are evaluated on every benchmark: only these
    can be compared."""
    current = current_evaluations(run, complete, final=final)
    names = run.eval_sets.keys() or {name for found in current.values() for name in found}
    return {
        step: {name: found[name] for name in names}
        for step, found in current.items()
        if found.keys() >= names
    }


def summarise(run: Run) -> dict[str, Any]:
    """Writes and returns `summary.json`: Avg@k before and after training on the same problems, the
    best evaluation in between, where completions became a quarter shorter, and the time taken.
    Evaluations with other settings are left out. With several benchmarks, the numbers are their
    macro averages, and each benchmark's are in the evaluations.

    `best` is selected on the problems that it is measured on, so it is biased upwards; `last` is
    not."""
    complete, finals = read_evaluations(run.run_dir), read_evaluations(run.run_dir, final=True)
    present = present_evaluations(run, complete)
    evaluations = [evaluation_row(step, found) for step, found in present.items()]
    rows, last = {row["step"]: row for row in evaluations}, run.config.train.num_steps
    best = best_step(present)
    trained = [row for row in evaluations if row["step"] > 0]
    shapes = [
        correct_matrix(one.samples).shape for one in next(iter(present.values()), {}).values()
    ]
    num_samples = shapes[0][1] if shapes else 0
    everything = (*complete.values(), *finals.values())
    seconds_eval = sum(one.seconds for found in everything for one in found.values())

    def of(step: int, key: str) -> Any:
        return rows[step][key] if step in rows else None

    passes = {step: of(step, "pass_at_k") for step in (0, last)}
    difference = paired_difference(present[0], present[last]) if {0, last} <= rows.keys() else None
    summary = {
        "avg_at_k_before": of(0, "avg_at_k"),
        "avg_at_k_after": of(last, "avg_at_k"),
        "paired_difference": difference and difference.value,
        "paired_difference_ci95": difference and difference.ci95,
        "pass_at_k_before": passes[0] and passes[0][str(num_samples)],
        "pass_at_k_after": passes[last] and passes[last][str(num_samples)],
        "evaluations": evaluations,
        "best": next((row for row in trained if row["step"] == best), None),
        "last": trained[-1] if trained else None,
        "best_step": best,
        "shortenings": [
            shortening.model_dump() | {"note": shortening.note}
            for shortening in (*evaluation_shortenings(present), *run.shortening.found)
        ],
        "num_problems": sum(num_problems for num_problems, _ in shapes),
        "num_samples": num_samples,
        "max_new_tokens": run.config.eval.max_new_tokens,
        "final": _summarise_final(run, finals, best),
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


def _summarise_final(run: Run, complete: Evaluations, best: int | None) -> dict[str, Any] | None:
    """Returns the numbers by the full protocol, of the base, the last step and the one that was
    best by the evaluations during training; None where they were evaluated by no other one.

    complete: the evaluations by the full protocol.
    """
    section = run.config.eval.final
    if section is None:
        return None
    present = present_evaluations(run, complete, final=True)
    if not present:
        return None
    rows, last = {step: evaluation_row(step, found) for step, found in present.items()}, run.step
    difference = paired_difference(present[0], present[last]) if {0, last} <= rows.keys() else None
    return {
        "num_samples": section.num_samples,
        "max_new_tokens": section.max_new_tokens,
        "base": rows.get(0),
        "last": rows.get(last),
        "best": None if best is None else rows.get(best),
        "paired_difference": difference and difference.value,
        "paired_difference_ci95": difference and difference.ci95,
    }


def paired_difference(
    before: Mapping[str, Evaluation], after: Mapping[str, Evaluation]
) -> Estimate:
    """Returns the macro average of Avg@k after - before, with its interval.

    before, after: of the same problems in the same order, by benchmark.
    """
    return paired_bootstrap(
        *(
            (correct_matrix(first.samples), correct_matrix(after[name].samples))
            for name, first in before.items()
        )
    )


def evaluation_row(step: int, evaluations: Mapping[str, Evaluation]) -> dict[str, Any]:
    """Returns the numbers of the evaluation after `step` steps: accuracies, accuracy by length
    budget, and lengths in tokens, None for those of correct answers where there are none.

    evaluations: by benchmark. Of several, the numbers are the unweighted means over benchmarks, and
        "benchmarks" has those of each.
    """
    by_name = {name: _numbers(found) for name, found in evaluations.items()}
    if len(by_name) == 1:
        return {"step": step, **next(iter(by_name.values()))}
    return {"step": step, **_mean(list(by_name.values())), "benchmarks": by_name}


def _mean(values: Sequence[Any]) -> Any:
    """The mean of equally shaped numbers; None where one of them is."""
    if isinstance(values[0], dict):
        return {key: _mean([one[key] for one in values]) for key in values[0]}
    return None if None in values else sum(values) / len(values)


def _numbers(evaluation: Evaluation) -> dict[str, Any]:
    matrix = correct_matrix(evaluation.samples)
    budgets = length_budgets(evaluation.settings["max_new_tokens"])
    found = length_statistics(answers_of(by_problem(evaluation.samples).values()), budgets)
    values = {key: float(value[0]) for key, value in found.items()}
    within = {str(budget): values.pop(f"{ACCURACY_WITHIN}{budget}") for budget in budgets}
    return {
        "avg_at_k": avg_at_k(matrix),
        "pass_at_k": {str(k): pass_at_k(matrix, k) for k in pass_ks(matrix.shape[1])},
        "accuracy_within": within,
        **{key: None if math.isnan(value) else value for key, value in values.items()},
        "truncation_rate": sum(s.truncated for s in evaluation.samples) / matrix.size,
    }


def evaluation_metrics(step: int, evaluations: Mapping[str, Evaluation]) -> dict[str, float]:
    """Returns the numbers of `evaluation_row` as metrics, `eval_avg_at_k` for one, without those
    that no correct answer gives. Of several benchmarks, these are the means, and
    `eval_NAME_avg_at_k` is that of benchmark NAME."""
    row = evaluation_row(step, evaluations)
    by_name, metrics = row.pop("benchmarks", {}), {"step": row.pop("step")}
    metrics |= _metrics_of(row, EVAL_PREFIX)
    for name, numbers in by_name.items():
        metrics |= _metrics_of(numbers, f"{EVAL_PREFIX}{name}_")
    return metrics


def _metrics_of(numbers: Mapping[str, Any], prefix: str) -> dict[str, float]:
    flat = {key: value for key, value in numbers.items() if not isinstance(value, dict)}
    flat |= {
        f"{ACCURACY_WITHIN}{budget}": share for budget, share in numbers["accuracy_within"].items()
    }
    flat |= {f"pass_at_{k}": share for k, share in numbers["pass_at_k"].items()}
    return {f"{prefix}{key}": value for key, value in flat.items() if value is not None}


def evaluation_samples(
    evaluations: Mapping[str, Evaluation], problems: Mapping[str, Sequence[Problem]], count: int
) -> list[Sample]:
    """Returns what loggers show of an evaluation: the first answer to each of the first `count`
    problems of every benchmark, the same problems in each evaluation of a run.

    evaluations, problems: by benchmark.
    """
    rows: list[Sample] = []
    for name, evaluation in evaluations.items():
        firsts = {s.problem_id: s for s in evaluation.samples if s.sample_index == 0}
        for problem in problems[name][:count]:
            sample = firsts[problem.problem_id]
            rows.append(
                {
                    "benchmark": name,
                    "problem_id": problem.problem_id,
                    "problem": problem.problem,
                    "reference": problem.answer,
                    "correct": sample.correct,
                    "extracted": sample.extracted,
                    "num_tokens": sample.num_tokens,
                    "truncated": sample.truncated,
                    "text": sample.text,
                }
            )
    return rows


def evaluation_shortenings(evaluations: Evaluations) -> list[Shortening]:
    """Returns the evaluations whose answers, to all benchmarks together, are a quarter shorter than
    the base's, in the order of steps. Empty without an evaluation of the base."""
    if 0 not in evaluations:
        return []
    lengths = {
        step: joined(
            [lengths_of((s.num_tokens, s.truncated) for s in one.samples) for one in found.values()]
        )
        for step, found in evaluations.items()
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
    final = summary["final"]
    if final is not None and summary["evaluations"]:
        console.print(f"during training, {_protocol(summary)}:")
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
            for benchmark, numbers in summary[name].get("benchmarks", {}).items():
                console.print(f"  {one_line(benchmark) + ':':13}{numbers['avg_at_k']:.1%}")
    if final is not None:
        _print_final(console, final)
    console.print(
        f"time:          {summary['seconds']:.0f} s ({summary['seconds_train']:.0f} s for "
        f"{summary['num_steps']} steps, {summary['seconds_eval']:.0f} s for evaluation)"
    )
    console.say(f"run directory: {summary['run_dir']}")
    if report is not None:
        console.say(f"report:        {report}")


def _protocol(budget: Mapping[str, Any]) -> str:
    return f"Avg@{budget['num_samples']} with at most {budget['max_new_tokens']:,} tokens"


def _print_final(console: Terminal, final: Mapping[str, Any]) -> None:
    """Prints the numbers by the full protocol, under a heading of their own."""
    console.print(f"after training, {_protocol(final)}, not comparable with those above:")
    for name in ("base", "last", "best"):
        if (row := final[name]) is None:
            continue
        step = f"  (step {row['step']})" if row["step"] else ""
        console.print(f"  {name + ':':13}{row['avg_at_k']:.1%}{step}")
        for benchmark, numbers in row.get("benchmarks", {}).items():
            console.print(f"    {one_line(benchmark) + ':':11}{numbers['avg_at_k']:.1%}")
    if final["paired_difference"] is not None:
        low, high = (100 * bound for bound in final["paired_difference_ci95"])
        difference = f"{100 * final['paired_difference']:+.1f} points"
        console.print(f"  difference:  {difference}  (95% interval {low:+.1f} to {high:+.1f})")
