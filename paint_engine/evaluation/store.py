"""The files of an evaluation, written sample by sample, so that a kill loses no finished sample.

While an evaluation runs, each rank appends to its own file, NAME.rank-R.jsonl, whose first line is
the header. At the end NAME.jsonl holds all samples in order, and NAME.json, written last, marks
them as complete. Any number of ranks can resume what another number began; ranks on several nodes
need a directory on a shared file system.
"""

import glob
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from io import FileIO
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, NoReturn

from pydantic import Field

from paint_engine.config import templates
from paint_engine.config.sections import EvalSection, PromptsSection, Samples, Tokens
from paint_engine.distributed import (
    World,
    barrier,
    gather_objects,
    my_share,
    raise_together,
    together,
)
from paint_engine.files import (
    EVALUATIONS_DIRECTORY,
    FILE_FAILURES,
    BadFile,
    DirectoryLock,
    FileMissing,
    LockLost,
    Record,
    WriteFailed,
    append_lines,
    checked,
    json_line,
    open_jsonl,
    read_json,
    read_jsonl,
    reading,
    shown,
    write_atomic,
    write_json,
    writing,
)
from paint_engine.rewards import DEFAULT_REWARD
from paint_engine.types import Problem

_HEADER = "header"
_NO_REWARD = ("reward", None)
_REWARD_FUNCTION = "reward_function"
_REMOVE = "restore the evaluation from a copy, or remove its files to sample it again"
# More than a limit on tokens may be; sums of so many stay exact.
_MAX_TOKENS = 10**9

# 30,000 years, so that a sum of them stays finite.
_SECONDS: Any = Annotated[float, Field(ge=0, le=1e12)]


class _Settings(Record):
    """What is read of an evaluation's settings."""

    num_samples: Samples
    max_new_tokens: Tokens
    seed: int
    reward_function: str = DEFAULT_REWARD


@dataclass(frozen=True)
class EvalSample:
    """One answer to one problem.

    EvalSample("tiny-test:3", 0, "The length is ...", 104, "312", True, False, None)

    extracted: the final answer; None if there is none or the reward function finds none. error: why
    the answer could not be judged; None if it was. reward: None if it is 1 for a correct answer and
    0 for a wrong one.
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
        """Returns the sample as a line of the samples' files contains it, without a reward that is
        None."""
        return {key: value for key, value in asdict(self).items() if (key, value) != _NO_REWARD}


@dataclass(frozen=True)
class Header:
    """What determines the samples of an evaluation: samples with equal headers belong together.

    Header("aime24", settings={"temperature": 1.0, ...}, subject={"model": "Qwen/Qwen3-8B", ...},
           problems={"aime_2024.jsonl:1": "9f3c05a1b2d47e60", ...})

    settings: how answers are sampled and judged. `compare` pairs evaluations only if these are
        equal.
    subject: the identity of the weights and of what samples from them.
    problems: the fingerprint of question and answer by problem id, in order.
    step: in an evaluation during training, the number of steps that the weights were trained for.
    """

    benchmark: str
    settings: dict[str, Any]
    subject: dict[str, Any]
    problems: dict[str, str]
    step: int | None = None

    @property
    def reward_function(self) -> str:
        """What judges the answers."""
        return self.settings.get(_REWARD_FUNCTION, DEFAULT_REWARD)


@dataclass(frozen=True)
class Evaluation:
    """A complete evaluation, its samples in the order of problems.

    seconds: taken by the process that completed it, without those of interrupted ones before.
    """

    header: Header
    seconds: float
    samples: list[EvalSample]

    @property
    def settings(self) -> dict[str, Any]:
        """How the answers were sampled and judged."""
        return self.header.settings

    @property
    def reward_function(self) -> str:
        """What judged the answers."""
        return self.header.reward_function


def fingerprints(problems: Sequence[Problem]) -> dict[str, str]:
    """Returns 16 hexadecimal digits of a hash of the question and answer, by problem id.

    Raises ValueError if two problems share an id.
    """
    found: dict[str, str] = {}
    for problem in problems:
        if problem.problem_id in found:
            raise ValueError(
                f"two problems have the id {problem.problem_id}; samples are stored by id, so each "
                "problem needs its own; give the second data set another file name"
            )
        text = repr((problem.problem, problem.answer))
        found[problem.problem_id] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return found


def evaluation_settings(
    section: EvalSection,
    seed: int,
    prompts: PromptsSection,
    reward_function: str = DEFAULT_REWARD,
) -> dict[str, Any]:
    """Returns how the answers of an evaluation are sampled and judged: what they depend on besides
    the weights and the problems."""
    names = {"num_samples", "temperature", "top_p", "top_k", "max_new_tokens", "thinking"}
    settings = section.model_dump(mode="json", include=names)
    settings["seed"] = seed
    template = prompts.student_template
    # In training the instruction may be for the teacher alone.
    if "{instruction}" in template:
        settings["instruction"] = prompts.instruction
    # Defaults are left out: evaluations from before there was another value lack these keys.
    if template != templates.STUDENT:
        settings["student_template"] = template
    if prompts.date is not None:
        settings["date"] = prompts.date
    if reward_function != DEFAULT_REWARD:
        settings[_REWARD_FUNCTION] = reward_function
    return settings


class SampleFiles:
    """Opens or resumes one evaluation's sample files. A collective call, as is `finish`.

    directory, name: the files are NAME.json, NAME.jsonl and NAME.rank-R.jsonl in the directory.
    header: the same on all ranks; compared with that of existing files.
    replace: delete samples with another header, instead of refusing them.
    lock: the main rank's, on the directory or on the one around it. It is checked before each
        write, which raises LockLost if it is lost.

    Raises ValueError if there are samples of another evaluation or what are none, and WriteFailed
    if the directory cannot be written.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        header: Header,
        world: World,
        *,
        replace: bool,
        lock: DirectoryLock | None = None,
    ) -> None:
        self._directory = directory
        self._name = name
        self._header = header
        self._world = world
        self._lock = lock

        def prepare() -> list[EvalSample]:
            if not world.is_main:
                return []
            with writing(directory):
                directory.mkdir(parents=True, exist_ok=True)
                return read_unfinished(directory, name, header, replace=replace)

        finished = gather_objects(together(prepare, (ValueError, *FILE_FAILURES)))[0]
        self._finished = {(s.problem_id, s.sample_index): s for s in finished}
        self._file = together(self._open, FILE_FAILURES)

    def _open(self) -> FileIO:
        path = self._directory / f"{self._name}.rank-{self._world.rank}.jsonl"
        with ExitStack() as stack:
            file = stack.enter_context(open_jsonl(path))
            if path.stat().st_size == 0:
                append_lines(file, json_line({_HEADER: asdict(self._header)}))
            stack.pop_all()
        return file

    @property
    def finished(self) -> Sequence[EvalSample]:
        """The samples of all ranks when the files were opened, and those that this rank added."""
        return list(self._finished.values())

    def missing(self, requests: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """The requests (problem index, sample index) without a sample that this rank knows of."""
        names = list(self._header.problems)
        return [(i, j) for i, j in requests if (names[i], j) not in self._finished]

    def share(self, requests: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Returns this rank's share of the requests (problem index, sample index) without a sample.
        Call it before the first `append`, which changes what is missing."""
        return my_share(self.missing(requests), self._world)

    def append(self, group: Sequence[EvalSample]) -> None:
        """Appends samples of this rank. They are in the file when this returns, even if the process
        is killed next.

        Raises WriteFailed and LockLost; none of them is in the file then.
        """
        if self._lock is not None:
            self._lock.check()
        append_lines(self._file, b"".join(json_line(sample.record()) for sample in group))
        self._finished |= {(s.problem_id, s.sample_index): s for s in group}

    def recorder(self, advance: Callable[[int, float], None]) -> Callable[[list[EvalSample]], None]:
        """Returns a callback for each group of samples as it finishes. It appends the group and
        calls `advance` with its size and the fraction of correct samples so far, resumed ones
        included."""
        done = [sample.correct for sample in self._finished.values()]

        def on_samples(group: list[EvalSample]) -> None:
            self.append(group)
            done.extend(sample.correct for sample in group)
            advance(len(group), sum(done) / len(done))

        return on_samples

    def close(self) -> None:
        """Closes this rank's file. The evaluation can be resumed."""
        self._file.close()

    def discard(self) -> None:
        """Deletes the samples of all ranks. A collective call."""
        self.close()
        barrier()
        if self._world.is_main:
            remove_shares(self._directory, self._name)

    def finish(self, seconds: float) -> Evaluation:
        """Writes and returns the whole evaluation, after every rank has appended its share. A
        collective call."""
        self.close()
        everything = {key: s for part in gather_objects(self._finished) for key, s in part.items()}
        places = {name: place for place, name in enumerate(self._header.problems)}
        order = sorted(everything, key=lambda key: (places[key[0]], key[1]))
        evaluation = Evaluation(self._header, seconds, [everything[key] for key in order])
        together(lambda: self._world.is_main and self._write(evaluation), (WriteFailed, LockLost))
        return evaluation

    def _write(self, evaluation: Evaluation) -> None:
        if self._lock is not None:
            self._lock.check()
        (self._directory / f"{self._name}.json").unlink(missing_ok=True)
        write_evaluation(self._directory, self._name, evaluation)
        remove_shares(self._directory, self._name)


def write_evaluation(directory: Path, name: str, evaluation: Evaluation) -> None:
    """Writes a complete evaluation to NAME.jsonl and, last, NAME.json. Raises WriteFailed.

    What is at these names has the same header, or the caller has removed its NAME.json.
    """
    samples = b"".join(json_line(sample.record()) for sample in evaluation.samples)
    write_atomic(directory / f"{name}.jsonl", samples)
    head = asdict(evaluation.header) | {"seconds": evaluation.seconds}
    write_json(directory / f"{name}.json", head)


def remove_shares(directory: Path, name: str) -> None:
    """Deletes the samples by rank, which a complete evaluation no longer needs. One that was killed
    before this has left them. Raises WriteFailed."""
    with writing(directory):
        for path in _rank_files(directory, name):
            path.unlink(missing_ok=True)


def _rank_files(directory: Path, name: str) -> list[Path]:
    # The name is the user's and may contain characters of a pattern.
    return sorted(directory.glob(f"{glob.escape(name)}.rank-*.jsonl"))


def read_unfinished(
    directory: Path, name: str, header: Header, *, replace: bool = False
) -> list[EvalSample]:
    """Returns the samples of an incomplete evaluation.

    replace: delete files with another header, instead of raising ValueError.

    Raises BadFile for lines that are none of a header or samples of its problems.
    """
    found: list[EvalSample] = []
    for path in _rank_files(directory, name):
        first, *rows = read_jsonl(path) or [{}]
        # A kill between the file and its first line has left it empty.
        if not first:
            path.unlink()
            continue
        existing = checked(Header, first.get(_HEADER), f"{path}:1: {_HEADER}", _REMOVE)
        if existing == header:
            found += _samples(path, rows, header, first_line=2)
        elif replace:
            path.unlink()
        else:
            refuse_other(path, asdict(existing), header)
    return found


def _samples(
    path: Path, rows: Sequence[Mapping[str, Any]], header: Header, first_line: int
) -> list[EvalSample]:
    """The samples in these lines of a file. Raises BadFile for lines that are none."""
    found = []
    for number, row in enumerate(rows, start=first_line):
        sample = checked(EvalSample, row, f"{path}:{number}", _REMOVE)
        if sample.problem_id not in header.problems or sample.sample_index < 0:
            raise BadFile(
                f"{path}:{number}: got the sample {sample.sample_index} of {sample.problem_id!r}; "
                f"needs one of the {len(header.problems)} problems of its header; {_REMOVE}"
            )
        if not 0 <= sample.num_tokens <= _MAX_TOKENS:
            raise BadFile(
                f"{path}:{number}: num_tokens: got {shown(sample.num_tokens)}; needs 0 to "
                f"{_MAX_TOKENS:,}; {_REMOVE}"
            )
        found.append(sample)
    return found


def refuse_other(file: Path, existing: dict[str, Any], header: Header) -> NoReturn:
    """Raises ValueError with the differences between a file's header and this evaluation's."""
    raise ValueError(
        f"{file} is of another evaluation, with {', '.join(_differences(existing, header))}; "
        "needs the same settings to be resumed; give another directory with --output, or remove "
        "that one"
    )


def check_same_headers(headers: Mapping[str, Header]) -> None:
    """Raises ValueError on every rank if a rank's headers differ from rank 0's, as on nodes whose
    caches hold different versions. A collective call.

    headers: this rank's, by benchmark.
    """
    error, first = None, gather_objects(dict(headers))[0]
    if headers != first:
        names = headers.keys() & first.keys()
        found = {
            part for name in names for part in _differences(asdict(first[name]), headers[name])
        }
        error = (
            "a process would evaluate something else than the first one, which has "
            f"{', '.join(sorted(found)) or 'other benchmarks'}; needs the same on every node; run "
            "the same command on all nodes, with the same version of the model and the data, for "
            "example on a shared file system"
        )
    raise_together(error)


def _differences(existing: dict[str, Any], header: Header) -> list[str]:
    """Returns descriptions of where a header read from JSON differs, with its values first."""
    differing = []
    for part, value in asdict(header).items():
        old = existing[part]
        if part in ("settings", "subject"):
            differing += [
                f"{key} {shown(old.get(key))} and not {shown(value.get(key))}"
                for key in sorted(old.keys() | value.keys())
                if old.get(key) != value.get(key)
            ]
        elif old != value:
            differing.append(
                _other_problems(old, value) if part == "problems" else f"{part} {old!r}"
            )
    return differing


def _other_problems(old: Mapping[str, str], now: Mapping[str, str]) -> str:
    """How two sets of `fingerprints` differ."""
    pairs = zip_longest(old.items(), now.items(), fillvalue=("none", ""))
    place, (was, is_now) = next(
        (place, pair) for place, pair in enumerate(pairs, start=1) if pair[0] != pair[1]
    )
    name = was[0] if was[0] == is_now[0] else f"{was[0]} there and {is_now[0]} here"
    return (
        f"other problems ({len(old)} there and {len(now)} here, and number {place} is the first "
        f"that differs: {name})"
    )


def read_finished(directory: Path, name: str, header: Header) -> Evaluation | None:
    """Returns the complete evaluation in the directory, or None if there is none.

    Raises ValueError if it has another header.
    """
    head = directory / f"{name}.json"
    if not head.is_file():
        return None
    evaluation = read_evaluation(head)
    if evaluation.header != header:
        refuse_other(head, asdict(evaluation.header), header)
    return evaluation


def read_evaluation(head: Path) -> Evaluation:
    """Reads a complete evaluation by its NAME.json. Raises BadFile if it is none, and
    ReadFailed."""
    fields = read_json(head, dict[str, Any], remedy=_REMOVE)
    seconds = checked(_SECONDS, fields.pop("seconds", None), f"{head}: seconds", _REMOVE)
    header = checked(Header, fields, str(head), _REMOVE)
    settings = checked(_Settings, header.settings, f"{head}: settings", _REMOVE)
    path = head.with_suffix(".jsonl")
    samples = _samples(path, read_jsonl(path), header, first_line=1)
    # Compared by their number first: what the header says may be more than fits in memory.
    num_needed = settings.num_samples * len(header.problems)
    there = {(s.problem_id, s.sample_index) for s in samples}
    is_whole = len(samples) == len(there) == num_needed > 0
    if not is_whole or any(s.sample_index >= settings.num_samples for s in samples):
        raise BadFile(
            f"{path} has {len(there)} samples; needs each of the {settings.num_samples} samples of "
            f"{len(header.problems)} problems once, according to {head.name}; {_REMOVE}"
        )
    return Evaluation(header, seconds, samples)


def read_evaluations(run_dir: Path, *, final: bool = False) -> dict[int, dict[str, Evaluation]]:
    """Reads a training run's complete evaluations by step, in increasing order, and benchmark.

    final: those by the full protocol, after training.

    Raises BadFile for what is none, and ReadFailed.
    """
    start = _start_of(final)
    found: dict[int, dict[str, Evaluation]] = {}
    directory = evaluation_directory(run_dir)
    try:
        with reading(directory):
            heads = [directory / name for name in sorted(os.listdir(directory))]
    except FileMissing:
        return {}
    for head in heads:
        if fnmatch(head.name, f"{start}*.json"):
            evaluation = read_evaluation(head)
            step, name = evaluation.header.step, evaluation.header.benchmark
            if step is None or head.stem not in (f"{start}{step}", f"{start}{step}-{name}"):
                raise BadFile(
                    f"{head}: step: got {step!r} of the benchmark {shown(name)}; needs those in "
                    f"the file's name; {_REMOVE}"
                )
            found.setdefault(step, {})[name] = evaluation
    return dict(sorted(found.items()))


def _start_of(final: bool) -> str:
    """The start of the names of a training run's evaluations."""
    return "final-step-" if final else "step-"


def evaluation_name(
    directory: Path, step: int, benchmark: str, *, several: bool, final: bool = False
) -> str:
    """Returns the NAME of the files of a training run's evaluation: that of an earlier one on this
    benchmark after as many steps, whatever else the run was evaluated on then; else a new one.

    several: the run lists its benchmarks, so that the name has to say which it is.
    final: by the full protocol, after training.
    """
    plain = f"{_start_of(final)}{step}"
    own = f"{plain}-{benchmark}"
    head = directory / f"{plain}.json"
    if not several:
        return own if (directory / f"{own}.json").is_file() else plain
    is_same = head.is_file() and read_evaluation(head).header.benchmark == benchmark
    return plain if is_same else own


def evaluation_directory(run_dir: Path) -> Path:
    """Returns the directory of a training run's evaluations."""
    return run_dir / EVALUATIONS_DIRECTORY
