"""Table 1 by its protocol: checkpoints of runs on several benchmarks, by several decoding seeds.

The paper's rows are not all the same kind of number, so each kind has its own name here: a step's
macro average, the step that is best by one benchmark or by the macro average, and the maximum of
each benchmark over the steps, which mixes steps and is what the paper's OPSD row is.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from paint_engine.checkpoint.directory import checkpoint_step, list_checkpoints
from paint_engine.distributed import World, barrier, init_world
from paint_engine.evaluation.accuracy import Estimate, bootstrap, by_problem, correct_matrix
from paint_engine.evaluation.flags import Table1Command
from paint_engine.evaluation.plan import make_plan, with_seed
from paint_engine.evaluation.run import ends_with_one_message, evaluate_plan, opened
from paint_engine.evaluation.store import Evaluation
from paint_engine.files import one_line, write_json, writing
from paint_engine.files.terminal import Terminal
from paint_engine.model import pick_device

Results = Mapping[int, Mapping[int, Mapping[str, Evaluation]]]
"""the evaluations of a run by step (0 = the base), decoding seed and benchmark"""


@dataclass(frozen=True)
class Score:
    """Avg@k on one benchmark, or the macro average, as fractions.

    estimate: the mean over the decoding seeds, with its interval by bootstrap over problems.
    seeds: Avg@k by decoding seed.
    """

    estimate: Estimate
    seeds: Mapping[int, float]

    @property
    def value(self) -> float:
        """The mean over the decoding seeds."""
        return self.estimate.value

    @property
    def deviation(self) -> float | None:
        """The standard deviation between decoding seeds (with n - 1); None for one seed."""
        values = list(self.seeds.values())
        return float(np.std(values, ddof=1)) if len(values) > 1 else None

    def record(self) -> dict[str, Any]:
        """Returns the score as JSON has it."""
        return {
            "value": self.value,
            "ci95": self.estimate.ci95,
            "seeds": {str(seed): value for seed, value in self.seeds.items()},
            "deviation": self.deviation,
        }


@dataclass(frozen=True)
class Row:
    """One step: its score on each benchmark, and their unweighted mean."""

    step: int
    benchmarks: Mapping[str, Score]
    macro: Score

    def record(self) -> dict[str, Any]:
        """Returns the row as JSON has it."""
        scores = {name: score.record() for name, score in self.benchmarks.items()}
        return {"step": self.step, "benchmarks": scores, "macro": self.macro.record()}


@dataclass(frozen=True)
class Maximum:
    """The highest Avg@k of each benchmark over the steps, and the mean of these.

    It is no model's result: each benchmark may be of another step, chosen on its own problems.

    steps: which step each is of.
    """

    benchmarks: Mapping[str, float]
    steps: Mapping[str, int]

    @property
    def macro(self) -> float:
        """The unweighted mean of the maxima."""
        return sum(self.benchmarks.values()) / len(self.benchmarks)


def score_step(step: int, by_seed: Mapping[int, Mapping[str, Evaluation]]) -> Row:
    """Returns the scores of one step.

    by_seed: its evaluations by decoding seed and benchmark, all with the same benchmarks and
        problems.
    """
    names = list(next(iter(by_seed.values())))
    per_problem: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for found in by_seed.values():
        for name in names:
            per_problem[name].append(correct_matrix(found[name].samples).mean(axis=1))
    means = {name: np.mean(rows, axis=0) for name, rows in per_problem.items()}
    values = {
        name: {seed: float(row.mean()) for seed, row in zip(by_seed, rows, strict=True)}
        for name, rows in per_problem.items()
    }
    scores = {name: Score(bootstrap([means[name]]), values[name]) for name in names}
    macros = {seed: sum(values[name][seed] for name in names) / len(names) for seed in by_seed}
    return Row(step, scores, Score(bootstrap(list(means.values())), macros))


def best_row(rows: Sequence[Row], score: Callable[[Row], float]) -> Row:
    """Returns the row of the trained step with the highest score, the later one of a tie."""
    return max((row for row in rows if row.step > 0), key=lambda row: (score(row), row.step))


def maximum_per_benchmark(rows: Sequence[Row]) -> Maximum:
    """Returns the maxima over the trained steps."""
    best = {
        name: best_row(rows, lambda row, name=name: row.benchmarks[name].value)
        for name in rows[0].benchmarks
    }
    return Maximum(
        {name: row.benchmarks[name].value for name, row in best.items()},
        {name: row.step for name, row in best.items()},
    )


def summarise_run(results: Results) -> dict[str, Any]:
    """Returns what `--json` has of one run: each step, and every way to choose one by its name.

    last: the last step, which is chosen without looking at any accuracy.
    best_by_macro: the step that is best by the macro average.
    best_by_benchmark: for each benchmark, the step that is best on it, with that step's numbers on
        all benchmarks.
    maximum_per_benchmark: the maxima of the benchmarks, each over all steps. These and the best
        steps are chosen on the problems that they are measured on, so they are biased upwards.
    """
    rows = [score_step(step, by_seed) for step, by_seed in sorted(results.items())]
    maximum, names = maximum_per_benchmark(rows), list(rows[0].benchmarks)
    by_benchmark = {
        name: best_row(rows, lambda row, name=name: row.benchmarks[name].value) for name in names
    }
    first = next(iter(next(iter(results.values())).values()))
    return {
        "num_samples": next(iter(first.values())).settings["num_samples"],
        "num_problems": {name: len(by_problem(one.samples)) for name, one in first.items()},
        "steps": [row.record() for row in rows],
        "last": rows[-1].record(),
        "best_by_macro": best_row(rows, lambda row: row.macro.value).record(),
        "best_by_benchmark": {name: row.record() for name, row in by_benchmark.items()},
        "maximum_per_benchmark": {
            "benchmarks": dict(maximum.benchmarks),
            "steps": dict(maximum.steps),
            "macro": maximum.macro,
        },
    }


def step_table(run: str, summary: Mapping[str, Any]) -> Table:
    """Returns the printed table of every step of `summarise_run`."""
    names = list(summary["num_problems"])
    table = Table(
        title=one_line(f"{run}: Avg@{summary['num_samples']} in percent"),
        caption="brackets: 95% intervals by bootstrap over problems;\n"
        "\N{PLUS-MINUS SIGN}: standard deviation between decoding seeds",
    )
    for heading in ("step", *map(one_line, names), "macro"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in summary["steps"]:
        table.add_row(str(row["step"]) if row["step"] else "base", *map(_cell, _scores(row, names)))
    return table


def choice_table(summary: Mapping[str, Any]) -> Table:
    """Returns the printed table of every way to choose a step of `summarise_run`."""
    names, maximum = list(summary["num_problems"]), summary["maximum_per_benchmark"]
    table = Table(
        caption="chosen on the problems that they are measured on,\n"
        "and so biased upwards, all but the last step",
    )
    table.add_column("")
    for heading in ("step", *map(one_line, names), "macro"):
        table.add_column(heading, justify="right")
    chosen = {
        "last step": summary["last"],
        "best step by macro average": summary["best_by_macro"],
        **{f"best step by {one_line(n)}": row for n, row in summary["best_by_benchmark"].items()},
    }
    for label, row in chosen.items():
        values = [score["value"] for score in _scores(row, names)]
        table.add_row(label, str(row["step"]), *(f"{100 * value:.1f}" for value in values))
    table.add_row(
        "maximum of each benchmark",
        ", ".join(str(maximum["steps"][name]) for name in names),
        *(f"{100 * maximum['benchmarks'][name]:.1f}" for name in names),
        f"{100 * maximum['macro']:.1f}",
    )
    return table


def _scores(row: Mapping[str, Any], names: Sequence[str]) -> list[Mapping[str, Any]]:
    return [*(row["benchmarks"][name] for name in names), row["macro"]]


def _cell(score: Mapping[str, Any]) -> str:
    low, high = (100 * bound for bound in score["ci95"])
    deviation = score["deviation"]
    spread = "" if deviation is None else f" \N{PLUS-MINUS SIGN}{100 * deviation:.1f}"
    # Two lines, so that four of them fit in 80 columns.
    return f"{100 * score['value']:.1f}{spread}\n[{low:.1f}, {high:.1f}]"


def steps_of(run_dir: Path, wanted: Sequence[int] | None) -> list[int]:
    """Returns the steps of the run's checkpoints that are evaluated.

    wanted: None = all.

    Raises ValueError where the run has no such checkpoint.
    """
    there = sorted(map(checkpoint_step, list_checkpoints(run_dir))) if run_dir.is_dir() else []
    if not there:
        raise ValueError(
            f"{run_dir}: no checkpoint to evaluate; needs a training run's directory, which holds "
            "checkpoints/step-N"
        )
    missing = [step for step in wanted or () if step not in there]
    if missing:
        raise ValueError(
            f"--steps: {run_dir} has no checkpoint of step {', '.join(map(str, missing))}; it has "
            f"{', '.join(map(str, there))}; give some of these, or train with checkpoint.every and "
            "checkpoint.keep so that the others are kept"
        )
    return there if wanted is None else sorted(set(wanted))


def run_table1(command: Table1Command, console: Terminal) -> None:
    """Evaluates every checkpoint with every seed, where that is not done yet; prints a table for
    each run, and writes them to `--json`.

    Each evaluation has a directory of its own, as `--adapter` gives it: it is resumed by the same
    command, found again by `--adapter`, and can be compared.

    Raises ValueError, in terms of this command's flags, for a user's mistake. Ends the program as
    `run_evaluation` does.
    """
    summaries = {}
    with ends_with_one_message(console.say):
        world = init_world(pick_device(command.arguments.device))
        steps = {run: steps_of(Path(run), command.steps) for run in command.runs}
        said: set[str] = set()

        def say_once(text: str) -> None:
            if text not in said:
                said.add(text)
                console.say(text)

        for run, wanted in steps.items():
            results = {
                step: _evaluate_step(command, run, step, world, console, say_once)
                for step in ([0] if command.base else []) + wanted
            }
            summaries[run] = summarise_run(results)
    if world.is_main:
        for run, summary in summaries.items():
            console.print(step_table(run, summary))
            console.print(choice_table(summary))
        if command.json is not None:
            with writing(command.json):
                command.json.parent.mkdir(parents=True, exist_ok=True)
            write_json(command.json, {"runs": summaries})
    barrier()


def _evaluate_step(
    command: Table1Command,
    run: str,
    step: int,
    world: World,
    console: Terminal,
    say: Callable[[str], object],
) -> dict[int, dict[str, Evaluation]]:
    """Evaluates one checkpoint, or the base, with every seed: one engine answers for all."""
    one = command.of_checkpoint(f"{run}:{step}" if step else run)
    plan = make_plan(one, world, say=say, base_only=step == 0)
    found: dict[int, dict[str, Evaluation]] = {}
    with ExitStack() as stack:
        load = stack.enter_context(opened(plan, world))
        for seed in command.seeds:
            seeded = with_seed(plan, seed, command.arguments.output)
            console.say(f"{_title(run, step)}, seed {seed}")
            evaluations = evaluate_plan(seeded, load, world, console, show=False)
            found[seed] = {one.header.benchmark: one for one in evaluations}
    return found


def _title(run: str, step: int) -> str:
    return f"{run}, step {step}" if step else f"{run}, its base"
