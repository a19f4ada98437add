"""The paper's tables: the page and the figures, reruns, and one real run."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import paper_tables
from bench.figures import COLOURS
from bench.paper import published
from bench.paper.cells import LABELS
from bench.paper.figures import draw_mechanisms, draw_tables
from bench.paper.ledger import Ledger
from bench.paper.markdown import PAPER_TABLES, against_opsd_table, document
from bench.paper.mechanisms import KINDS, STEP_METRICS
from bench.paper.plan import (
    BASE,
    LAPTOP,
    PLANNED,
    RECIPES,
    SCALES,
    TEACHER,
    TEACHERS,
    Job,
    Scale,
    quick,
    sweep_runs,
)
from bench.paper.result import build_result, find_runs, rerun
from bench.paper.runs import Finished, best_rates, make_jobs
from bench.paper.stats import decode_counts

Planted = Callable[[Job], dict[str, Any]]
MICRO = replace(
    quick(LAPTOP),
    name="laptop",
    num_steps=2,
    batch_size=8,
    num_problems=4,
    sweep_problems=4,
    rates=(1e-4,),
    rows=(BASE, "paint"),
)


# The result and its page


@pytest.fixture
def finished(
    bases: Path, tmp_path: Path, jobs_of: Callable[..., list[Job]], planted_record: Planted
) -> Finished:
    records = {job.run.run_id: planted_record(job) for job in jobs_of(LAPTOP)}
    sweep = make_jobs(sweep_runs(LAPTOP, PLANNED), LAPTOP, {}, bases, tmp_path / "runs")
    swept = {job.run.run_id: planted_record(job) for job in sweep}
    _, choices = best_rates(LAPTOP, list(swept.values()))
    return Finished(records, choices, swept, [])


DESCRIBED = [{"size": "small", "num_parameters": 886_144, "num_steps": 1300, "sha256": "0"}]


@pytest.fixture
def result(finished: Finished) -> dict[str, Any]:
    return build_result(LAPTOP, PLANNED, DESCRIBED, finished, 2)


def row_of(result: dict[str, Any], table: int, setting: str) -> dict[str, Any]:
    panel = next(panel for panel in result["tables"] if panel["table"] == table)
    return next(row for row in panel["rows"] if row["setting"] == setting)


def test_the_result_holds_what_its_numbers_come_from(
    result: dict[str, Any], finished: Finished
) -> None:
    assert json.loads(paper_tables.dump(result)) == json.loads(json.dumps(result))
    assert result["num_runs"] == 215 + 64
    assert result["seconds"] == {"tables": 215 * 60.0, "learning_rates": 64 * 60.0}
    row = row_of(result, 4, "paint")
    shares = [
        decode_counts(run["evaluations"][-1]["correct"]).mean() / run["num_samples"]
        for name, run in finished.records.items()
        if name.startswith("small/paint/")
    ]
    assert np.isclose(row["last"], np.mean(shares)) and len(row["last_by_seed"]) == 20
    assert np.isclose(row["seed_std"], np.std(shares, ddof=1))
    # The ledger has the runs.
    assert "runs" not in result and "/tmp" not in json.dumps(result), "a path of the machine"


def test_a_failure_is_reported(result: dict[str, Any]) -> None:
    assert document(result, "x").endswith("No run failed.\n")
    result["failed"] = ["small/sft/seed-1"]
    assert document(result, "x").endswith("repeated with the same seed: small/sft/seed-1.\n")


def test_planted_differences_are_found(result: dict[str, Any]) -> None:
    to_base, to_opsd = row_of(result, 1, "paint")["differences"]
    assert (to_base["reference"], to_opsd["reference"]) == (BASE, "opsd")
    assert to_base["low"] < 0.2 < to_base["high"] and to_base["verdict"] == "above"
    assert to_opsd["low"] < 0.1 < to_opsd["high"] and to_opsd["verdict"] == "above"
    assert row_of(result, 3, "place-prefix")["differences"][0]["verdict"] == "below"
    assert row_of(result, 1, BASE)["differences"] == []


def test_the_page_shows_every_row_beside_the_papers(result: dict[str, Any]) -> None:
    page = document(result, "paper-tables")
    assert all(f"{r[-1]} (Qwen3-1.7B)" in page for r in published.TABLE_1["Qwen3-1.7B"].values())
    assert "](paper-tables.png)" in page and "](paper-mechanisms.png)" in page
    assert "| prefix |" in page and "| 56.1 | -2.5 |" in page
    assert "| 0.50 | 0.30 |" in page and "| 57.8 | -0.8 |" in page
    assert "| 0.03 | 0.05 |" in page and "| 58.9 | -0.8 |" in page
    # The runs of seed 0 were made with another version than the rest.
    assert "; torch 2.12.1 and 2.13.0; at 0123456789" in page
    assert "within noise" in page and "they do not show" in page and "Not a result" not in page
    # Nothing is invented for rows that the paper lacks.
    sentence = next(line for line in page.splitlines() if "| suffix, at a sentence's end" in line)
    assert sentence.endswith("| none | none |")
    assert "Not a result" in document({**result, "quick": True}, "x")


def test_the_rates_are_shown_as_they_were_chosen(result: dict[str, Any]) -> None:
    """The best rate is bold, the grid's edges are marked, and Table 1 shows each recipe's rate."""
    rates = LAPTOP.rates
    text = PAPER_TABLES["paper-tables", "rates"](result)
    lines = text.splitlines()[2:10]
    choices = {choice["recipe"]: choice for choice in result["learning_rates"]}
    expected = [name for name in LABELS if name in RECIPES + TEACHERS]
    for line, recipe in zip(lines, expected, strict=True):
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        assert cells[:2] == ["small", LABELS[recipe]]
        bold = [rate for rate, cell in zip(rates, cells[2:6], strict=True) if "**" in cell]
        assert bold == [choices[recipe]["chosen"]]
        assert cells[6] == ("yes" if bold[0] in (rates[0], rates[-1]) else "")
    assert "mean of 2 seeds that no table uses" in text and "2,048 answers" in text
    table = PAPER_TABLES["paper-tables", "1"](result)
    recipe = next(line for line in table.splitlines() if "| GRPO |" in line)
    # The planted runs have this rate, whatever the planted sweep chose.
    assert "| 0.0001 |" in recipe


def test_paint_is_compared_with_opsd_beside_the_papers_gain(result: dict[str, Any]) -> None:
    """The gain that the paper's text names: 1.1 points on 1.7B."""
    (line,) = against_opsd_table(result).splitlines()[2:]
    assert line.split(" | ")[-1] == "+1.1 (Qwen3-1.7B) |"
    rows = {name: row_of(result, 1, name) for name in ("opsd", "paint")}
    cells = line.split(" | ")
    assert cells[1:3] == [f"{rows[name]['last']:.1%}" for name in ("opsd", "paint")]
    gained = 100 * (rows["paint"]["last"] - rows["opsd"]["last"])
    assert cells[3].startswith(f"{gained:+.1f} (") and cells[4] == "above"
    above = sum(
        paint > opsd
        for paint, opsd in zip(*(rows[n]["last_by_seed"] for n in ("paint", "opsd")), strict=True)
    )
    assert cells[5:7] == [f"{above} of 20", "0.0001, 0.0001"]


def test_the_short_table_has_a_line_per_base(result: dict[str, Any]) -> None:
    lines = PAPER_TABLES["paper-tables", "short"](result).splitlines()
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert len(cells) == 2 + 6
    assert cells[1] == f"{row_of(result, 1, BASE)['last']:.1%}"
    paint = row_of(result, 1, "paint")
    to_base, to_opsd = paint["differences"]
    assert cells[5].startswith(f"{paint['last']:.1%}, {100 * to_base['difference']:+.1f} (")
    assert cells[7].startswith(f"{100 * to_opsd['difference']:+.1f} (")
    assert cells[7].endswith(", above")
    assert lines[3] == "" and "Differences are between" in lines[4] and "Paper:" not in lines[4]


def test_the_control_has_a_row_that_the_paper_lacks(result: dict[str, Any]) -> None:
    table = PAPER_TABLES["paper-tables", "1"](result)
    control = next(line for line in table.splitlines() if "another problem's solution" in line)
    assert control.endswith("| none | none |")


def test_a_page_of_some_tables_has_only_these(finished: Finished) -> None:
    result = build_result(LAPTOP, (2, 3), DESCRIBED, finished, 2)
    page = document(result, "x")
    assert "## Table 2" in page and "## Table 3" in page and "## Table 1" not in page
    assert "PAINT is above OPSD" not in page and "the suffix is above the prefix" in page
    assert "Table 5" not in page and "use PAINT's rate" in page
    # The mechanisms of PAINT's row are shown where it was run.
    assert "digit of a result" not in page and "mask 0.75 / 0.75" in page
    draw_tables(result)
    draw_mechanisms(result)


def test_the_page_says_how_its_answers_were_sampled(result: dict[str, Any]) -> None:
    text = PAPER_TABLES["paper-tables", "limits"]({**result, "sampling": SAMPLED})
    assert "temperature 0.7 and top-p 0.95. They have up to\n  99 tokens" in text
    assert "The model has 0.9 million parameters" in text and "share seeds, less one" in text
    assert "GRPO and SDPO spend 8 rollouts on each problem, 4 problems" in text
    assert "{" not in text and "279 runs took" in text


SAMPLED = {"temperature": 0.7, "top_p": 0.95, "max_new_tokens": 99}


def test_teachers_are_compared_with_no_update_and_with_paint(finished: Finished) -> None:
    result = build_result(LAPTOP, (5,), DESCRIBED, finished, 2)
    assert result["command"].endswith("--tables 5")
    lines = PAPER_TABLES["paper-tables", "5"](result).splitlines()[2:9]
    cells = {line.split(" | ")[0][2:]: line.split(" | ") for line in lines}
    assert list(cells) == [LABELS[setting] for setting in (BASE, TEACHER, *TEACHERS)]
    # PAINT is planted 10 points above the other trained rows, which are 10 above the base.
    control = cells["PAINT with another problem's solution"]
    assert control[4] == "above" and control[7] == "below"
    assert cells["PAINT"][4] == "above" and cells["PAINT"][6:9] == ["", "", ""]
    assert cells["no update"][7] == "below"
    page = document(result, "x")
    assert "# Other teachers, contexts and signals at" in page and "another problem's" in page
    assert "Table 1" not in page and "the paper's figures" not in page
    (panel,) = draw_tables(result).subfigs[0].axes
    names = [label.get_text() for label in panel.get_yticklabels()]
    # First to no update, as the title says, then to PAINT.
    assert len(names) == 6 + 6 and names[0] == LABELS[TEACHER]
    assert names[6] == "no update over PAINT"


def test_the_table_of_the_clip_says_that_it_was_added(
    result: dict[str, Any], jobs_of: Callable[..., list[Job]], planted_record: Planted
) -> None:
    records = {job.run.run_id: planted_record(job) for job in jobs_of(LAPTOP, (6,))}
    clip = build_result(LAPTOP, (6,), DESCRIBED, Finished(records, [], {}, []), 2)
    assert clip["command"].endswith("--tables 6") and clip["claims"] == []
    page = document(clip, "x")
    assert page.startswith("# The clip (exploratory) at laptop scale")
    assert "**Exploratory:** not part of the plan" in page and "| PAINT without the clip (" in page
    assert "not part of the plan" not in document(result, "x")
    (panel,) = [axes for part in draw_tables(clip).subfigs for axes in part.axes]
    # Four rows against the base, three of them and the base against PAINT.
    assert len(panel.get_yticks()) == 8


def test_the_figure_has_a_panel_per_table(result: dict[str, Any]) -> None:
    figure = draw_tables(result)
    panels = [axes for part in figure.subfigs for axes in part.axes]
    assert [len(axes.get_yticks()) for axes in panels] == [6, 6, 4, 6, 12]


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


def test_the_mechanisms_are_drawn_from_the_rows_that_were_run(result: dict[str, Any]) -> None:
    entropy, way, selected, divergence = draw_mechanisms(result).axes
    # Seven mask ratios, at the mean over the seeds.
    assert len(entropy.lines) == 7
    assert np.allclose(np.asarray(entropy.lines[0].get_ydata()), 0.1 + 0.01 * 4.5)
    lines = {line.get_label(): line for line in way.lines}
    assert list(np.asarray(lines["OPSD"].get_xdata())) == list(range(5, 21, 5))
    assert list(np.asarray(lines["SFT"].get_xdata())) == [20]
    squares = [line for line in way.lines if line.get_marker() == "s"]
    steps = [float(np.asarray(square.get_xdata())[0]) for square in squares]
    # The base's answers, and those of eight rows after the last step.
    assert sorted(steps) == [0] + [20] * 8
    widths = [bar.get_width() for bar in selected.patches]
    # 24 of 32 selected tokens are digits of results, which are 200 of 800.
    assert widths[0] == pytest.approx(0.75 / 0.25)
    widths = [bar.get_width() for bar in divergence.patches]
    # Without the clip, then with it.
    assert widths[0] == pytest.approx(0.0075) and widths[len(KINDS)] == pytest.approx(-0.0025)


def test_the_mechanisms_are_tabled(result: dict[str, Any]) -> None:
    text = PAPER_TABLES["paper-tables", "mechanisms"](result)
    assert "| digit of a result | 25.0% | 75.0% | 3.00 | 20.0% | 0.0075 | -0.0025 |" in text
    assert text.count("| 20.0% | 0.0150 | 0.0100 |") == 3
    # 800 tokens in each of 20 runs; PAINT is planted to go "together" 15 of 20 times at the end.
    assert "16,000 tokens" in text
    assert "| PAINT | 75.0% | 25.0% | 5.0% |" in text
    assert "| no update | 50.0% | 25.0% | 5.0% |" in text


# Reruns


@pytest.fixture
def ledger(tmp_path: Path, jobs_of: Callable[..., list[Job]], planted_record: Planted) -> Ledger:
    made = Ledger(tmp_path / "runs.jsonl")
    made.records = {job.run.run_id: planted_record(job) for job in jobs_of(LAPTOP)}
    return made


def test_a_rerun_tells_equal_from_different(
    ledger: Ledger,
    bases: Path,
    tmp_path: Path,
    planted_record: Planted,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bench.paper.result.perform_job", planted_record)
    with ThreadPoolExecutor(1) as pool:
        lines = rerun(ledger, LAPTOP, "small/paint", bases, tmp_path, pool)
        assert len(lines) == 20 and all(line.endswith("equal") for line in lines)
        last = ledger.records["small/paint/seed-3"]["evaluations"][-1]
        # Other answers with the same mean are not equal.
        last["correct"] = last["correct"][::-1]
        lines = rerun(ledger, LAPTOP, "small/paint/seed-3", bases, tmp_path, pool)
        assert len(lines) == 1 and lines[0].endswith("DIFFERS")


def test_a_rerun_refuses_another_base_and_unknown_rows(
    tmp_path: Path,
    bases: Path,
    jobs_of: Callable[[Scale], list[Job]],
    planted_record: Planted,
) -> None:
    scale = replace(LAPTOP, sizes=("small", "10m", "30m"), seeds=(0, 1))
    ledger = Ledger(tmp_path / "runs.jsonl")
    ledger.records = {job.run.run_id: planted_record(job) for job in jobs_of(scale)}
    (bases / "10m" / "model.safetensors").write_bytes(b"another")
    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="check --bases"):
        rerun(ledger, scale, "10m/paint/seed-0", bases, tmp_path, pool)
    with pytest.raises(ValueError, match="no run or row"):
        find_runs(ledger, scale, "small/pain")
    (bases / "30m" / "model.safetensors").unlink()
    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="found no base in"):
        rerun(ledger, scale, "30m/paint/seed-0", bases, tmp_path, pool)


def test_a_rerun_reads_the_ledger_of_its_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paper_tables, "RESULTS", tmp_path)
    with pytest.raises(SystemExit, match=r"paper-runs-laptop-quick\.jsonl does not exist"):
        paper_tables.main(["--rerun", "small/paint", "--quick"])
    with pytest.raises(SystemExit, match=r"paper-runs\.jsonl does not exist"):
        paper_tables.main(["--rerun", "small/paint"])


def test_a_part_of_the_tables_has_a_file_of_its_own() -> None:
    def name(*argv: str) -> str:
        arguments = paper_tables.make_parser().parse_args(argv)
        return paper_tables.output_path(arguments, SCALES[arguments.scale]).name

    assert name() == name("--tables", "5", "4", "3", "2", "1") == "paper-tables.json"
    assert name("--tables", "3", "1") == "paper-tables-1-3.json"
    assert name("--scale", "gpu") == "paper-tables-gpu.json"
    assert name("--tables", "2", "--output", "x.json") == "x.json"


# One real run


def test_uncommitted_changes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.measure.git", lambda *arguments: " M bench/paper/plan.py")
    with pytest.raises(SystemExit, match=r"bench/paper/plan\.py[\s\S]*--allow-changes"):
        paper_tables.main(["--quick"])


def test_a_micro_run_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sweep of one rate, the base and PAINT for two steps in a worker process, then a rerun."""
    monkeypatch.setitem(SCALES, "laptop", MICRO)
    output, ledger = tmp_path / "micro.json", tmp_path / "runs.jsonl"
    shared = ["--workers", "1", "--bases", str(tmp_path), "--ledger", str(ledger)]
    made = [*shared, "--tables", "1", "--allow-changes", "--output", str(output)]
    made += ["--runs", str(tmp_path / "runs")]
    paper_tables.main([*made, "--minutes", "0"])
    assert "5 runs are left" in capsys.readouterr().out and not output.exists()
    paper_tables.main(made)
    records = Ledger(ledger).records
    assert list(records) == [
        "sweep/small/paint/rate-0.0001/seed-100",
        *("small/base/seed-0", "small/paint/seed-0"),
        *("small/base/seed-1", "small/paint/seed-1"),
    ]
    steps = [[e["step"] for e in record["evaluations"]] for record in records.values()]
    assert steps == [[2], [0], [2], [0], [2]]
    check_mechanisms(records["small/paint/seed-0"])
    assert records["small/base/seed-0"]["mechanisms"] is None
    assert output.with_suffix(".png").stat().st_size > 10_000
    assert (tmp_path / "micro-mechanisms.png").stat().st_size > 10_000
    assert "PAINT" in output.with_suffix(".md").read_text()
    before = output.read_text()
    paper_tables.main(made)
    assert output.read_text() == before
    with pytest.raises(SystemExit) as stop:
        paper_tables.main([*shared, "--rerun", "small/paint/seed-0"])
    assert stop.value.code == 0 and "equal" in capsys.readouterr().out


def check_mechanisms(record: dict[str, Any]) -> None:
    """Two steps with 4 kept rollouts each, in one block."""
    found = record["mechanisms"]
    assert all(len(values) == 2 for values in found["steps"].values())
    assert set(found["steps"]) == set(STEP_METRICS)
    (block,) = found["blocks"]
    assert (block["step"], block["solutions"]) == (2, 8)
    tokens = sum(found["kinds"][kind]["tokens"] for kind in KINDS)
    assert tokens > 8
    loss, divergence, selected, by_chance = (
        sum(one[name] for one in found["kinds"].values())
        for name in ("token_loss", "token_kl", "selected", "by_chance")
    )
    assert divergence > 0 and loss < divergence
    assert 0 < selected < tokens and by_chance == pytest.approx(selected, rel=1e-3)
    assert record["versions"]["torch"] == torch.__version__
    assert record["evaluations"][-1]["style"]["solutions"] == 8
    assert len(json.dumps(found)) < 4000
