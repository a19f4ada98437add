"""Which runs the paper's tables in small are made of: scales, rows and settings, nothing heavy.

A row is a setting on every seed, a run is one of them: `small/paint/seed-0`. A setting that stands
in several tables is run once. Everything here is fixed before the first run, except for the
learning rates, which the runs of the sweep decide.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import paint_engine

BASE = "base"
RECIPES = ("sft", "grpo", "opsd", "paint")
SWEEP_SEED = 100
"""used in no table"""
BUNDLED = "small"
"""the size of the base that comes with the package"""


@dataclass(frozen=True)
class Scale:
    """What is equal in every run of a comparison: the base sizes, and the budget of a run.

    num_problems, num_samples: of the evaluations on held-out test problems, in the middle and at
    the end of each run.
    sweep_problems, sweep_samples: of the one evaluation of a sweep's run, on validation problems.
    rows: the settings that the tables show; None shows all.
    """

    name: str
    sizes: tuple[str, ...]
    ablation_size: str
    num_steps: int
    batch_size: int
    num_problems: int
    num_samples: int
    sweep_problems: int
    sweep_samples: int
    rates: tuple[float, ...]
    main_seeds: tuple[int, ...]
    ablation_seeds: tuple[int, ...]
    rows: tuple[str, ...] | None = None


LAPTOP = Scale(
    name="laptop",
    sizes=("small", "medium", "large"),
    ablation_size="small",
    num_steps=20,
    batch_size=32,
    num_problems=256,
    num_samples=2,
    sweep_problems=128,
    sweep_samples=2,
    rates=(1e-4, 3e-4, 1e-3),
    main_seeds=(0, 1, 2, 3, 4),
    ablation_seeds=(0, 1, 2),
)
# Nothing here was run yet: the budget is the paper's 100 steps, the samples are its 12.
GPU = Scale(
    name="gpu",
    sizes=("10m", "30m", "100m"),
    ablation_size="10m",
    num_steps=100,
    batch_size=32,
    num_problems=512,
    num_samples=12,
    sweep_problems=256,
    sweep_samples=4,
    rates=(1e-5, 3e-5, 1e-4, 3e-4, 1e-3),
    main_seeds=(0, 1, 2, 3, 4),
    ablation_seeds=(0, 1, 2),
)
QUICK_ROWS = (
    *(BASE, *RECIPES),
    *("rho-0.75-0.75", "rho-0.40-0.30", "place-prefix", "blend-0.03-1.00"),
)
SCALES = {scale.name: scale for scale in (LAPTOP, GPU)}


def quick(scale: Scale) -> Scale:
    """Enough to see that everything runs, in ten minutes: one size, two seeds, half the steps."""
    return replace(
        scale,
        name=f"{scale.name}-quick",
        sizes=(scale.ablation_size,),
        num_steps=scale.num_steps // 2,
        num_problems=128,
        num_samples=2,
        sweep_problems=64,
        rates=scale.rates[-3:],
        main_seeds=(0, 1),
        ablation_seeds=(0, 1),
        rows=QUICK_ROWS,
    )


NO_INTERPOLATION = {"objective.interpolation_weight": "0"}


def _masked(correct: str, wrong: str) -> dict[str, str]:
    return {"masking.rho_correct": correct, "masking.rho_wrong": wrong, **NO_INTERPOLATION}


def _blended(weight: str, fraction: str) -> dict[str, str]:
    return {"objective.interpolation_weight": weight, "objective.top_fraction": fraction}


# By (rho_correct, rho_wrong) and (k_base, f_top), as the paper's Tables 2 and 4 write them.
_RATIOS = (("0.00", "0.00"), ("0.25", "0.25"), ("0.50", "0.50"), ("0.75", "0.75"))
_RATIOS += (("0.50", "0.25"), ("0.50", "0.30"), ("0.40", "0.30"))
_BLENDS = (("0.01", "1.00"), ("0.03", "1.00"), ("0.05", "1.00"), ("0.03", "0.01"), ("0.03", "0.05"))
_PLACEMENTS = ("prefix", "middle", "random", "sentence_suffix")

ABLATIONS: dict[str, dict[str, str]] = {
    **{f"rho-{c}-{w}": _masked(c, w) for c, w in _RATIOS},
    **{f"place-{p}": {"masking.placement": p, **NO_INTERPOLATION} for p in _PLACEMENTS},
    **{f"blend-{k}-{f}": _blended(k, f) for k, f in _BLENDS},
}
"""overrides of PAINT"""

# The first is OPSD at the learning rate of the other rows, which need not be its own.
RATIO_ROWS = tuple(f"rho-{c}-{w}" for c, w in _RATIOS)
PLACEMENT_ROWS = (
    *("place-prefix", "place-middle", "place-random"),
    *("rho-0.40-0.30", "place-sentence_suffix"),
)
BLEND_ROWS = (
    *("rho-0.40-0.30", "blend-0.01-1.00", "blend-0.03-1.00", "blend-0.05-1.00"),
    *("blend-0.03-0.01", "paint", "blend-0.03-0.05"),
)


@dataclass(frozen=True)
class Table:
    """Rows of settings, and what each row's difference is taken to.

    references: the settings that rows are compared with; the first is every row's, a further one
    only that of `paint`.
    """

    number: int
    rows: tuple[str, ...]
    references: tuple[str, ...]


TABLES = (
    Table(1, (BASE, *RECIPES), (BASE, "opsd")),
    Table(2, RATIO_ROWS, ("rho-0.40-0.30",)),
    Table(3, PLACEMENT_ROWS, ("rho-0.40-0.30",)),
    Table(4, BLEND_ROWS, ("paint",)),
)


@dataclass(frozen=True)
class PlannedRun:
    """One training run, or one evaluation of the base, before its learning rate is known.

    rate: of a sweep's run; None where the sweep decides it, and for the base.
    """

    size: str
    setting: str
    seed: int
    rate: float | None = None

    @property
    def run_id(self) -> str:
        if self.rate is not None:
            return f"sweep/{self.size}/{self.setting}/rate-{self.rate:g}"
        return f"{self.size}/{self.setting}/seed-{self.seed}"

    @property
    def recipe(self) -> str:
        """Whose learning rate it takes: an ablation has PAINT's."""
        return "paint" if self.setting in ABLATIONS else self.setting


def shown_rows(scale: Scale, table: Table) -> tuple[str, ...]:
    return tuple(row for row in table.rows if scale.rows is None or row in scale.rows)


def table_sizes(scale: Scale, table: Table) -> tuple[str, ...]:
    return scale.sizes if table.number == 1 else (scale.ablation_size,)


def table_seeds(scale: Scale, table: Table) -> tuple[int, ...]:
    return scale.main_seeds if table.number == 1 else scale.ablation_seeds


def chosen_tables(numbers: Sequence[int]) -> tuple[Table, ...]:
    return tuple(table for table in TABLES if table.number in numbers)


def table_runs(scale: Scale, numbers: Sequence[int]) -> list[PlannedRun]:
    """The runs of the tables, each once, those of the largest base first: they take longest."""
    runs = {
        PlannedRun(size, row, seed)
        for table in chosen_tables(numbers)
        for size in table_sizes(scale, table)
        for row in shown_rows(scale, table)
        for seed in table_seeds(scale, table)
    }
    return sorted(runs, key=lambda run: (-scale.sizes.index(run.size), run.seed, run.setting))


def needed_sizes(scale: Scale, numbers: Sequence[int]) -> tuple[str, ...]:
    """The bases of these tables' runs, in the scale's order."""
    used = {run.size for run in table_runs(scale, numbers)}
    return tuple(size for size in scale.sizes if size in used)


def sweep_runs(scale: Scale, numbers: Sequence[int]) -> list[PlannedRun]:
    """Every learning rate of the grid, for each recipe and size that the tables need."""
    needed = {(run.size, run.recipe) for run in table_runs(scale, numbers) if run.setting != BASE}
    ordered = sorted(needed, key=lambda pair: (-scale.sizes.index(pair[0]), pair[1]))
    return [
        PlannedRun(size, recipe, SWEEP_SEED, rate)
        for size, recipe in ordered
        for rate in scale.rates
    ]


def overrides(scale: Scale, run: PlannedRun, rate: float | None) -> dict[str, str]:
    """What the run sets over its preset, beside the paths of the base and of its directory.

    rate: the learning rate; None for the base, which is only evaluated.
    """
    sweep = run.rate is not None
    half = scale.num_steps // 2
    values = {
        **ABLATIONS.get(run.setting, {}),
        "train.num_steps": str(scale.num_steps),
        "train.batch_size": str(scale.batch_size),
        "train.seed": str(run.seed),
        "eval.split": "validation" if sweep else "test",
        "eval.num_problems": str(scale.sweep_problems if sweep else scale.num_problems),
        "eval.num_samples": str(scale.sweep_samples if sweep else scale.num_samples),
        "eval.every": "0" if sweep else str(half),
        "eval.at_start": "false",
        "checkpoint.every": "0",
        "run.samples_per_step": "0",
    }
    return values if rate is None else {**values, "optim.learning_rate": f"{rate:g}"}


def arguments(preset: str, values: Mapping[str, str]) -> list[str]:
    """As the command line of `paint_engine.train` takes them."""
    pairs = [text for key, value in values.items() for text in (f"--{key}", value)]
    return ["--preset", preset, *pairs]


def preset_of(run: PlannedRun) -> str:
    return "tiny" if run.setting == BASE else f"{run.recipe}-tiny"


def base_directory(bases: Path, size: str) -> Path:
    if size == BUNDLED:
        # paint_engine.model has this path too, but brings PyTorch with it.
        return Path(paint_engine.__file__).parent / "tiny" / "base"
    return bases / size


def base_sha256(base: Path) -> str:
    return hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()


@dataclass(frozen=True)
class Job:
    """A planned run with everything that it needs.

    rate: the learning rate, None for the base.
    base: the directory of the base model.
    directory: of the run: its log, and the training run in `training`.
    """

    run: PlannedRun
    scale: Scale
    rate: float | None
    base: Path
    directory: Path

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the result, beside the code: a stored one with others is not this run's."""
        return {
            "preset": preset_of(self.run),
            "overrides": overrides(self.scale, self.run, self.rate),
            "base_sha256": base_sha256(self.base),
        }
