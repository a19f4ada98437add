"""docs/evaluation.md: its commands parse, and its tables and its example are what the code has."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from paint_engine.config.benchmarks import KNOWN, parse_benchmarks
from paint_engine.config.command_line import load_config
from paint_engine.config.sections import EvalSection
from paint_engine.distributed import World
from paint_engine.evaluation import compare
from paint_engine.evaluation.accuracy import NUM_RESAMPLES
from paint_engine.evaluation.flags import parse_arguments, parse_comparison, section_of
from paint_engine.evaluation.lengths import answers_of, length_statistics
from paint_engine.evaluation.results import measures, results_table
from paint_engine.evaluation.store import EvalSample

PAGE = Path(__file__).parents[3] / "docs" / "evaluation.md"
WORLD = World(0, 1, 0, torch.device("cpu"))


def spans(pattern: str) -> list[str]:
    # A shell joins lines that end with a backslash.
    text = PAGE.read_text().replace("\\\n", "")
    found = re.findall(pattern, text, re.MULTILINE)
    assert found
    return found


def cells(header: str) -> list[list[str]]:
    """The rows of the table with this header, backticks left out."""
    lines = PAGE.read_text().split(f"| {header} |\n", 1)[1].split("\n\n", 1)[0].splitlines()
    return [[cell.strip().strip("`") for cell in line.split("|")[1:-1]] for line in lines[1:]]


@pytest.mark.parametrize(
    "command", spans(r"^(?:python|torchrun \S+ \S+) -m paint_engine\.evaluate (?!compare)(.*)$")
)
def test_every_evaluation_of_the_page_parses(command: str) -> None:
    arguments = parse_arguments(shlex.split(command))
    assert arguments.model or arguments.adapter
    assert section_of(arguments).num_samples == arguments.num_samples
    assert parse_benchmarks(arguments.benchmarks)


@pytest.mark.parametrize("command", spans(r"paint_engine\.evaluate compare (.*)$"))
def test_every_comparison_of_the_page_parses(command: str) -> None:
    assert parse_comparison(shlex.split(command)).others


@pytest.mark.parametrize("command", spans(r"^python -m paint_engine\.train (.*)$"))
def test_every_training_of_the_page_parses(command: str) -> None:
    assert load_config(shlex.split(command)).config is not None


def test_the_benchmarks_of_the_page_are_the_known_ones() -> None:
    text = PAGE.read_text()
    assert [row[0] for row in cells("name | data set, and its split")] == [b.name for b in KNOWN]
    for benchmark in KNOWN[:-1]:
        assert f"| `{benchmark.name}` | `{benchmark.path}`, {benchmark.split} |" in text


def test_the_defaults_of_the_page_are_the_section_s() -> None:
    paper = EvalSection()
    for flag, default in cells("flag | default"):
        value = getattr(paper, flag.removeprefix("--").replace("-", "_"))
        assert default == str(value).lower(), flag
    assert f"{NUM_RESAMPLES:,} times" in PAGE.read_text()


def test_the_rows_of_the_page_are_those_of_the_printed_table() -> None:
    samples = [EvalSample("p", j, "", 1, None, False, False, None) for j in range(5)]
    found = measures(samples) | length_statistics(answers_of([samples]), [3])
    entry = {"value": 0.5, "ci95": [0.0, 1.0]}
    column = {"num_problems": 1, "checker_errors": 0} | dict.fromkeys(found, entry)
    table = results_table({"benchmarks": {"b": column}, "macro": dict.fromkeys(found, entry)})
    printed = {re.sub(r"@\d+|3", "@", str(label)) for label in table.columns[0].cells}
    listed = {re.sub(r"@.|N", "@", row[0]) for row in cells("row | is")}
    assert listed == printed - {"problems"}
    named = {name.replace("3", "N") for name in found if "@" not in name} | {"checker_errors"}
    assert all(f"`{name}`" in PAGE.read_text() for name in named)


def test_the_page_s_example_says_what_compare_prints() -> None:
    """Its form and its arithmetic; the numbers are of the commands above it."""
    shown = PAGE.read_text().split("```text\n")[1].split("```")[0]
    row = next(line for line in shown.splitlines() if line.startswith("│ tiny"))
    before, after, change, *_ = map(float, re.findall(r"[+-]?\d+\.\d", row))
    assert after - before == pytest.approx(change, abs=0.1)
    problems = np.zeros(2)
    difference = compare.Difference(0.5, 0.6, compare.bootstrap([problems]), (), (), {})
    table = compare._table("evaluations/base", "evaluations/short", {"tiny": difference}, None)  # pyright: ignore[reportArgumentType]
    assert str(table.title) == shown.splitlines()[0].strip()
    assert [line.strip() for line in shown.splitlines()[6:8]] == str(table.caption).splitlines()
    assert [str(c.header) for c in table.columns][1:] == re.findall(
        r"95% \w+|\w+", shown.splitlines()[2]
    )
