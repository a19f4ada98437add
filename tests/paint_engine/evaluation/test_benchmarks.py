"""Benchmarks by name, by id and by file, and prompts that fit the model."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from paint_engine.config.sections import ColumnsSection, EvalSection, PromptsSection
from paint_engine.evaluation.benchmarks import KNOWN, Benchmark, parse_benchmarks
from paint_engine.evaluation.plan import load_benchmark

SECTION = EvalSection(max_new_tokens=20, num_problems=None)
PROMPTS = PromptsSection(instruction="Go.")


def test_names_files_and_ids(tmp_path: Path) -> None:
    (tmp_path / "a:b=c.jsonl").write_text("")
    odd = str(tmp_path / "a:b=c.jsonl")
    assert parse_benchmarks("aime24, hmmt25") == [KNOWN[0], KNOWN[2]]
    assert parse_benchmarks("../data/aime_2024.jsonl") == [
        Benchmark("aime_2024", "../data/aime_2024.jsonl", "test")
    ]
    assert parse_benchmarks("m=HuggingFaceH4/MATH-500,openai/gsm8k:main:train,own/set:dev") == [
        Benchmark("m", "HuggingFaceH4/MATH-500", "test"),
        Benchmark("gsm8k", "openai/gsm8k:main", "train"),
        Benchmark("set", "own/set", "dev"),
    ]
    assert parse_benchmarks(odd) == [Benchmark("a", odd, "test")]
    # Near a known name, and still an id.
    assert parse_benchmarks("aime2024:train") == [Benchmark("aime2024", "aime2024", "train")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("aime24,", "empty entry; needs a comma-separated list"),
        ("x=", "empty entry"),
        ("aime24,aime24=other.jsonl", "two benchmarks are called 'aime24', which names the files"),
        ("a/b=x.jsonl", "'a/b' cannot name a benchmark"),
        ("data/results.jsonl", "the evaluation writes a results.json of its own; give another"),
        ("tiny,versions=x.jsonl", "the evaluation writes a versions.json of its own; give another"),
        ("someone/Results", "'Results' cannot name a benchmark"),
        ("aime2024", "did you mean aime24"),
        ("mine=HMMT-25", "called 'HMMT-25'; did you mean hmmt25"),
    ],
)
def test_entries_that_say_nothing(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_benchmarks(text)


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
