"""Benchmarks by name, by Hugging Face id or by file, as `--benchmarks` lists them."""

import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from paint_engine.files import RESULTS_FILE, VERSIONS_FILE


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


def benchmark_name(path: str) -> str:
    """The name of a source of problems: "aime_2024" for data/aime_2024.jsonl."""
    return Path(path.partition(":")[0]).stem


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
