"""The plan of the tables at laptop scale: scales, rows, settings and runs.

Tables 1 to 4 are the paper's; Table 1 has the control as a further row. Table 5 has the other
teachers, contexts and signals. Table 6, on what the clip does, is not part of
docs/evidence-plan.md: it was added after the first runs.

A row is a setting on every seed; a run is a setting on one seed, such as `small/paint/seed-0`. A
setting that occurs in several tables runs once. All is fixed before the first run, except for the
learning rates, which the sweep decides. This module does not import PyTorch.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from paint_engine.config.bundled import TINY_BASE, TINY_TEACHER

BASE = "base"
TEACHER = "teacher"
"""the external teacher of `opd`"""
EVALUATED = (BASE, TEACHER)
"""rows that are evaluated and not trained"""
RECIPES = ("sft", "grpo", "opsd", "paint")
CONTROL = "paint-control"
"""PAINT with another problem's solution in the teacher's prompt"""
PRIMARY = ("opsd", "paint")
"""rows of the primary claim"""
CLAIMED = (
    *("base", "sft", "grpo", "paint-control"),
    *("rho-0.40-0.30", "rho-0.00-0.00", "rho-0.75-0.75"),
    *("place-prefix", "place-middle", "place-random", "blend-0.03-1.00"),
)
"""the other rows of the claims (bench/paper/claims.py)"""
TEACHERS = ("opd", "paint", CONTROL, "sdpo", "grpo-paint")
"""presets of Table 5, without the model's name"""
KEPT_ROLLOUTS = 4
"""the number of rollouts whose tokens are kept of each step, in the runs of the tables"""
BUNDLED = "small"
"""size of the base that is part of the package"""


NOT_CODE = ("bench/results", "docs", "runs", "tests", "*.md")
"""what no run depends on: it may change between the runs of a result"""


@dataclass(frozen=True)
class Scale:
    """The sizes of the bases, and the budget that all runs of a comparison share.

    num_problems, num_samples: of the evaluation on held-out test problems at the end of each run.
    sweep_problems, sweep_samples: of that of a run of the sweep, on validation problems.
    seeds: of the rows that are in no claim.
    claim_seeds: of the rows in CLAIMED; they begin with `seeds`.
    primary_seeds: of the rows in PRIMARY; they begin with `claim_seeds`.
    sweep_seeds: of the sweep, used in no table.
    rows: the settings that the tables show; None for all.
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
    seeds: tuple[int, ...]
    claim_seeds: tuple[int, ...]
    primary_seeds: tuple[int, ...]
    sweep_seeds: tuple[int, ...]
    rows: tuple[str, ...] | None = None


LAPTOP = Scale(
    name="laptop",
    sizes=("small",),
    ablation_size="small",
    num_steps=20,
    batch_size=32,
    num_problems=1024,
    num_samples=2,
    sweep_problems=512,
    sweep_samples=2,
    rates=(3e-5, 1e-4, 3e-4, 1e-3),
    seeds=tuple(range(5)),
    claim_seeds=tuple(range(10)),
    primary_seeds=tuple(range(20)),
    sweep_seeds=(100, 101),
)
QUICK_ROWS = (
    *(BASE, *RECIPES, TEACHER, *TEACHERS),
    *("rho-0.75-0.75", "rho-0.40-0.30", "place-prefix", "blend-0.03-1.00"),
    *("clip-own-none", "clip-other-0.06", "clip-other-none"),
)
# Has not run yet. Sized for ten minutes of one GPU, without the pretraining of the bases, if four
# runs at a time take 30 seconds: it shows that larger bases run, and is no result.
GPU = Scale(
    name="gpu",
    sizes=("10m", "30m"),
    ablation_size="10m",
    num_steps=8,
    batch_size=32,
    num_problems=64,
    num_samples=2,
    sweep_problems=32,
    sweep_samples=2,
    rates=(1e-4, 3e-4),
    seeds=(0, 1),
    claim_seeds=(0, 1),
    primary_seeds=(0, 1),
    sweep_seeds=(100,),
    rows=QUICK_ROWS,
)
SCALES = {scale.name: scale for scale in (LAPTOP, GPU)}


def quick(scale: Scale) -> Scale:
    """Returns a scale to check that everything runs, in fifteen minutes of two cores: one base, two
    seeds, a quarter of the steps."""
    return replace(
        scale,
        name=f"{scale.name}-quick",
        sizes=(scale.ablation_size,),
        num_steps=scale.num_steps // 4,
        num_problems=min(128, scale.num_problems),
        num_samples=2,
        sweep_problems=min(64, scale.sweep_problems),
        rates=scale.rates[-3:],
        seeds=scale.seeds[:2],
        claim_seeds=scale.seeds[:2],
        primary_seeds=scale.seeds[:2],
        sweep_seeds=scale.sweep_seeds[:1],
        rows=QUICK_ROWS,
    )


NO_INTERPOLATION = {"objective.interpolation_weight": "0"}


def _masked(correct: str, wrong: str) -> dict[str, str]:
    return {"masking.rho_correct": correct, "masking.rho_wrong": wrong, **NO_INTERPOLATION}


def _blended(weight: str, fraction: str) -> dict[str, str]:
    return {"objective.interpolation_weight": weight, "objective.top_fraction": fraction}


# (rho_correct, rho_wrong) and (k_base, f_top), as in the paper's Tables 2 and 4.
_RATIOS = (("0.00", "0.00"), ("0.25", "0.25"), ("0.50", "0.50"), ("0.75", "0.75"))
_RATIOS += (("0.50", "0.25"), ("0.50", "0.30"), ("0.40", "0.30"))
_BLENDS = (("0.01", "1.00"), ("0.03", "1.00"), ("0.05", "1.00"), ("0.03", "0.01"), ("0.03", "0.05"))
_PLACEMENTS = ("prefix", "middle", "random", "sentence_suffix")

_OTHER, _NO_CLIP = {"teacher.context": "other"}, {"objective.pointwise_clip": "none"}

ABLATIONS: dict[str, dict[str, str]] = {
    **{f"rho-{c}-{w}": _masked(c, w) for c, w in _RATIOS},
    **{f"place-{p}": {"masking.placement": p, **NO_INTERPOLATION} for p in _PLACEMENTS},
    **{f"blend-{k}-{f}": _blended(k, f) for k, f in _BLENDS},
    "clip-own-none": _NO_CLIP,
    "clip-other-0.06": _OTHER,
    "clip-other-none": {**_OTHER, **_NO_CLIP},
}
"""overrides of the PAINT preset by setting"""

# The first row is OPSD, at the learning rate of the other rows instead of its own.
RATIO_ROWS = tuple(f"rho-{c}-{w}" for c, w in _RATIOS)
PLACEMENT_ROWS = (
    *("place-prefix", "place-middle", "place-random"),
    *("rho-0.40-0.30", "place-sentence_suffix"),
)
BLEND_ROWS = (
    *("rho-0.40-0.30", "blend-0.01-1.00", "blend-0.03-1.00", "blend-0.05-1.00"),
    *("blend-0.03-0.01", "paint", "blend-0.03-0.05"),
)
# The teacher's solution, and the clip. The control is at PAINT's learning rate here.
CLIP_ROWS = (BASE, "paint", "clip-own-none", "clip-other-0.06", "clip-other-none")


@dataclass(frozen=True)
class Table:
    """A table's rows and the settings that they are compared with.

    references: the first is the reference of every row; `paint` is compared with all of them, and
    so is every row if `all_with_all`.
    """

    number: int
    rows: tuple[str, ...]
    references: tuple[str, ...]
    all_with_all: bool = False


TABLES = (
    Table(1, (BASE, *RECIPES, CONTROL), (BASE, "opsd")),
    Table(2, RATIO_ROWS, ("rho-0.40-0.30",)),
    Table(3, PLACEMENT_ROWS, ("rho-0.40-0.30",)),
    Table(4, BLEND_ROWS, ("paint",)),
    Table(5, (BASE, TEACHER, *TEACHERS), (BASE, "paint"), all_with_all=True),
    Table(6, CLIP_ROWS, (BASE, "paint"), all_with_all=True),
)
NUMBERS = tuple(table.number for table in TABLES)
EXPLORATORY = (6,)
"""the numbers of the tables that are not part of the plan"""
PLANNED = tuple(number for number in NUMBERS if number not in EXPLORATORY)
PAPER = (1, 2, 3, 4)
"""the numbers of the paper's tables"""


@dataclass(frozen=True)
class PlannedRun:
    """One training run, or one evaluation of the base.

    rate: learning rate of a run of the sweep; None if the sweep decides it, and for rows that are
    not trained.
    """

    size: str
    setting: str
    seed: int
    rate: float | None = None

    @property
    def run_id(self) -> str:
        if self.rate is not None:
            return f"sweep/{self.size}/{self.setting}/rate-{self.rate:g}/seed-{self.seed}"
        return f"{self.size}/{self.setting}/seed-{self.seed}"

    @property
    def recipe(self) -> str:
        """The recipe whose learning rate the run takes; PAINT for an ablation."""
        return "paint" if self.setting in ABLATIONS else self.setting

    @property
    def base(self) -> str:
        """The model that is trained or evaluated: a size, or the teacher."""
        return TEACHER if self.setting == TEACHER else self.size


def shown_rows(scale: Scale, table: Table) -> tuple[str, ...]:
    return tuple(row for row in table.rows if scale.rows is None or row in scale.rows)


def table_sizes(scale: Scale, table: Table) -> tuple[str, ...]:
    return scale.sizes if table.number == 1 else (scale.ablation_size,)


def seeds_of(scale: Scale, setting: str) -> tuple[int, ...]:
    if setting in PRIMARY:
        return scale.primary_seeds
    return scale.claim_seeds if setting in CLAIMED else scale.seeds


def chosen_tables(numbers: Sequence[int]) -> tuple[Table, ...]:
    return tuple(table for table in TABLES if table.number in numbers)


def table_runs(scale: Scale, numbers: Sequence[int]) -> list[PlannedRun]:
    """Returns the runs of the tables, each once; the largest base first, because its runs take
    longest."""
    runs = {
        PlannedRun(size, row, seed)
        for table in chosen_tables(numbers)
        for size in table_sizes(scale, table)
        for row in shown_rows(scale, table)
        for seed in seeds_of(scale, row)
    }
    return sorted(runs, key=lambda run: (-scale.sizes.index(run.size), run.seed, run.setting))


def needed_bases(scale: Scale, numbers: Sequence[int]) -> tuple[str, ...]:
    """Models that these tables need: sizes in the scale's order, then the teacher."""
    used = {run.base for run in table_runs(scale, numbers)}
    return tuple(name for name in (*scale.sizes, TEACHER) if name in used)


def sweep_runs(scale: Scale, numbers: Sequence[int]) -> list[PlannedRun]:
    """Returns a run at every learning rate of the grid on every seed of the sweep, for each recipe
    and size in the tables."""
    trained = [run for run in table_runs(scale, numbers) if run.setting not in EVALUATED]
    needed = {(run.size, run.recipe) for run in trained}
    ordered = sorted(needed, key=lambda pair: (-scale.sizes.index(pair[0]), pair[1]))
    return [
        PlannedRun(size, recipe, seed, rate)
        for size, recipe in ordered
        for rate in scale.rates
        for seed in scale.sweep_seeds
    ]


def overrides(scale: Scale, run: PlannedRun, rate: float | None) -> dict[str, str]:
    """Returns the run's overrides of its preset, without the paths of the base and the run
    directory.

    rate: the learning rate; None for a row that is only evaluated.
    """
    sweep = run.rate is not None
    values = {
        **ABLATIONS.get(run.setting, {}),
        "train.num_steps": str(scale.num_steps),
        "train.batch_size": str(scale.batch_size),
        "train.seed": str(run.seed),
        "eval.split": "validation" if sweep else "test",
        "eval.num_problems": str(scale.sweep_problems if sweep else scale.num_problems),
        "eval.num_samples": str(scale.sweep_samples if sweep else scale.num_samples),
        # After the last step only.
        "eval.every": "0",
        "eval.at_start": "false",
        "checkpoint.every": "0",
        "run.samples_per_step": "0" if sweep else str(KEPT_ROLLOUTS),
    }
    return values if rate is None else {**values, "optim.learning_rate": f"{rate:g}"}


def arguments(preset: str, values: Mapping[str, str]) -> list[str]:
    """Arguments of `paint_engine.train` for a preset and its overrides."""
    pairs = [text for key, value in values.items() for text in (f"--{key}", value)]
    return ["--preset", preset, *pairs]


def preset_of(run: PlannedRun) -> str:
    return "tiny" if run.setting in EVALUATED else f"{run.recipe}-tiny"


def base_directory(bases: Path, name: str) -> Path:
    """Returns the directory of a model of `PlannedRun.base`."""
    bundled = {BUNDLED: TINY_BASE, TEACHER: TINY_TEACHER}
    return bundled.get(name, bases / name)


def base_sha256(base: Path) -> str:
    return hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()


@dataclass(frozen=True)
class Job:
    """A planned run with everything that it needs.

    rate: the learning rate; None for a row that is only evaluated.
    base: the directory of the model that is trained or evaluated.
    directory: holds the log and, in `training`, the run directory.
    """

    run: PlannedRun
    scale: Scale
    rate: float | None
    base: Path
    directory: Path

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the result besides the code; a stored record with other settings is not
        used."""
        settings = {
            "preset": preset_of(self.run),
            "overrides": overrides(self.scale, self.run, self.rate),
            "base_sha256": base_sha256(self.base),
        }
        if self.run.setting == "opd":
            settings["teacher_sha256"] = base_sha256(TINY_TEACHER)
        return settings
