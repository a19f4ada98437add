"""Table 1: its numbers against hand-computed ones, and three checkpoints by two seeds for real."""

import json
import re
import shlex
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
from exit_codes import exit_code
from rich.table import Table

from paint_engine import evaluate
from paint_engine.config.templates import STUDENT
from paint_engine.evaluation import run as evaluation_run
from paint_engine.evaluation.accuracy import avg_at_k, correct_matrix
from paint_engine.evaluation.flags import parse_table1
from paint_engine.evaluation.store import EvalSample, Evaluation, Header, read_evaluation
from paint_engine.evaluation.table1 import choice_table, step_table, summarise_run

main = partial(exit_code, evaluate.main)

# Correct answers, of four to each of two problems of "a" and of one of "b", by step and seed.
CORRECT = {
    0: {0: ((2, 2), 1), 1: ((2, 2), 1)},
    25: {0: ((4, 3), 1), 1: ((4, 4), 2)},
    50: {0: ((3, 3), 2), 1: ((3, 4), 2)},
    75: {0: ((2, 2), 4), 1: ((1, 1), 4)},
}


def stored(name: str, step: int, counts: Sequence[int]) -> Evaluation:
    """An evaluation with so many correct answers to each problem."""
    samples = [
        EvalSample(f"{name}:{i}", j, "", 5, None, j < count, False, None)
        for i, count in enumerate(counts)
        for j in range(4)
    ]
    problems = {f"{name}:{i}": "mark" for i in range(len(counts))}
    return Evaluation(Header(name, {"num_samples": 4}, {}, problems, step), 1.0, samples)


def test_the_numbers_by_hand() -> None:
    found = summarise_run(
        {
            step: {
                seed: {"a": stored("a", step, a), "b": stored("b", step, (b,))}
                for seed, (a, b) in by_seed.items()
            }
            for step, by_seed in CORRECT.items()
        }
    )
    assert (found["num_samples"], found["num_problems"]) == (4, {"a": 2, "b": 1})
    rows = {row["step"]: row for row in found["steps"]}
    assert list(rows) == [0, 25, 50, 75]
    # Step 25: on "a" 7/8 and 8/8, on "b" 1/4 and 2/4.
    a, b, macro = *rows[25]["benchmarks"].values(), rows[25]["macro"]
    assert a["seeds"] == {"0": 7 / 8, "1": 1.0} and a["value"] == 15 / 16
    assert b["seeds"] == {"0": 0.25, "1": 0.5} and b["value"] == 3 / 8
    assert macro["seeds"] == {"0": 9 / 16, "1": 3 / 4}
    assert macro["value"] == pytest.approx(21 / 32)
    # Of two values, the standard deviation is their difference over the root of 2.
    assert macro["deviation"] == pytest.approx((3 / 16) / 2**0.5)
    assert b["ci95"] == [3 / 8, 3 / 8]
    # The problems of "a" have 8/8 and 7/8; a quarter of the resamples have one of them alone.
    assert a["ci95"] == [7 / 8, 1.0]
    # Macro: 25 has 21/32, 50 has (13/16 + 1/2) / 2 = 21/32 too, 75 has (3/8 + 1) / 2 = 11/16.
    assert rows[50]["macro"]["value"] == pytest.approx(21 / 32)
    assert found["best_by_macro"] == found["last"] == rows[75]
    assert rows[75]["macro"]["value"] == pytest.approx(11 / 16)
    assert found["best_by_benchmark"] == {"a": rows[25], "b": rows[75]}
    # No model has this: "a" of step 25 and "b" of step 75.
    assert found["maximum_per_benchmark"] == {
        "benchmarks": {"a": 15 / 16, "b": 1.0},
        "steps": {"a": 25, "b": 75},
        "macro": pytest.approx(31 / 32),
    }
    shown = rows_of(step_table("runs/x", found))
    assert [row[0] for row in shown] == ["base", "25", "50", "75"]
    low, high = (100 * bound for bound in macro["ci95"])
    assert shown[1][3] == f"65.6 ±13.3\n[{low:.1f}, {high:.1f}]"
    assert rows_of(choice_table(found)) == [
        ("last step", "75", "37.5", "100.0", "68.8"),
        ("best step by macro average", "75", "37.5", "100.0", "68.8"),
        ("best step by a", "25", "93.8", "37.5", "65.6"),
        ("best step by b", "75", "37.5", "100.0", "68.8"),
        ("maximum of each benchmark", "25, 75", "93.8", "100.0", "96.9"),
    ]


def rows_of(table: Table) -> list[tuple[object, ...]]:
    return list(zip(*(list(column.cells) for column in table.columns), strict=True))


def test_the_page_s_commands_parse_and_its_names_are_those_of_the_record() -> None:
    page = (Path(__file__).parents[3] / "docs" / "reproducing.md").read_text()
    found = re.findall(r"^python -m paint_engine\.evaluate table1 (.*)$", page, re.MULTILINE)
    templates = {
        parse_table1(shlex.split(text)).evaluation.prompts.student_template for text in found
    }
    assert templates == {STUDENT, "{problem}\n\n{instruction}"}
    summary = summarise_run({25: {0: {"a": stored("a", 25, (1,))}}})
    rows = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    assert rows == summary.keys() - {"num_samples", "num_problems"}


def test_of_a_tie_the_later_step_is_best_and_one_seed_has_no_spread() -> None:
    found = summarise_run(
        {step: {3: {"a": stored("a", step, (2, 1))}} for step in (25, 50)}
        | {75: {3: {"a": stored("a", 75, (1, 1))}}}
    )
    assert found["best_by_macro"]["step"] == found["maximum_per_benchmark"]["steps"]["a"] == 50
    assert found["last"]["step"] == 75
    assert found["last"]["macro"]["deviation"] is None
    assert "±" not in str(rows_of(step_table("x", found)))


def test_three_checkpoints_by_two_seeds_on_two_benchmarks(
    command: list[str],
    run_main: Callable[[Sequence[str]], int],
    write_rows: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, out = tmp_path / "run", tmp_path / "table"
    training = [*command, "--eval.enabled", "false", "--checkpoint.keep", "5"]
    assert run_main([*training, "--train.num_steps", "4"]) == 0
    first, second = write_rows(tmp_path / "a.jsonl", 3), write_rows(tmp_path / "b.jsonl", 2)
    built: list[object] = []
    original = evaluation_run.build_engine

    def build(*arguments: object, **options: object) -> object:
        built.append(arguments[0])
        return original(*arguments, **options)

    monkeypatch.setattr(evaluation_run, "build_engine", build)
    argv = (
        *("table1", run, "--steps", 1, 2, 4, "--seeds", 0, 1, "--base"),
        *("--benchmarks", f"{first},{second}", "--num-samples", 2, "--max-new-tokens", 6),
        *("--engine", "builtin", "--device", "cpu", "--output", out),
        *("--json", tmp_path / "table1.json"),
    )
    assert main(*argv) == 0
    # One engine for both seeds of a checkpoint.
    assert len(built) == 4
    directories = sorted(path.name for path in out.iterdir())
    assert len(directories) == 8
    assert sum(name.startswith("run-step-4-") for name in directories) == 2
    summary = json.loads((tmp_path / "table1.json").read_text())["runs"][str(run)]
    assert [row["step"] for row in summary["steps"]] == [0, 1, 2, 4]
    # The stored answers have the numbers that were printed.
    for directory in out.glob("run-step-2-*"):
        averages = []
        for name in ("a", "b"):
            found = read_evaluation(directory / f"{name}.json")
            averages.append(avg_at_k(correct_matrix(found.samples)))
            (row,) = (row for row in summary["steps"] if row["step"] == 2)
            seed = str(found.settings["seed"])
            assert row["benchmarks"][name]["seeds"][seed] == averages[-1]
        assert row["macro"]["seeds"][seed] == sum(averages) / 2
    texts = {path.read_bytes() for path in out.glob("*/a.jsonl")}
    # Every checkpoint and every seed has answers of its own.
    assert len(texts) == 8
    printed = capsys.readouterr().out
    assert "best step by macro average" in printed and "maximum of each benchmark" in printed
    # What is there is not sampled again; a missing evaluation is.
    before, removed = (tmp_path / "table1.json").read_bytes(), next(out.glob("run-step-4-*"))
    (removed / "b.json").unlink()
    built.clear()
    assert main(*argv) == 0
    assert len(built) == 1 and (removed / "b.json").is_file()
    assert (tmp_path / "table1.json").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", "1", "1"], "--seeds: got 1, 1; needs each once"),
        (["--steps", "25", "25"], "--steps: got 25, 25; needs each once"),
        (["--adapter", "x"], "unrecognized arguments: --adapter x"),
        (["--num-samples", "0"], "--num-samples: got 0"),
        (["--benchmarks", "aime2024"], "did you mean aime24"),
    ],
)
def test_mistakes_of_the_command_line(flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_table1(["run", *flags])


def test_the_paper_s_protocol_is_the_default() -> None:
    command = parse_table1(["runs/a", "runs/b"])
    assert (command.runs, command.steps, command.seeds) == (("runs/a", "runs/b"), None, (0,))
    assert [b.name for b in command.evaluation.benchmarks] == ["aime24", "aime25", "hmmt25"]
    section = command.evaluation.section
    assert (section.num_samples, section.max_new_tokens, section.temperature) == (12, 38912, 1.0)


def test_a_run_without_these_checkpoints_is_refused(
    command: list[str],
    run_main: Callable[[Sequence[str]], int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_main([*command, "--eval.enabled", "false", "--train.num_steps", "2"]) == 0
    capsys.readouterr()
    assert main("table1", tmp_path / "run", "--steps", 2, 25, 50, "--device", "cpu") == 2
    assert "has no checkpoint of step 25, 50; it has 1, 2" in capsys.readouterr().out
    assert main("table1", tmp_path, "--device", "cpu") == 2
    assert "no checkpoint to evaluate" in capsys.readouterr().out
