"""The plan of the paper's tables: rows, shared runs, budgets and settings."""

from pathlib import Path

import numpy as np
import pytest

from bench import paper_tables
from bench.paper import published
from bench.paper.plan import (
    ABLATIONS,
    BASE,
    EVALUATED,
    GPU,
    LAPTOP,
    RECIPES,
    SWEEP_SEED,
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
    sweep_runs,
    table_runs,
)
from paint_engine.config.bundled import BUNDLED, TINY_BASE, TINY_TEACHER
from paint_engine.config.command_line import load_config
from paint_engine.config.schema import Config
from paint_engine.tiny.pretrain import SIZES
from paint_engine.tiny.problems import load_split

ALL = (1, 2, 3, 4)


def config_of(run: PlannedRun, scale: Scale = LAPTOP) -> Config:
    rate = None if run.setting == BASE else 1e-4
    return load_config(arguments(preset_of(run), overrides(scale, run, rate))).config


def test_the_plan_has_the_papers_rows_once_each() -> None:
    runs = table_runs(LAPTOP, ALL)
    # 3 sizes x (base + 4 recipes) x 5 seeds, and 7 + 4 + 5 further settings x 3 seeds.
    assert len(runs) == 3 * 5 * 5 + 16 * 3
    assert len({run.run_id for run in runs}) == len(runs)
    assert [len(table.rows) for table in TABLES if table.number in ALL] == [5, 7, 5, 7]
    # 4 recipes x 3 sizes x 3 learning rates, none of them on a seed of the tables.
    sweep = sweep_runs(LAPTOP, ALL)
    assert len({run.run_id for run in sweep}) == len(sweep) == 36
    assert SWEEP_SEED not in {run.seed for run in runs}
    assert {run.seed for run in sweep} == {SWEEP_SEED}


def test_rows_of_several_tables_are_run_once() -> None:
    alone = {number: {r.run_id for r in table_runs(LAPTOP, (number,))} for number in ALL}
    unchanged = {f"small/rho-0.40-0.30/seed-{seed}" for seed in range(3)}
    assert alone[2] & alone[3] & alone[4] == unchanged
    assert not alone[1] & alone[2]
    assert alone[1] & alone[4] == {f"small/paint/seed-{seed}" for seed in range(3)}


def test_quick_is_one_size_and_fewer_rows() -> None:
    scale = quick(LAPTOP)
    runs = table_runs(scale, ALL)
    assert {run.size for run in runs} == {"small"}
    assert len(runs) == 9 * 2 and len(sweep_runs(scale, ALL)) == 4 * 3
    assert scale.num_steps < LAPTOP.num_steps and scale.name == "laptop-quick"


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


def test_every_recipe_has_the_same_grid_on_validation_problems_alone() -> None:
    sweep = sweep_runs(LAPTOP, ALL)
    for size in LAPTOP.sizes:
        for recipe in RECIPES:
            runs = [run for run in sweep if (run.size, run.setting) == (size, recipe)]
            assert tuple(run.rate for run in runs) == LAPTOP.rates
    budgets = [overrides(LAPTOP, run, run.rate) for run in sweep]
    assert {values.pop("optim.learning_rate") for values in budgets} == {
        "0.0001",
        "0.0003",
        "0.001",
    }
    assert all(values == budgets[0] for values in budgets)
    assert budgets[0]["eval.split"] == "validation"
    names = [
        {problem.problem for problem in load_split(split)}
        for split in ("train", "validation", "test")
    ]
    assert len(set().union(*names)) == sum(map(len, names))


def test_scales_have_bases_that_the_pretraining_script_knows() -> None:
    for scale in (LAPTOP, GPU):
        assert set(scale.sizes) <= set(SIZES)
        assert list(scale.sizes) == sorted(scale.sizes, key=lambda size: SIZES[size].hidden_size)
        assert len(scale.sizes) == len(published.TABLE_1)


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
    assert len(runs) == 7 * 3 and len(sweep_runs(LAPTOP, (5,))) == 5 * 3
    configs = {run.setting: config_of(run) for run in runs if run.setting not in EVALUATED}
    assert set(configs) == set(TEACHERS)
    for config in configs.values():
        assert (config.train.num_steps, config.train.batch_size) == (20, 32)
        assert config.eval.num_problems == 256 and config.lora == configs["paint"].lora
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


@pytest.mark.parametrize("setting", ABLATIONS)
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
    assert "100m/paint/seed-4" in printed and "sweep/10m/grpo/rate-0.001" in printed
    assert len(printed) == 3 * 5 * 5 + 3 * 4 * 5
