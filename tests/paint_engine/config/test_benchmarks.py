"""Benchmarks by name, by id and by file, on a command line and in a run's configuration."""

import re
from pathlib import Path

import pytest

from paint_engine.config.benchmarks import KNOWN, Benchmark, parse_benchmarks
from paint_engine.config.command_line import load_config
from paint_engine.config.toml import to_toml


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
        ("aime24,", "empty entry; needs a list of aime24, aime25"),
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
    with pytest.raises(ValueError, match=rf"^--benchmarks {re.escape(text)}: .*{message}"):
        parse_benchmarks(text)


@pytest.mark.parametrize("text", ["aime24,mine=rows.jsonl", '["aime24", "mine=rows.jsonl"]'])
def test_a_run_names_them_as_the_command_does(text: str, tmp_path: Path) -> None:
    config = load_config(["--eval.benchmarks", text]).config
    assert config.eval.sources == (KNOWN[0], Benchmark("mine", "rows.jsonl", "test"))
    (tmp_path / "run.toml").write_text(to_toml(config))
    assert load_config(["--config", str(tmp_path / "run.toml")]).config.eval == config.eval


def test_without_a_list_the_path_is_the_only_one() -> None:
    path = ["--eval.path", "own/set", "--eval.split", "dev", "--eval.revision", "v1"]
    assert load_config(path).config.eval.sources == (Benchmark("set", "own/set", "dev", "v1"),)
    for text in ("[]", "none"):
        assert load_config([*path, "--eval.benchmarks", text]).config.eval.sources[0].name == "set"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("aime24,aime24", r"eval.benchmarks: got .*two benchmarks are called 'aime24'"),
        ("aime2024", "did you mean aime24"),
        ("aime24,", "got ''; needs at least 1 character"),
        ("3", "eval.benchmarks: got 3; needs"),
    ],
)
def test_a_list_that_says_nothing_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(["--eval.benchmarks", text])
