"""The plan of the paper's tables: rows, shared runs, budgets and settings."""

from pathlib import Path

import numpy as np
import pytest

from bench import paper_tables
from bench.paper import published
from bench.paper.plan import (
    ABLATIONS,
    BASE,
    CLIP_ROWS,
    EVALUATED,
    GPU,
    KEPT_ROLLOUTS,
    LAPTOP,
    NUMBERS,
    PLANNED,
    RECIPES,
    TABLES,
    TEACHER,
    TEACHERS,
    Job,
    PlannedRun,
    Scale,
    arguments,
    base_directory,
    base_sha256,
    needed_bases,
    overrides,
    preset_of,
    quick,
    seeds_of,
    sweep_runs,
    table_runs,
)
from paint_engine.config.bundled import BUNDLED, TINY_BASE, TINY_TEACHER
from paint_engine.config.command_line import load_config
from paint_engine.config.schema import Config
from paint_engine.tiny.pretrain import SIZES
from paint_engine.tiny.problems import load_split

ALL = NUMBERS


def config_of(run: PlannedRun, scale: Scale = LAPTOP) -> Config:
    rate = None if run.setting == BASE else 1e-4
    return load_config(arguments(preset_of(run), overrides(scale, run, rate))).config


def test_the_plan_has_the_papers_rows_once_each() -> None:
    runs = table_runs(LAPTOP, PLANNED)
    # Base, 4 recipes and the control; 7 + 4 + 5 further settings; the teacher and 3 recipes.
    # 20 seeds of OPSD and PAINT, 10 of the 11 other rows of claims, 5 of the rest.
    assert len(runs) == 2 * 20 + 11 * 10 + (6 + 16 + 4 - 13) * 5
    assert len({run.run_id for run in runs}) == len(runs)
    assert [len(table.rows) for table in TABLES] == [6, 7, 5, 7, 7, 5]
    assert {run.seed for run in runs} == set(range(20))
    assert {run.setting for run in runs if run.seed >= 10} == {"opsd", "paint"}
    # 8 recipes x 4 learning rates x 2 seeds, which are none of the tables'.
    sweep = sweep_runs(LAPTOP, PLANNED)
    assert len({run.run_id for run in sweep}) == len(sweep) == 64
    assert {run.seed for run in sweep} == {100, 101}


def test_the_exploratory_table_is_not_part_of_the_plan() -> None:
    planned = {run.run_id for run in table_runs(LAPTOP, PLANNED)}
    added = [run for run in table_runs(LAPTOP, (6,)) if run.run_id not in planned]
    assert len(added) == 3 * len(LAPTOP.seeds)
    assert {run.setting for run in table_runs(quick(LAPTOP), (6,))} == set(CLIP_ROWS)
    # At PAINT's learning rate.
    assert {run.recipe for run in added} == {"paint"}
    assert set(sweep_runs(LAPTOP, (6,))) < set(sweep_runs(LAPTOP, PLANNED))
    configs = [config_of(run) for run in added if run.seed == 0]
    found = {(c.teacher.context, c.objective.pointwise_clip) for c in configs}
    assert found == {("solution", None), ("other", 0.06), ("other", None)}


def test_rows_of_several_tables_are_run_once() -> None:
    alone = {number: {r.run_id for r in table_runs(LAPTOP, (number,))} for number in ALL}

    def runs_of(*settings: str) -> set[str]:
        return {
            f"small/{setting}/seed-{seed}"
            for setting in settings
            for seed in seeds_of(LAPTOP, setting)
        }

    assert alone[2] & alone[3] & alone[4] == runs_of("rho-0.40-0.30")
    assert not alone[1] & alone[2]
    assert alone[1] & alone[4] == runs_of("paint")
    assert alone[1] & alone[5] == runs_of("base", "paint", "paint-control")


def test_quick_is_one_size_and_fewer_rows() -> None:
    scale = quick(LAPTOP)
    runs = table_runs(scale, PLANNED)
    assert {run.size for run in runs} == {"small"}
    assert len(runs) == 14 * 2 and len(sweep_runs(scale, PLANNED)) == 8 * 3
    assert (scale.num_steps, scale.name) == (5, "laptop-quick")
    small = quick(GPU)
    assert small.sizes == ("10m",) and small.num_problems <= GPU.num_problems


def test_quick_takes_fifteen_minutes_of_two_cores() -> None:
    """Four seconds for each step, and 40 for 1,000 answers."""
    scale = quick(LAPTOP)
    table = 4 * scale.num_steps + scale.num_problems * scale.num_samples * 0.04
    sweep = 4 * scale.num_steps + scale.sweep_problems * scale.sweep_samples * 0.04
    seconds = len(table_runs(scale, PLANNED)) * table + len(sweep_runs(scale, PLANNED)) * sweep
    assert seconds / 2 <= 15 * 60


@pytest.mark.parametrize("scale", [LAPTOP, GPU, quick(LAPTOP), quick(GPU)])
def test_every_setting_is_a_valid_configuration_with_the_same_budget(scale: Scale) -> None:
    one_each = {run.setting: run for run in table_runs(scale, ALL)}
    sections = [config_of(run, scale) for run in one_each.values() if run.setting != BASE]
    for config in sections:
        assert config.train.num_steps == scale.num_steps
        assert config.train.batch_size == scale.batch_size
        assert config.eval.split == "test" and config.data.split == "train"
        assert config.lora == sections[0].lora and config.data == sections[0].data
        assert config.eval.model_dump(exclude={"max_sequences"}) == sections[0].eval.model_dump(
            exclude={"max_sequences"}
        )


def test_the_gpu_scale_takes_ten_minutes_of_one_gpu() -> None:
    """Thirty seconds for each run, four at a time."""
    num_runs = len(table_runs(GPU, PLANNED)) + len(sweep_runs(GPU, PLANNED))
    assert 30 * num_runs / paper_tables.WORKERS_PER_GPU <= 10 * 60
    assert {run.size for run in table_runs(GPU, PLANNED)} == {"10m", "30m"}


def test_every_recipe_has_the_same_grid_on_validation_problems_alone() -> None:
    sweep = sweep_runs(LAPTOP, ALL)
    for recipe in RECIPES + TEACHERS:
        found = [(run.rate, run.seed) for run in sweep if run.setting == recipe]
        assert found == [(rate, seed) for rate in LAPTOP.rates for seed in LAPTOP.sweep_seeds]
    budgets = [overrides(LAPTOP, run, run.rate) for run in sweep]
    rates = {values.pop("optim.learning_rate") for values in budgets}
    assert rates == {"3e-05", "0.0001", "0.0003", "0.001"}
    assert {values.pop("train.seed") for values in budgets} == {"100", "101"}
    assert all(values == budgets[0] for values in budgets)
    assert budgets[0]["eval.split"] == "validation"
    # Only the tables' runs keep rollouts.
    assert budgets[0]["run.samples_per_step"] == "0"
    for run in table_runs(LAPTOP, ALL):
        assert overrides(LAPTOP, run, None)["run.samples_per_step"] == str(KEPT_ROLLOUTS)
    names = [
        {problem.problem for problem in load_split(split)}
        for split in ("train", "validation", "test")
    ]
    assert len(set().union(*names)) == sum(map(len, names))


def test_scales_have_bases_that_the_pretraining_script_knows() -> None:
    for scale in (LAPTOP, GPU):
        assert set(scale.sizes) <= set(SIZES)
        assert list(scale.sizes) == sorted(scale.sizes, key=lambda size: SIZES[size].hidden_size)
        assert scale.ablation_size == scale.sizes[0]
        # Each size is shown beside a backbone of the paper.
        assert len(scale.sizes) <= len(published.TABLE_1)


def test_shared_rows_are_what_the_tables_say() -> None:
    """Table 2's (0, 0) is OPSD, Table 4's (0, 0) PAINT without interpolation, (0.03, 0.03)
    PAINT."""
    opsd, unmasked = (
        config_of(PlannedRun("small", setting, 0)) for setting in ("opsd", "rho-0.00-0.00")
    )
    masks = config_of(PlannedRun("small", "rho-0.40-0.30", 0))
    full = config_of(PlannedRun("small", "paint", 0))
    assert (opsd.masking.rho_correct, opsd.masking.rho_wrong) == (0, 0)
    assert opsd.objective == masks.objective and opsd.objective.interpolation_weight == 0
    assert opsd == unmasked
    assert {PlannedRun("small", row, 0).recipe for row in TABLES[1].rows} == {"paint"}
    assert masks.masking == full.masking and full.masking.placement == "suffix"
    assert (full.masking.rho_correct, full.masking.rho_wrong) == (0.4, 0.3)
    assert (full.objective.interpolation_weight, full.objective.top_fraction) == (0.03, 0.03)


def test_teachers_and_signals_are_compared_at_the_same_budget() -> None:
    runs = table_runs(LAPTOP, (5,))
    assert len(runs) == 20 + 2 * 10 + 4 * 5 and len(sweep_runs(LAPTOP, (5,))) == 5 * 4 * 2
    configs = {run.setting: config_of(run) for run in runs if run.setting not in EVALUATED}
    assert set(configs) == set(TEACHERS)
    for config in configs.values():
        assert (config.train.num_steps, config.train.batch_size) == (20, 32)
        assert config.eval.num_problems == 1024 and config.lora == configs["paint"].lora
    teachers = {setting: config.teacher for setting, config in configs.items()}
    assert (teachers["opd"].weights, teachers["opd"].context) == ("external", "none")
    assert teachers["paint-control"].context == "other"
    assert teachers["sdpo"].context == "sibling"
    assert configs["grpo-paint"].objective.name == "grpo_paint"


def test_the_teacher_is_evaluated_as_the_model_that_distils(tmp_path: Path) -> None:
    run = PlannedRun("small", TEACHER, 0)
    distils = PlannedRun("small", "opd", 0)
    config = config_of(distils)
    assert config.teacher.model is not None
    assert base_directory(tmp_path, run.base) == BUNDLED[config.teacher.model]
    job = Job(distils, LAPTOP, 1e-4, TINY_BASE, tmp_path)
    assert job.settings["teacher_sha256"] == base_sha256(TINY_TEACHER)
    assert needed_bases(LAPTOP, (5,)) == ("small", TEACHER)


CLIP = [setting for setting in ABLATIONS if setting.startswith("clip-")]


@pytest.mark.parametrize("setting", CLIP)
def test_a_row_of_the_clip_differs_from_paint_in_context_and_clip(setting: str) -> None:
    _, shown, clip = setting.split("-")
    config = config_of(PlannedRun("small", setting, 0))
    full = config_of(PlannedRun("small", "paint", 0))
    others = {"teacher", "objective"}
    assert config.model_dump(exclude=others) == full.model_dump(exclude=others)
    context = {"own": "solution", "other": "other"}[shown]
    assert config.teacher == full.teacher.model_copy(update={"context": context})
    bound = None if clip == "none" else float(clip)
    assert config.objective == full.objective.model_copy(update={"pointwise_clip": bound})


@pytest.mark.parametrize("setting", [name for name in ABLATIONS if name not in CLIP])
def test_an_ablation_differs_from_paint_in_what_its_name_says(setting: str) -> None:
    kind, *values = setting.split("-")
    config = config_of(PlannedRun("small", setting, 0))
    full = config_of(PlannedRun("small", "paint", 0))
    others = {"masking", "objective"}
    assert config.model_dump(exclude=others) == full.model_dump(exclude=others)
    if kind == "blend":
        k, f = map(float, values)
        assert (config.objective.interpolation_weight, config.objective.top_fraction) == (k, f)
        assert config.masking == full.masking
    else:
        assert config.objective.interpolation_weight == 0
        masking = config.masking
        if kind == "rho":
            assert [masking.rho_correct, masking.rho_wrong] == [float(value) for value in values]
        else:
            assert masking == full.masking.model_copy(update={"placement": values[0]})


def test_the_papers_macro_averages_are_means_of_its_benchmarks() -> None:
    for rows in published.TABLE_1.values():
        assert set(rows) == {BASE, *RECIPES}
        for *scores, macro in rows.values():
            assert abs(np.mean(scores) - macro) <= 0.07
    for number, rows in published.ABLATIONS.items():
        assert set(rows) <= set(TABLES[number - 1].rows)


def test_the_papers_scores_are_shares_of_360_answers() -> None:
    """30 problems with 12 samples each. In Table 1 this holds for OPSD and PAINT only."""
    shares = {round(100 * count / 360, 1) for count in range(361)}
    for rows in published.TABLE_1.values():
        assert {*rows["opsd"][:3], *rows["paint"][:3]} <= shares
    for scores in published.ABLATIONS.values():
        assert set(scores.values()) <= shares
    small = published.TABLE_1["Qwen3-1.7B"]
    assert published.ABLATIONS[2]["rho-0.00-0.00"] == small["opsd"][0]
    assert published.ABLATIONS[4]["paint"] == small["paint"][0]
    assert len({scores["rho-0.40-0.30"] for scores in published.ABLATIONS.values()}) == 1


def test_list_prints_ids_and_starts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    paper_tables.main(["--list", "--scale", "gpu", "--tables", "1"])
    printed = capsys.readouterr().out.split()
    assert "30m/paint/seed-1" in printed and "sweep/10m/grpo/rate-0.0001/seed-100" in printed
    assert len(printed) == 2 * 6 * 2 + 2 * 5 * 2
