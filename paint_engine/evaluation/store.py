"""Evaluations as they are kept on the disk: sample by sample, so that a kill loses none.

While one runs, each rank appends to a file of its own, NAME.rank-R.jsonl, whose first line says
what is evaluated. In the end NAME.jsonl holds all samples in order, and NAME.json, written last,
says that they are complete. Any number of ranks goes on with what any other number has left; ranks
on several nodes need a directory that all of them see.
"""

import errno
import fcntl
import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from paint_engine.config import templates
from paint_engine.config.sections import EvalSection, PromptsSection
from paint_engine.distributed import World, barrier, gather_objects, my_share, raise_together
from paint_engine.files import flush, read_jsonl
from paint_engine.rewards import DEFAULT_REWARD
from paint_engine.types import Problem

_HEADER = "header"
_LOCK_FILE = ".lock"
_NO_REWARD = ("reward", None)
_REWARD_FUNCTION = "reward_function"


@dataclass(frozen=True)
class EvalSample:
    """One answer to one problem.

    EvalSample("tiny-test:3", 0, "The length is ...", 104, "312", True, False, None)

    extracted: the final answer, None where there is none or the reward function finds none. error:
    why the answer could not be judged; None where it could. reward: None where it is 1 for a
    correct answer and 0 for a wrong one.
    """

    problem_id: str
    sample_index: int
    text: str
    num_tokens: int
    extracted: str | None
    correct: bool
    truncated: bool
    error: str | None
    reward: float | None = None

    def record(self) -> dict[str, Any]:
        """As a line of the samples' files holds it, without a reward that is None."""
        return {key: value for key, value in asdict(self).items() if (key, value) != _NO_REWARD}


@dataclass(frozen=True)
class Header:
    """What decides the outcome of an evaluation: samples under equal headers are of one.

    Header("aime24", settings={"temperature": 1.0, ...}, subject={"model": "Qwen/Qwen3-8B", ...},
           problems={"aime_2024.jsonl:1": "9f3c05a1b2d47e60", ...})

    settings: how answers are drawn and judged. Two evaluations are paired only where these are
        equal.
    subject: which weights are evaluated, and what samples from them.
    problems: of each problem's id, in order, the fingerprint of its question and answer.
    step: the number of training steps behind the weights, in an evaluation during training.
    """

    benchmark: str
    settings: dict[str, Any]
    subject: dict[str, Any]
    problems: dict[str, str]
    step: int | None = None


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation, its samples in the order of problems.

    seconds: that the process which finished it took; those of a killed one before are not known.
    """

    header: Header
    seconds: float
    samples: list[EvalSample]

    @property
    def settings(self) -> dict[str, Any]:
        """How the answers were drawn and judged."""
        return self.header.settings

    @property
    def reward_function(self) -> str:
        """What judged the answers."""
        return self.settings.get(_REWARD_FUNCTION, DEFAULT_REWARD)


def fingerprints(problems: Sequence[Problem]) -> dict[str, str]:
    """Of each problem's id, 16 digits that tell whether two problems and their answers are one.

    Raises ValueError where two problems share an id.
    """
    found: dict[str, str] = {}
    for problem in problems:
        if problem.problem_id in found:
            raise ValueError(
                f"two problems are called {problem.problem_id}; samples are filed by that name, so "
                "needs one for each; give the second data set another file name"
            )
        text = repr((problem.problem, problem.answer))
        found[problem.problem_id] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return found


def benchmark_name(path: str) -> str:
    """What a source of problems is called: "aime_2024" for data/aime_2024.jsonl."""
    return Path(path.partition(":")[0]).stem


def evaluation_settings(
    section: EvalSection,
    seed: int,
    prompts: PromptsSection,
    reward_function: str = DEFAULT_REWARD,
) -> dict[str, Any]:
    """How the answers of an evaluation are drawn and judged: what its outcome depends on, beside
    the weights and the problems."""
    names = {"num_samples", "temperature", "top_p", "top_k", "max_new_tokens", "thinking"}
    settings = section.model_dump(mode="json", include=names)
    settings["seed"] = seed
    template = prompts.student_template
    # A training run's may be for the teacher alone.
    if "{instruction}" in template:
        settings["instruction"] = prompts.instruction
    # Defaults are left out: evaluations from before there was another value lack these keys.
    if template != templates.STUDENT:
        settings["student_template"] = template
    if reward_function != DEFAULT_REWARD:
        settings[_REWARD_FUNCTION] = reward_function
    return settings


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"


def _write_whole(file: FileIO, lines: bytes) -> None:
    """All of the lines at the end of an unbuffered file, whose single writes may be short; or none,
    and OSError: later lines would otherwise follow a cut one."""
    end = file.seek(0, os.SEEK_END)
    try:
        while lines:
            lines = lines[file.write(lines) :]
    except OSError:
        file.truncate(end)
        raise


class SampleFiles:
    """The files of one evaluation, which is begun, or gone on with.

    directory, name: NAME.json, NAME.jsonl and NAME.rank-R.jsonl are made in the directory.
    header: of all ranks alike; compared with what is there.
    replace: samples with another header are deleted; else they are refused.

    A collective of all ranks, as `finish` is. Raises ValueError where there are samples of another
    evaluation, or the directory cannot be written.
    """

    def __init__(
        self, directory: Path, name: str, header: Header, world: World, *, replace: bool
    ) -> None:
        self._directory = directory
        self._name = name
        self._header = header
        self._world = world
        error, earlier = None, []
        if world.is_main:
            try:
                directory.mkdir(parents=True, exist_ok=True)
                earlier = unfinished_rows(directory, name, header, replace=replace)
            except (OSError, ValueError) as problem:
                error = str(problem)
        raise_together(error)
        finished = [EvalSample(**row) for row in gather_objects(earlier)[0]]
        self._finished = {(s.problem_id, s.sample_index): s for s in finished}
        self._file = self._open()

    def _open(self) -> FileIO:
        path = self._directory / f"{self._name}.rank-{self._world.rank}.jsonl"
        lines = path.read_bytes() if path.exists() else b""
        # Unbuffered: a line is on its way to the disk, whole, as soon as it is written.
        file = path.open("ab", buffering=0)
        # A line that a kill cut short.
        file.truncate(lines.rfind(b"\n") + 1)
        if b"\n" not in lines:
            _write_whole(file, _line({_HEADER: asdict(self._header)}))
        return file

    @property
    def finished(self) -> Sequence[EvalSample]:
        """The samples of all ranks before, and of this one now."""
        return list(self._finished.values())

    def missing(self, requests: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Those of the requests (problem's index, sample's) that have no sample yet, as far as this
        rank knows."""
        names = list(self._header.problems)
        return [(i, j) for i, j in requests if (names[i], j) not in self._finished]

    def share(self, requests: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """This rank's part of those requests (problem's index, sample's) that have no sample yet.
        To be asked once, before the first `append`."""
        return my_share(self.missing(requests), self._world)

    def append(self, group: Sequence[EvalSample]) -> None:
        """Samples of this rank, on the disk when this returns, whatever becomes of the process.

        Raises OSError where they find no room; none of them is in the file then.
        """
        _write_whole(self._file, b"".join(_line(sample.record()) for sample in group))
        self._finished |= {(s.problem_id, s.sample_index): s for s in group}

    def recorder(self, advance: Callable[[int, float], None]) -> Callable[[list[EvalSample]], None]:
        """What takes each group of samples as it finishes: appends it, and tells `advance` how many
        there are and what share of all so far, those of before a kill too, are correct."""
        done = [sample.correct for sample in self._finished.values()]

        def on_samples(group: list[EvalSample]) -> None:
            self.append(group)
            done.extend(sample.correct for sample in group)
            advance(len(group), sum(done) / len(done))

        return on_samples

    def close(self) -> None:
        """What is there can be gone on with."""
        self._file.close()

    def discard(self) -> None:
        """Deletes the samples of all ranks. A collective."""
        self.close()
        barrier()
        if self._world.is_main:
            for path in _rank_files(self._directory, self._name):
                path.unlink()

    def finish(self, seconds: float) -> Evaluation:
        """The whole evaluation, written, once every rank has appended its share. A collective."""
        self.close()
        everything = {key: s for part in gather_objects(self._finished) for key, s in part.items()}
        places = {name: place for place, name in enumerate(self._header.problems)}
        order = sorted(everything, key=lambda key: (places[key[0]], key[1]))
        evaluation = Evaluation(self._header, seconds, [everything[key] for key in order])
        if self._world.is_main:
            self._write(evaluation)
        return evaluation

    def _write(self, evaluation: Evaluation) -> None:
        head = self._directory / f"{self._name}.json"
        head.unlink(missing_ok=True)
        samples = self._directory / f"{self._name}.jsonl"
        samples.write_bytes(b"".join(_line(sample.record()) for sample in evaluation.samples))
        unfinished = self._directory / f"{self._name}.unfinished"
        fields = asdict(evaluation.header) | {"seconds": evaluation.seconds}
        unfinished.write_text(json.dumps(fields, indent=2) + "\n")
        for path in (samples, unfinished):
            flush(path)
        unfinished.rename(head)
        for path in _rank_files(self._directory, self._name):
            path.unlink()


def _rank_files(directory: Path, name: str) -> list[Path]:
    # The name is a user's, and may hold what a pattern is made of.
    return sorted(directory.glob(f"{glob.escape(name)}.rank-*.jsonl"))


def unfinished_rows(
    directory: Path, name: str, header: Header, *, replace: bool = False
) -> list[dict[str, Any]]:
    """The samples that ranks before have left, as JSON has them.

    replace: files with another header are deleted; else ValueError tells of them.
    """
    rows: list[dict[str, Any]] = []
    for path in _rank_files(directory, name):
        first, *samples = read_jsonl(path) or [{}]
        there = first.get(_HEADER)
        if there == asdict(header):
            rows += samples
        elif replace or there is None:
            path.unlink()
        else:
            refuse_other(path, there, header)
    return rows


@contextmanager
def hold(directory: Path) -> Iterator[None]:
    """While entered, no other process enters it for this directory, which is made where it is not
    there. A killed process holds it no longer.

    Raises ValueError where another one does, OSError where the directory cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / _LOCK_FILE).open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Any other: a file system without locks, on which two would do the same work twice.
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(
                    f"{directory}: another evaluation is running there; needs a directory to "
                    "itself; wait for that one, or give another directory with --output"
                ) from error
        yield


def refuse_other(place: Path, there: dict[str, Any], header: Header) -> None:
    """Raises ValueError: the evaluation that is `there` is another, and in what."""
    raise ValueError(
        f"{place} is of another evaluation, with {', '.join(_differing(there, header))}; needs the "
        "same settings to go on with; give another directory with --output, or remove that one"
    )


def check_ranks(headers: Mapping[str, Header]) -> None:
    """Raises ValueError on every rank where one is about to evaluate what rank 0 is not, as nodes
    may that have a cache each. A collective.

    headers: of this rank, by benchmark.
    """
    error, first = None, gather_objects(dict(headers))[0]
    if headers != first:
        names = headers.keys() & first.keys()
        found = {part for name in names for part in _differing(asdict(first[name]), headers[name])}
        error = (
            "a process would evaluate something else than the first one, which has "
            f"{', '.join(sorted(found)) or 'other benchmarks'}; needs the same on every node; give "
            "one command everywhere, and bring the nodes' copies of the model and the data to one "
            "version, or keep them where all nodes see them"
        )
    raise_together(error)


def _differing(there: dict[str, Any], header: Header) -> list[str]:
    """What the header that is `there`, as JSON has it, has otherwise."""
    differing = []
    for part, value in asdict(header).items():
        old = there[part]
        if part in ("settings", "subject"):
            differing += [
                f"{key} {old.get(key)!r} and not {value.get(key)!r}"
                for key in sorted(old.keys() | value.keys())
                if old.get(key) != value.get(key)
            ]
        elif old != value:
            differing.append("other problems" if part == "problems" else f"{part} {old!r}")
    return differing


def finished_evaluation(directory: Path, name: str, header: Header) -> Evaluation | None:
    """The complete evaluation there; None where there is none yet.

    Raises ValueError where it is another one.
    """
    head = directory / f"{name}.json"
    if not head.is_file():
        return None
    evaluation = read_evaluation(head)
    if evaluation.header != header:
        refuse_other(head, asdict(evaluation.header), header)
    return evaluation


def read_evaluation(head: Path) -> Evaluation:
    """A complete evaluation by its NAME.json."""
    fields = json.loads(head.read_text())
    samples = [EvalSample(**row) for row in read_jsonl(head.with_suffix(".jsonl"))]
    return Evaluation(seconds=fields.pop("seconds"), header=Header(**fields), samples=samples)


def read_evaluations(run_dir: Path) -> dict[int, Evaluation]:
    """A training run's complete evaluations by step, in the order of steps."""
    found = {}
    for head in evaluation_directory(run_dir).glob("step-*.json"):
        evaluation = read_evaluation(head)
        assert evaluation.header.step is not None, head
        found[evaluation.header.step] = evaluation
    return dict(sorted(found.items()))


def evaluation_directory(run_dir: Path) -> Path:
    """Where a training run's evaluations are."""
    return run_dir / "evaluations"
