"""The report of a run: one HTML file, built from the files in the run directory.

python -m paint_engine.report RUN_DIR    rebuilds RUN_DIR/report.html

The page loads nothing and runs no script, so it can be mailed, archived and opened from a disk.
Short, unfinished and interrupted runs get a report too; the page says what is missing.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from paint_engine.config.command_line import flatten
from paint_engine.config.toml import LEAVES, flag, recorded_config
from paint_engine.files import (
    CONFIG_FILE,
    METRICS_FILE,
    REPORT_FILE,
    SAMPLES_FILE,
    SUMMARY_FILE,
    check_links,
    shown,
    write_atomic,
)
from paint_engine.monitor import SKIPPED_STEPS
from paint_engine.recipes import Recipe, recipe_of, recipe_that_recorded
from paint_engine.report.figures import draw_curves
from paint_engine.report.kinds import kinds_table
from paint_engine.report.records import (
    read_metrics,
    read_samples,
    read_settings,
    read_summary,
)
from paint_engine.report.samples import (
    COLOR_BOUNDS,
    MAX_ANCHORS,
    MAX_TOKENS,
    ViewSettings,
    choose_samples,
    view_sample,
)

_NONE = "\N{EN DASH}"
# Keys of an evaluation in summary.json, and their headings.
_LENGTHS = {
    "mean_length": "tokens, mean",
    "mean_correct_length": "tokens if correct, mean",
    "median_correct_length": "tokens if correct, median",
    "tokens_per_correct": "tokens per correct answer",
}


def write_report(
    run_dir: Path, recipe: Recipe | None = None, *, trusted: str | None = None
) -> Path:
    """Builds `report.html` from a run directory's files, and returns its path.

    recipe: the run's recipe; None = the one that the directory's configuration names.
    trusted: a recipe of a user's module, "module:Class", whose code may run if the configuration
        names it.

    Raises:
        ValueError: `run_dir` has none of those files, links or others in their place, or names a
            recipe of a user's module that is not `trusted`.
        ReadFailed, WriteFailed: the system refuses a file.
    """
    run = _load(run_dir, recipe, trusted)
    template = resources.files("paint_engine.report").joinpath("template.html")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": _percent, "points": _points, "duration": _duration}
    page = environment.from_string(template.read_text("utf-8")).render(_contents(run))
    path = run_dir / REPORT_FILE
    # A lone surrogate from a data set's escapes has no UTF-8 form, so it becomes a question mark.
    write_atomic(path, page.encode(errors="replace"))
    return path


@dataclass(frozen=True)
class _Run:
    name: str
    recipe: Recipe
    metrics: Sequence[Mapping[str, Any]]
    samples: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any] | None
    config: Mapping[str, Any] | None

    def setting(self, section: str, key: str, default: Any) -> Any:
        return (self.config or {}).get(section, {}).get(key, default)


def _load(run_dir: Path, recipe: Recipe | None, trusted: str | None) -> _Run:
    names = (METRICS_FILE, SAMPLES_FILE, SUMMARY_FILE, CONFIG_FILE)
    metrics, samples, summary, config = paths = [run_dir / name for name in names]
    if not any(path.exists() for path in paths):
        raise ValueError(
            f"{run_dir} contains none of {', '.join(names)}; needs a run directory; give the "
            "directory that training printed at its end"
        )
    check_links(run_dir)
    recorded, kept = read_metrics(metrics), read_samples(samples)
    settings = read_settings(config)
    if recipe is None:
        keys = {key for entry in (*recorded[:1], *kept[:1]) for key in entry}
        recipe = _recorded_recipe(run_dir, settings, keys, trusted)
    return _Run(
        name=run_dir.resolve().name,
        recipe=recipe,
        metrics=recorded,
        samples=kept,
        summary=read_summary(summary),
        config=settings,
    )


def _recorded_recipe(
    run_dir: Path, settings: Mapping[str, Any] | None, recorded: set[str], trusted: str | None
) -> Recipe:
    """Returns the recipe that the run directory's configuration names, if it is built in or
    `trusted`. Without a configuration, returns the built-in recipe that records these keys."""
    if settings is None:
        return recipe_that_recorded(recorded)
    # A run of another version may have other keys.
    known = {key: value for key, value in flatten(settings).items() if key in LEAVES}
    name = str(known.get("objective.name", LEAVES["objective.name"].default))
    if ":" in name and name != trusted:
        raise ValueError(
            f"{run_dir} was trained with the recipe {name!r}; its code runs only if you name the "
            f"recipe; if you trust it, use {flag('recipe', name)}"
        )
    return recipe_of(recorded_config([(str(run_dir / CONFIG_FILE), known)]))


def _contents(run: _Run) -> dict[str, Any]:
    """Returns the value of every name in the template."""
    display, config = run.recipe.display, run.recipe.config
    curves, missing_curves = draw_curves(run.metrics, display)
    settings = ViewSettings(
        color=display.token_color,
        clips=display.clips,
        interpolates=display.interpolates,
        marker=config.masking.marker,
        entropy_floor=config.objective.entropy_floor,
    )
    samples = choose_samples(run.samples)
    return {
        "name": run.name,
        "subtitle": _subtitle(run),
        "summary": run.summary,
        "interval": _interval(run.summary),
        "facts": _facts(run),
        "missing": _missing(run, missing_curves),
        "shortenings": [entry["note"] for entry in (run.summary or {}).get("shortenings", [])],
        "lengths": _lengths(run.summary),
        "num_steps": run.metrics[-1]["step"] if run.metrics else 0,
        "absent": display.absent,
        "curves": curves,
        "kinds": kinds_table(run.samples, settings),
        "kinds_note": display.kinds_note,
        "samples": [view_sample(sample, settings) for sample in samples],
        "num_samples": len(run.samples),
        "things": display.things,
        "columns": display.columns,
        "color": settings.color.title,
        "color_bounds": COLOR_BOUNDS,
        "marks_selected": settings.interpolates and any("selected" in s for s in samples),
        "max_tokens": MAX_TOKENS,
        "max_anchors": MAX_ANCHORS,
        "config": _flatten(run.config or {}),
    }


def _subtitle(run: _Run) -> list[tuple[str, str]]:
    settings = (
        ("model", "model", "name_or_path"),
        ("data", "data", "path"),
        ("objective", "objective", "name"),
    )
    named = [(label, run.setting(section, key, None)) for label, section, key in settings]
    named.append(("teacher", _teachers(run)))
    preset = (run.summary or {}).get("preset")
    return [(label, str(value)) for label, value in [("preset", preset), *named] if value]


def _teachers(run: _Run) -> str:
    """Returns the models that were the teachers, in the process or on a server; "" if the student's
    own was."""
    several = run.setting("teacher", "models", None)
    listed = several if isinstance(several, list) else []
    listed = [*listed, *(run.setting("teacher", key, None) for key in ("model", "served_model"))]
    return ", ".join(name for name in listed if isinstance(name, str) and name != "none")


def _facts(run: _Run) -> list[tuple[str, str]]:
    """Returns name and value of each fact under the headline."""
    facts = []
    if run.metrics:
        planned = run.setting("train", "num_steps", None)
        of_planned = "" if planned is None else f" of {planned:,}"
        facts.append(("steps", f"{run.metrics[-1]['step']:,}{of_planned}"))
    batch_size = run.setting("train", "batch_size", None)
    if batch_size is not None:
        facts.append((f"{run.recipe.display.thing}s per step", f"{batch_size:,}"))
    seed = (run.summary or {}).get("seed", run.setting("train", "seed", None))
    if seed is not None:
        facts.append(("seed", str(seed)))
    if run.metrics and (skipped := run.metrics[-1].get(SKIPPED_STEPS)):
        facts.append(("optimizer steps skipped", f"{skipped:,.0f}"))
    checker_errors = sum(entry.get("checker_errors", 0) for entry in run.metrics)
    if checker_errors:
        facts.append(("answers not checked", f"{checker_errors:,.0f}"))
    if run.summary is None:
        if run.metrics and "seconds" in run.metrics[-1]:
            seconds = sum(entry.get("seconds", 0.0) for entry in run.metrics)
            facts.append(("training", _duration(seconds)))
        return facts
    for label, key in (("training", "seconds_train"), ("evaluation", "seconds_eval")):
        facts.append((label, _duration(run.summary[key])))
    before, after = run.summary.get("pass_at_k_before"), run.summary.get("pass_at_k_after")
    if before is not None and after is not None:
        k = run.summary["num_samples"]
        facts.append((f"pass@{k}", f"{_percent(before)} → {_percent(after)}"))
    if (final := run.summary.get("final")) is not None:
        name = f"Avg@{final['num_samples']} with {final['max_new_tokens']:,} tokens, after training"
        rows = ((role, final.get(role)) for role in ("base", "last", "best"))
        shown = [f"{role} {_percent(row['avg_at_k'])}" for role, row in rows if row is not None]
        facts.append((name, ", ".join(shown)))
    return facts


def _missing(run: _Run, missing_curves: list[str]) -> list[str]:
    """Returns one sentence for each part that this run lacks."""
    missing = []
    if run.summary is None:
        missing.append(
            f"The run has not finished: there is no {SUMMARY_FILE}. It is still running, or it was "
            "interrupted and can be resumed with python -m paint_engine.train --resume and this "
            "directory."
        )
    elif run.summary["avg_at_k_before"] is None or run.summary["avg_at_k_after"] is None:
        missing.append(
            "Accuracy was not measured both before and after training (eval.enabled, "
            "eval.at_start, eval.at_end), so there is no difference to report."
        )
    if not run.metrics:
        missing.append("No training step is recorded, so there are no curves.")
    elif missing_curves:
        missing.append(f"The metrics of this run lack: {', '.join(missing_curves)}.")
    if not run.samples:
        missing.append(
            f"No {run.recipe.display.thing} was kept (run.samples_per_step), so none is shown."
        )
    if run.config is None:
        missing.append(f"There is no {CONFIG_FILE}, so the configuration is not shown.")
    return missing


@dataclass(frozen=True)
class _Interval:
    """The paired difference in fractions, and the places on an axis in percent of its width."""

    difference: float
    low: float
    high: float
    zero_at: float
    difference_at: float
    low_at: float
    high_at: float


def _interval(summary: Mapping[str, Any] | None) -> _Interval | None:
    if summary is None or summary["paired_difference"] is None:
        return None
    difference, (low, high) = summary["paired_difference"], summary["paired_difference_ci95"]
    left, right = min(low, 0.0), max(high, 0.0)
    margin = 0.08 * (right - left) or 0.01
    left, right = left - margin, right + margin
    zero_at, difference_at, low_at, high_at = (
        100 * (value - left) / (right - left) for value in (0.0, difference, low, high)
    )
    return _Interval(difference, low, high, zero_at, difference_at, low_at, high_at)


@dataclass(frozen=True)
class _Lengths:
    """Accuracy by length budget and lengths: headings, and a row of texts for each evaluation."""

    headings: list[str]
    rows: list[list[str]]


def _lengths(summary: Mapping[str, Any] | None) -> _Lengths | None:
    """Returns the table, or None without evaluations that recorded lengths."""
    recorded = (summary or {}).get("evaluations", [])
    evaluations = [entry for entry in recorded if entry.get("accuracy_within") is not None]
    if not evaluations:
        return None
    budgets = sorted({int(key) for entry in evaluations for key in entry["accuracy_within"]})
    rows = []
    several = any(entry.get("benchmarks") for entry in evaluations)
    for name, entry in _by_benchmark(evaluations):
        within = {int(key): _percent(share) for key, share in entry["accuracy_within"].items()}
        lengths = [entry.get(key) for key in _LENGTHS]
        rows.append(
            [
                f"{entry['step']:,}",
                *([name, _percent(entry["avg_at_k"])] if several else []),
                *(within.get(budget, _NONE) for budget in budgets),
                _percent(entry.get("truncation_rate", 0.0)),
                *(_NONE if length is None else f"{length:,.0f}" for length in lengths),
            ]
        )
    within_budgets = [f"correct within {budget:,} tokens" for budget in budgets]
    names = ["benchmark", "Avg@k"] if several else []
    return _Lengths(["step", *names, *within_budgets, "cut at the limit", *_LENGTHS.values()], rows)


def _by_benchmark(
    evaluations: Iterable[Mapping[str, Any]],
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields each evaluation's numbers on each of several benchmarks, and then their means."""
    for entry in evaluations:
        for name, numbers in entry.get("benchmarks", {}).items():
            if numbers.get("accuracy_within") is not None:
                yield name, {**numbers, "step": entry["step"]}
        yield "macro", entry


def _flatten(config: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Returns sections with their settings; tables inside a section become dotted keys."""

    def rows(table: Mapping[str, Any], prefix: str) -> list[tuple[str, str]]:
        found = []
        for key, value in table.items():
            if isinstance(value, Mapping):
                found += rows(value, f"{prefix}{key}.")
            else:
                found.append((prefix + key, _setting(value)))
        return found

    return [(section, rows(table, "")) for section, table in config.items()]


def _setting(value: Any) -> str:
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, default=str)
    except ValueError:
        # Python writes no number of more than 4,300 digits.
        return shown(value)


def _percent(fraction: float) -> str:
    return f"{fraction:.1%}"


def _points(fraction: float) -> str:
    """Formats a difference of two fractions in percentage points, with its sign."""
    return f"{100 * fraction:+.1f}".replace("-", "\N{MINUS SIGN}")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
