"""The paper's tables: statistics, the page and the figure, reruns, and one real run."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import paper_tables
from bench.figures import COLOURS
from bench.paper import published
from bench.paper.figures import draw_tables
from bench.paper.markdown import (
    LABELS,
    PAPER_TABLES,
    against_opsd_table,
    difference_cells,
    document,
)
from bench.paper.plan import (
    BASE,
    LAPTOP,
    RECIPES,
    SCALES,
    TEACHER,
    TEACHERS,
    Job,
    Scale,
    base_directory,
    base_sha256,
    quick,
    sweep_runs,
    table_runs,
)
from bench.paper.result import build_result, find_runs, rerun
from bench.paper.runs import best_rates, make_jobs
from bench.paper.stats import decode_counts, encode_counts, hierarchical_bootstrap, row_numbers

ALL = (1, 2, 3, 4)
Planted = Callable[[Job], dict[str, Any]]
MICRO = replace(
    quick(LAPTOP),
    name="laptop",
    num_steps=2,
    batch_size=8,
    num_problems=4,
    sweep_problems=4,
    main_seeds=(0,),
    rates=(1e-4,),
    rows=(BASE, "paint"),
)


# Statistics


def test_counts_come_back_from_their_text() -> None:
    correct = np.random.default_rng(0).random((50, 12)) < 0.5
    text = encode_counts(correct)
    assert len(text) == 50
    assert decode_counts(text).tolist() == correct.sum(axis=1).tolist()


def test_the_interval_of_two_values_by_hand() -> None:
    """One of two problems, or seeds, gained: a resample draws it 0, 1 or 2 times, with probability
    1/4, 1/2 and 1/4."""
    for shape in ((1, 2), (2, 1)):
        row = np.array([1.0, 0.0]).reshape(shape)
        assert hierarchical_bootstrap(row, np.zeros(shape)) == (0.5, 0.0, 1.0)


def test_what_both_rows_share_does_not_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    row, reference = rng.random((2, 3, 40))
    difficulty = 100 * rng.random(40) + 50 * rng.random((3, 1))
    plain = hierarchical_bootstrap(row, reference)
    shared = hierarchical_bootstrap(row + difficulty, reference + difficulty)
    assert np.allclose(plain, shared, atol=1e-10)


@pytest.mark.parametrize(
    ("num_seeds", "seed_std", "lowest", "highest", "half_width"),
    [(5, 0.0, 0.98, 1.0, 3.6), (5, 0.02, 0.94, 1.0, 4.2), (3, 0.03, 0.84, 0.95, 5.6)],
)
def test_intervals_cover_the_truth_as_often_as_the_docstring_says(
    num_seeds: int, seed_std: float, lowest: float, highest: float, half_width: float
) -> None:
    """Rows of equal accuracy on 256 problems with two answers each.

    half_width: upper limit of the mean interval's half width, in points.
    """
    rng = np.random.default_rng(0)
    held, widths = 0, []
    for _ in range(200):
        problems = rng.beta(4, 1.2, 256)
        seeds = seed_std * rng.standard_normal((2, num_seeds, 1))
        row, reference = rng.binomial(2, np.clip(problems + seeds, 0, 1)) / 2
        _, low, high = hierarchical_bootstrap(row, reference, num_resamples=400)
        held += low <= 0 <= high
        widths.append(high - low)
    assert lowest <= held / 200 <= highest
    assert 0.5 * half_width < 50 * np.mean(widths) < half_width


def test_seeds_are_counted_above_and_equal() -> None:
    """Three seeds of two problems with two answers each: one above, one equal, one below."""

    def records(*seeds: str) -> list[dict[str, Any]]:
        return [
            {
                "num_samples": 2,
                "learning_rate": 1e-4,
                "seconds": 1.0,
                "evaluations": [{"avg_at_k": decode_counts(c).sum() / 4, "correct": c}],
            }
            for c in seeds
        ]

    row = row_numbers("paint", records("21", "02", "00"), {"opsd": records("20", "11", "10")})
    (found,) = row["differences"]
    assert (found["seeds_above"], found["seeds_equal"]) == (1, 1)
    assert difference_cells(row, "opsd")[2] == "1 of 3, 1 equal"


# The result and its page


@pytest.fixture
def result(
    bases: Path, tmp_path: Path, jobs_of: Callable[[Scale], list[Job]], planted_record: Planted
) -> dict[str, Any]:
    records = {job.run.run_id: planted_record(job) for job in jobs_of(LAPTOP)}
    sweep = make_jobs(sweep_runs(LAPTOP, ALL), LAPTOP, {}, bases, tmp_path / "runs")
    swept = {job.run.run_id: planted_record(job) for job in sweep}
    _, choices = best_rates(LAPTOP, list(swept.values()))
    described = [
        {
            "size": size,
            "num_parameters": 1_000_000,
            "num_steps": 1300,
            "sha256": base_sha256(base_directory(bases, size)),
        }
        for size in LAPTOP.sizes
    ]
    return build_result(LAPTOP, ALL, described, records, choices, swept, 2)


def row_of(result: dict[str, Any], table: int, setting: str) -> dict[str, Any]:
    panel = next(panel for panel in result["tables"] if panel["table"] == table)
    return next(row for row in panel["rows"] if row["setting"] == setting)


def test_the_result_holds_what_its_numbers_come_from(result: dict[str, Any]) -> None:
    assert json.loads(paper_tables.dump(result)) == json.loads(json.dumps(result))
    assert len(result["runs"]) == 123 + 36
    assert result["seconds"] == {"tables": 123 * 60.0, "learning_rates": 36 * 60.0}
    row = row_of(result, 4, "paint")
    shares = [
        decode_counts(run["evaluations"][-1]["correct"]).mean() / run["num_samples"]
        for run in result["runs"]
        if run["id"].startswith("small/paint/") and run["seed"] < 3
    ]
    assert np.isclose(row["last"], np.mean(shares)) and len(row["last_by_seed"]) == 3
    assert np.isclose(row["seed_std"], np.std(shares, ddof=1))
    assert row["best"] >= row["last"]
    for run in result["runs"]:
        assert "/tmp" not in json.dumps(run), "a path of the machine"


def test_planted_differences_are_found(result: dict[str, Any]) -> None:
    to_base, to_opsd = row_of(result, 1, "paint")["differences"]
    assert (to_base["reference"], to_opsd["reference"]) == (BASE, "opsd")
    assert to_base["low"] < 0.2 < to_base["high"] and to_base["verdict"] == "above"
    assert to_opsd["low"] < 0.1 < to_opsd["high"] and to_opsd["verdict"] == "above"
    assert row_of(result, 3, "place-prefix")["differences"][0]["verdict"] == "below"
    assert row_of(result, 1, BASE)["differences"] == []


def test_the_page_shows_every_row_beside_the_papers(result: dict[str, Any]) -> None:
    page = document(result, "paper-tables.png")
    for rows in published.TABLE_1.values():
        assert all(f"{row[-1]} (Qwen3-" in page for row in rows.values())
    assert "| prefix |" in page and "| 56.1 | -2.5 |" in page
    assert "| 0.50 | 0.30 |" in page and "| 57.8 | -0.8 |" in page
    assert "| 0.03 | 0.05 |" in page and "| 58.9 | -0.8 |" in page
    assert "within noise" in page and "they do not show" in page and "Not a result" not in page
    # Nothing is invented for rows that the paper lacks.
    sentence = next(line for line in page.splitlines() if "| suffix, at a sentence's end" in line)
    assert sentence.endswith("| none | none |")
    assert "Not a result" in document({**result, "quick": True}, "x.png")


def test_the_rates_are_shown_as_they_were_chosen(result: dict[str, Any]) -> None:
    """The best rate is bold, the grid's edges are marked, and Table 1 shows each recipe's rate."""
    rates = LAPTOP.rates
    lines = PAPER_TABLES["paper-tables", "rates"](result).splitlines()[2:]
    choices = {(c["size"], c["recipe"]): c for c in result["learning_rates"]}
    expected = [(size, recipe) for size in LAPTOP.sizes for recipe in RECIPES]
    for line, pair in zip(lines, expected, strict=False):
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        assert cells[:2] == [pair[0], LABELS[pair[1]]]
        bold = [rate for rate, cell in zip(rates, cells[2:5], strict=True) if "**" in cell]
        assert bold == [choices[pair]["chosen"]]
        assert cells[5] == ("yes" if bold[0] in (rates[0], rates[-1]) else "")
    table = PAPER_TABLES["paper-tables", "1"](result)
    recipe = next(line for line in table.splitlines() if "| GRPO |" in line)
    # The planted runs have this rate, whatever the planted sweep chose.
    assert "| 0.0001 |" in recipe


def test_paint_is_compared_with_opsd_beside_the_papers_gains(result: dict[str, Any]) -> None:
    """The gains that the paper's text names: 1.1 points on 1.7B, 0.8 on 4B, 2.1 on 8B."""
    lines = against_opsd_table(result).splitlines()[2:]
    gains = ("+1.1 (Qwen3-1.7B)", "+0.8 (Qwen3-4B)", "+2.1 (Qwen3-8B)")
    assert [line.split(" | ")[-1] for line in lines] == [f"{gain} |" for gain in gains]
    panel = next(panel for panel in result["tables"] if panel["size"] == "small")
    rows = {row["setting"]: row for row in panel["rows"]}
    cells = lines[0].split(" | ")
    assert cells[1:3] == [f"{rows[name]['last']:.1%}" for name in ("opsd", "paint")]
    gained = {key: 100 * (rows["paint"][key] - rows["opsd"][key]) for key in ("last", "best")}
    assert cells[3].startswith(f"{gained['last']:+.1f} (") and cells[4] == "above"
    above = sum(
        paint > opsd
        for paint, opsd in zip(*(rows[n]["last_by_seed"] for n in ("paint", "opsd")), strict=True)
    )
    assert cells[5:7] == [f"{above} of 5", "0.0001, 0.0001"]
    assert cells[7] == f"{gained['best']:+.1f}"


def test_the_short_table_has_a_line_per_base(result: dict[str, Any]) -> None:
    lines = PAPER_TABLES["paper-tables", "short"](result).splitlines()
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    rows = {
        row["setting"]: row
        for row in next(p for p in result["tables"] if p["size"] == "small")["rows"]
    }
    assert len(cells) == 2 + len(rows)
    assert cells[1] == f"{rows[BASE]['last']:.1%}"
    to_base, to_opsd = rows["paint"]["differences"]
    assert cells[5].startswith(f"{rows['paint']['last']:.1%}, {100 * to_base['difference']:+.1f} (")
    assert cells[6].startswith(f"{100 * to_opsd['difference']:+.1f} (")
    assert cells[6].endswith(", above")
    assert lines[5] == "" and "Differences are between" in lines[6] and "Paper:" not in lines[6]


def test_a_page_of_some_tables_has_only_these(
    jobs_of: Callable[[Scale], list[Job]], planted_record: Planted
) -> None:
    records = {job.run.run_id: planted_record(job) for job in jobs_of(LAPTOP)}
    described = [{"size": "small", "num_parameters": 886_144, "num_steps": 1, "sha256": "0"}]
    result = build_result(LAPTOP, (2, 3), described, records, [], {}, 2)
    page = document(result, "x.png")
    assert "## Table 2" in page and "## Table 3" in page and "## Table 1" not in page
    assert "models have 0.9 million parameters" in page
    assert "first 3 seeds" not in page
    result = build_result(LAPTOP, (4,), described, records, [], {}, 2)
    assert "first 3 seeds of Table 1" in document(result, "x.png")
    draw_tables(result)


def test_teachers_are_compared_with_no_update_and_with_paint(
    bases: Path, tmp_path: Path, planted_record: Planted
) -> None:
    rates = {("small", recipe): 1e-4 for recipe in TEACHERS}
    jobs = make_jobs(table_runs(LAPTOP, (5,)), LAPTOP, rates, bases, tmp_path / "runs")
    records = {job.run.run_id: planted_record(job) for job in jobs}
    described = [{"size": "small", "num_parameters": 886_144, "num_steps": 1, "sha256": "0"}]
    result = build_result(LAPTOP, (5,), described, records, [], {}, 2)
    assert result["command"].endswith("--tables 5")
    lines = PAPER_TABLES["paper-tables", "5"](result).splitlines()[2:9]
    cells = {line.split(" | ")[0][2:]: line.split(" | ") for line in lines}
    assert list(cells) == [LABELS[setting] for setting in (BASE, TEACHER, *TEACHERS)]
    # PAINT is planted 10 points above the other trained rows, which are 10 above the base.
    control = cells["PAINT with another problem's solution"]
    assert control[5] == "above" and control[8] == "below"
    assert cells["PAINT"][5] == "above" and cells["PAINT"][7:10] == ["", "", ""]
    assert cells["no update"][8] == "below"
    page = document(result, "x.png")
    assert "# Teachers and signals" in page and "another problem's" in page
    assert "Table 1" not in page and "the paper's figures" not in page
    (panel,) = draw_tables(result).subfigs[0].axes
    assert len(panel.get_yticks()) == 6 + 6


def test_the_figure_has_a_panel_per_table_and_base(result: dict[str, Any]) -> None:
    figure = draw_tables(result)
    panels = [axes for part in figure.subfigs for axes in part.axes]
    assert [len(axes.get_yticks()) for axes in panels] == [5, 5, 5, 6, 4, 6]


def test_the_figure_draws_intervals_and_the_papers_marks(result: dict[str, Any]) -> None:
    """Table 3's panel: per row an interval, coloured by the verdict, and the paper's mark."""
    figure = draw_tables(result)
    axes = figure.subfigs[1].axes[1]
    rows = [row for panel in result["tables"] if panel["table"] == 3 for row in panel["rows"]]
    differences = [difference for row in rows for difference in row["differences"]]
    lines = [line for line in axes.lines if line.get_linewidth() == 2]
    for line, found in zip(lines, differences, strict=True):
        ends = np.asarray(line.get_xdata())
        assert ends.tolist() == [100 * found["low"], 100 * found["high"]]
        colour = "floor" if found["verdict"] == "within noise" else "ours"
        assert line.get_color() == COLOURS[colour]
    marks = [line for line in axes.lines if line.get_marker() == "D"]
    positions = [float(np.asarray(mark.get_xdata())[0]) for mark in marks]
    assert np.allclose(positions, [-2.5, -0.8, -1.4])


# Reruns


def test_a_rerun_tells_equal_from_different(
    result: dict[str, Any],
    bases: Path,
    tmp_path: Path,
    planted_record: Planted,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bench.paper.result.perform_job", planted_record)
    with ThreadPoolExecutor(1) as pool:
        lines = rerun(result, "small/paint", bases, tmp_path, pool)
        assert len(lines) == 5 and all(line.endswith("equal") for line in lines)
        run = next(run for run in result["runs"] if run["id"] == "small/paint/seed-3")
        last = run["evaluations"][-1]
        # Other answers with the same mean are not equal.
        last["correct"] = last["correct"][::-1]
        lines = rerun(result, "small/paint/seed-3", bases, tmp_path, pool)
        assert len(lines) == 1 and lines[0].endswith("DIFFERS")


def test_a_rerun_refuses_another_base_and_unknown_rows(
    result: dict[str, Any], bases: Path, tmp_path: Path
) -> None:
    (bases / "medium" / "model.safetensors").write_bytes(b"another")
    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="check --bases"):
        rerun(result, "medium/paint/seed-0", bases, tmp_path, pool)
    with pytest.raises(ValueError, match="no run or row"):
        find_runs(result, "small/pain")
    (bases / "large" / "model.safetensors").unlink()
    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="found no base in"):
        rerun(result, "large/paint", bases, tmp_path, pool)


def test_a_rerun_is_compared_with_the_result_of_its_scale(
    result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paper_tables, "RESULTS", tmp_path)
    with pytest.raises(SystemExit, match=r"paper-tables-laptop-quick\.json does not exist"):
        paper_tables.main(["--rerun", "small/paint", "--quick"])
    (tmp_path / "paper-tables-laptop-quick.json").write_text(paper_tables.dump(result))
    with pytest.raises(SystemExit, match="has scale laptop, not laptop-quick"):
        paper_tables.main(["--rerun", "small/paint", "--quick"])


def test_a_part_of_the_tables_has_a_file_of_its_own() -> None:
    def name(*argv: str) -> str:
        arguments = paper_tables.make_parser().parse_args(argv)
        return paper_tables.output_path(arguments, SCALES[arguments.scale]).name

    assert name() == name("--tables", "4", "3", "2", "1") == "paper-tables.json"
    assert name("--tables", "3", "1") == "paper-tables-1-3.json"
    assert name("--tables", "1", "--rerun", "small/paint") == "paper-tables.json"
    assert name("--scale", "gpu") == "paper-tables-gpu.json"
    assert name("--tables", "2", "--output", "x.json") == "x.json"


# One real run


def test_a_micro_run_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sweep of one rate, the base and PAINT for two steps in a worker process, then a rerun."""
    monkeypatch.setitem(SCALES, "laptop", MICRO)
    output = tmp_path / "micro.json"
    shared = ["--workers", "1", "--bases", str(tmp_path), "--output", str(output)]
    paper_tables.main([*shared, "--tables", "1", "--runs", str(tmp_path / "runs")])
    made = json.loads(output.read_text())
    assert [run["id"] for run in made["runs"]] == [
        "small/base/seed-0",
        "small/paint/seed-0",
        "sweep/small/paint/rate-0.0001",
    ]
    assert [e["step"] for e in made["runs"][1]["evaluations"]] == [1, 2]
    assert [e["step"] for e in made["runs"][2]["evaluations"]] == [2]
    assert output.with_suffix(".png").stat().st_size > 10_000
    assert "PAINT" in output.with_suffix(".md").read_text()
    before = output.read_text()
    paper_tables.main([*shared, "--tables", "1", "--runs", str(tmp_path / "runs")])
    assert output.read_text() == before
    with pytest.raises(SystemExit) as stop:
        paper_tables.main([*shared, "--rerun", "small/paint/seed-0"])
    assert stop.value.code == 0 and "equal" in capsys.readouterr().out
