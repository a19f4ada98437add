"""Benchmarks are loaded, and their prompts fit the model."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from paint_engine.config.benchmarks import KNOWN, Benchmark
from paint_engine.config.sections import ColumnsSection, EvalSection, PromptsSection
from paint_engine.evaluation.plan import load_benchmark

SECTION = EvalSection(max_new_tokens=20, num_problems=None)
PROMPTS = PromptsSection(instruction="Go.")


def test_rows_without_a_solution(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """As in MathArena's sets, whose answers may be numbers."""
    rows = [{"problem_idx": i, "problem": f"What is {i} + 1?", "answer": i + 1} for i in range(3)]
    file = tmp_path / "arena.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = load_benchmark(Benchmark("a", str(file), "test"), tokenizer, SECTION, PROMPTS, 200)
    assert [p.answer for p in loaded.problems] == ["1", "2", "3"]
    assert [p.solution for p in loaded.problems] == ["", "", ""]
    text = tokenizer.decode(list(loaded.prompts[1]))
    assert isinstance(text, str)
    assert "What is 1 + 1?" in text and "Go." in text


def test_columns_of_its_own_and_fewer_problems(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps({"q": f"{i}?", "gold": str(i)}) + "\n" for i in range(4)))
    columns = ColumnsSection(problem="q", answer="gold")
    section = SECTION.model_copy(update={"columns": columns, "num_problems": 2})
    benchmark = Benchmark("own", str(file), "test")
    assert [
        p.answer for p in load_benchmark(benchmark, tokenizer, section, PROMPTS, 200).problems
    ] == [
        "0",
        "1",
    ]
    tiny = load_benchmark(KNOWN[3], tokenizer, section, PROMPTS, 400)
    assert len(tiny.problems) == 2


def test_answers_that_do_not_fit_the_context(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, write_rows: Callable[..., Path]
) -> None:
    file = str(write_rows(tmp_path / "rows.jsonl"))
    benchmark = Benchmark("rows", file, "test")
    longest = max(map(len, load_benchmark(benchmark, tokenizer, SECTION, PROMPTS, 500).prompts))
    assert load_benchmark(benchmark, tokenizer, SECTION, PROMPTS, longest + 20)
    with pytest.raises(ValueError, match="give --max-new-tokens 19 or less"):
        load_benchmark(benchmark, tokenizer, SECTION, PROMPTS, longest + 19)
    with pytest.raises(ValueError, match="a model with a longer context"):
        load_benchmark(benchmark, tokenizer, SECTION, PROMPTS, longest)


def test_skipped_rows_are_told(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"problem": "1?", "answer": "1"}\n{"problem": "", "answer": "2"}\n')
    benchmark, told = Benchmark("rows", str(file), "test"), []
    with pytest.raises(ValueError, match="the column 'problem' is empty"):
        load_benchmark(benchmark, tokenizer, SECTION, PROMPTS, 200)
    loaded = load_benchmark(
        benchmark, tokenizer, SECTION, PROMPTS, 200, on_bad_row="skip", say=told.append
    )
    assert (len(loaded.problems), told) == (1, [f"{file}: skipped 1 bad rows"])
