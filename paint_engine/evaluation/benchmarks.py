"""Held-out problems by name, by Hugging Face id or by file, with the prompts of an evaluation."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from paint_engine.config.sections import ColumnsSection, EvalSection, PromptsSection
from paint_engine.data.problem_sets import ProblemSet
from paint_engine.data.rows import load_problems
from paint_engine.evaluation.results import RESULTS_FILE
from paint_engine.evaluation.store import benchmark_name
from paint_engine.files import VERSIONS_FILE
from paint_engine.prompts.chat import encode_student_prompt


@dataclass(frozen=True)
class Benchmark:
    """Benchmark("aime24", "HuggingFaceH4/aime_2024", "train")

    split: of "tiny" and of data sets by id; files have none.
    """

    name: str
    path: str
    split: str


KNOWN = (
    Benchmark("aime24", "HuggingFaceH4/aime_2024", "train"),
    Benchmark("aime25", "MathArena/aime_2025", "train"),
    Benchmark("hmmt25", "MathArena/hmmt_feb_2025", "train"),
    Benchmark("tiny", "tiny", "test"),
)
_DEFAULT_SPLIT = "test"
# Files that stand beside NAME.json.
_TAKEN = {Path(file).stem for file in (RESULTS_FILE, VERSIONS_FILE)}


def parse_benchmarks(text: str) -> list[Benchmark]:
    """Benchmarks of a list with commas, each a known name or [NAME=]SOURCE, where SOURCE is a file
    or a `datasets` id, id:SPLIT or id:CONFIG:SPLIT.

    Raises ValueError for an empty entry, where two have one name, and for a name whose file is
    another.
    """
    found = [_parse(entry.strip(), text) for entry in text.split(",")]
    names = [benchmark.name for benchmark in found]
    for name in names:
        if name.lower() in _TAKEN:
            raise ValueError(
                f"--benchmarks {text}: {name!r} is no name for results to be filed by, because the "
                f"evaluation has a {name}.json of its own; name it as in --benchmarks other=PATH"
            )
        if names.count(name) > 1:
            raise ValueError(
                f"--benchmarks {text}: two are called {name!r}, by which results are filed; name "
                "one of them as in --benchmarks other=PATH"
            )
    return found


def _parse(entry: str, text: str) -> Benchmark:
    known = next((benchmark for benchmark in KNOWN if benchmark.name == entry), None)
    if known is not None:
        return known
    name, given, source = entry.partition("=")
    if not given or Path(entry).is_file():
        name, source = "", entry
    if not source:
        raise ValueError(
            f"--benchmarks {text}: got an empty entry; needs names with commas between them, of "
            f"{', '.join(b.name for b in KNOWN)}, files or data set ids: aime24,data/mine.jsonl"
        )
    near = get_close_matches(source.lower(), [benchmark.name for benchmark in KNOWN], cutoff=0.7)
    if near and not re.search("[:/]", source) and not Path(source).exists():
        raise ValueError(
            f"--benchmarks {text}: no benchmark and no file is called {source!r}; did you mean "
            f"{near[0]}? A data set of that id goes as {source}:SPLIT"
        )
    path, split = source, _DEFAULT_SPLIT
    if ":" in source and not Path(source).is_file():
        path, _, split = source.rpartition(":")
    name = name or benchmark_name(path)
    if not name or "/" in name:
        raise ValueError(
            f"--benchmarks {text}: {name!r} is no name for results to be filed by; needs one "
            "without a slash: --benchmarks NAME=PATH"
        )
    return Benchmark(name, path, split)


def load_benchmark(
    benchmark: Benchmark,
    tokenizer: PreTrainedTokenizerBase,
    section: EvalSection,
    prompts: PromptsSection,
    context: int,
    *,
    on_bad_row: Literal["stop", "skip"] = "stop",
    say: Callable[[str], object] = print,
) -> ProblemSet:
    """The problems and the student's prompts of an evaluation; solutions are not needed.

    section: its columns, number of problems, thinking and longest completion count.
    context: of the model, in tokens, in which a prompt and a completion must fit.
    say: told of rows that were skipped.
    """
    columns = ColumnsSection() if benchmark.path == "tiny" else section.columns
    loaded = load_problems(
        benchmark.path,
        split=benchmark.split,
        columns=columns,
        on_bad_row=on_bad_row,
        max_rows=section.num_problems,
        section="eval",
    )
    if loaded.num_skipped:
        say(f"{benchmark.path}: skipped {loaded.num_skipped} bad rows")
    ids = tuple(
        encode_student_prompt(tokenizer, problem, prompts, thinking=section.thinking)
        for problem in loaded.problems
    )
    _check_context(benchmark.name, max(map(len, ids)), section.max_new_tokens, context)
    return ProblemSet(loaded.problems, ids, loaded.num_skipped)


def _check_context(name: str, longest: int, max_new_tokens: int, context: int) -> None:
    if longest + max_new_tokens > context:
        raise ValueError(
            f"--max-new-tokens is {max_new_tokens}, and the longest prompt of {name} has {longest} "
            f"tokens; the model's context holds {context} together; "
            + (
                f"give --max-new-tokens {context - longest} or less"
                if longest < context
                else "evaluate a model with a longer context"
            )
        )
