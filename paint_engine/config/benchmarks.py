"""Benchmarks by name, by Hugging Face id or by file, as `--benchmarks` and `eval.benchmarks` list
them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from paint_engine.files import RESULTS_FILE, VERSIONS_FILE


@dataclass(frozen=True)
class Benchmark:
    """Benchmark("aime24", "HuggingFaceH4/aime_2024", "train")

    split: of "tiny" and of a data set by id; ignored for files.
    revision: of a data set by id; None = the newest.
    """

    name: str
    path: str
    split: str
    revision: str | None = None


KNOWN = (
    Benchmark("aime24", "HuggingFaceH4/aime_2024", "train"),
    Benchmark("aime25", "MathArena/aime_2025", "train"),
    Benchmark("hmmt25", "MathArena/hmmt_feb_2025", "train"),
    Benchmark("tiny", "tiny", "test"),
)
_DEFAULT_SPLIT = "test"
# Names of the evaluation's own files, which NAME.json must not overwrite.
_TAKEN = {Path(file).stem for file in (RESULTS_FILE, VERSIONS_FILE)}


def benchmark_name(path: str) -> str:
    """Returns the name of a source of problems: "aime_2024" for data/aime_2024.jsonl."""
    return Path(path.partition(":")[0]).stem


def split_entries(text: str) -> list[str]:
    """Returns the entries of a comma-separated list."""
    return [entry.strip() for entry in text.split(",")]


def parse_benchmarks(text: str) -> list[Benchmark]:
    """Returns the benchmarks of a comma-separated list, by `find_benchmarks`."""
    return find_benchmarks(split_entries(text), f"--benchmarks {text}")


def find_benchmarks(entries: Sequence[str], given: str) -> list[Benchmark]:
    """Returns the benchmarks that the entries name. Each is a known name or [NAME=]SOURCE, where
    SOURCE is a file or a `datasets` id: ID, ID:SPLIT or ID:CONFIG:SPLIT.

    given: where the entries are from, for messages.

    Raises ValueError for an empty entry, for two with the same name, and for a name that cannot
    name result files.
    """
    found = [_parse(entry, given) for entry in entries]
    names = [benchmark.name for benchmark in found]
    for name in names:
        if name.lower() in _TAKEN:
            raise ValueError(
                f"{given}: {name!r} cannot name a benchmark, because the evaluation "
                f"writes a {name}.json of its own; give another name: other=PATH"
            )
        if names.count(name) > 1:
            raise ValueError(
                f"{given}: two benchmarks are called {name!r}, which names the files "
                "of their results; give one another name: other=PATH"
            )
    return found


def _parse(entry: str, given: str) -> Benchmark:
    known = next((benchmark for benchmark in KNOWN if benchmark.name == entry), None)
    if known is not None:
        return known
    name, equals, source = entry.partition("=")
    if not equals or Path(entry).is_file():
        name, source = "", entry
    if not source:
        raise ValueError(
            f"{given}: got an empty entry; needs a list of "
            f"{', '.join(b.name for b in KNOWN)}, files or data set ids: aime24,data/mine.jsonl"
        )
    near = get_close_matches(source.lower(), [benchmark.name for benchmark in KNOWN], cutoff=0.7)
    if near and not re.search("[:/]", source) and not Path(source).exists():
        raise ValueError(
            f"{given}: no benchmark and no file is called {source!r}; did you mean "
            f"{near[0]}? For a data set of that id give {source}:SPLIT"
        )
    path, split = source, _DEFAULT_SPLIT
    if ":" in source and not Path(source).is_file():
        path, _, split = source.rpartition(":")
    name = name or benchmark_name(path)
    if not name or "/" in name:
        raise ValueError(
            f"{given}: {name!r} cannot name a benchmark, because it names the files of "
            "its results; give a name without a slash: NAME=PATH"
        )
    return Benchmark(name, path, split)
