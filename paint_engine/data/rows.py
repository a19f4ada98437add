"""Converts rows of a file or data set to Problems.

Known column names, case-sensitive (the first set that a row has is used):

    problem, solution, answer or Answer if there is one      AIME, MATH, OPSD's OpenThoughts subset
    question, solution, answer if there is one
    question, answer                                         GSM8K: the answer ends in "#### 72"
    Question, COT_Reason, Answer if there is one             OpenThoughts
    Question, Answer                                         the answer is the worked solution
    problem, answer                                          no solution: for evaluation alone, and
                                                             for recipes that need none
    problem or question                                      for recipes that need nothing else

If no column holds the final answer, it is taken from the solution: after "####" if a number follows
that ends the text, or from the last box.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Literal

from paint_engine.config.sections import ColumnsSection, DataColumnsSection
from paint_engine.data.directories import check_directory, opened_columns
from paint_engine.rewards.boxes import extract_boxed
from paint_engine.types import Problem

_KNOWN_COLUMNS: tuple[tuple[str, str | None, tuple[str, ...]], ...] = (
    ("problem", "solution", ("answer", "Answer")),
    ("question", "solution", ("answer",)),
    ("question", "answer", ()),
    ("Question", "COT_Reason", ("Answer",)),
    ("Question", "Answer", ()),
    ("problem", None, ("answer",)),
)
# Rows of a problem alone, where neither a solution nor an answer is needed.
_PROBLEM_COLUMNS = ("problem", "question", "Question")


_FILE_ENDINGS = (".jsonl", ".json", ".parquet")


# A longer text in an Answer column is a worked solution; the final answer is then the last box.
_MAX_ANSWER_CHARS = 100
_CALCULATOR_MARK = re.compile(r"<<[^<>\n]*>>")
_THOUSANDS_SEPARATOR = re.compile(r"(?<=\d),(?=\d{3})")
# GSM8K's mark with its answer. A heading of Markdown begins alike.
_MARK = re.compile(r"(?<!#)####(?!#)[^\S\n]*(?P<answer>[^\n]*?)[^\S\n]*(?=\n|\Z)")
# What a number may contain beside its digits, letters apart, and the one word or sign that may
# follow it as its unit.
_IN_NUMBER = re.compile(
    r"\\(?:[dtc]?frac|sqrt|pi|cdot|times|left|right|[,;!$])(?![A-Za-z])|(?<=\d)[eE](?=[-+]?\d)"
)
_SIGNS = r"\s\d(){}\[\]^*+/.,:$€£¥π√\u2212\u2013-"
_UNIT = r"\\?%|°[CF]?|(?:\\text\{)?\s*[^\W\d_]+(?:[/^²³][^\W_]*)?\}?"
_NUMBER_LIKE = re.compile(
    rf"[{_SIGNS}]*\d(?:[{_SIGNS}]*[\d)}}\]$π])?(?:\s*(?:{_UNIT}))?\s*\$?\s*\.?"
)
# Longer numbers have more digits than a reader or the answer check can use.
_MAX_DIGITS = 1000
_COMMIT = re.compile("[0-9a-f]{40}")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class LoadedProblems:
    """LoadedProblems(problems=(Problem("a.jsonl:1", ...), ...), num_skipped=1)

    commit: of a data set from the hub, if it is known.
    """

    problems: tuple[Problem, ...]
    num_skipped: int
    commit: str | None = None


class _BadRow(Exception):
    """The reason why one row cannot be used: what the row has and what is needed.

    remedy: the key to change if the row is right; None = those of problem, solution and answer.
    """

    def __init__(self, reason: str, remedy: str | None = None) -> None:
        super().__init__(reason)
        self.remedy = remedy


@contextmanager
def _remedy(text: str) -> Iterator[None]:
    """A context in which a row is bad for a column that another key names."""
    try:
        yield
    except _BadRow as error:
        raise _BadRow(str(error), text) from error


@dataclass(frozen=True)
class Routes:
    """The column that names the teacher of a row's rollouts, and its values."""

    column: str
    names: tuple[str, ...]

    def add(self, problem: Problem, row: object) -> Problem:
        """Returns the problem with its teacher. Raises _BadRow for a row that names none."""
        fields = _parse_line(row) if isinstance(row, bytes) else row
        assert isinstance(fields, dict), "the row has become a problem"
        with _remedy("name the column of teachers with --teacher.route_column"):
            name = _text(fields, self.column, "teacher")
        if name not in self.names:
            raise _BadRow(
                f"no teacher: the column {self.column!r} holds {name[:60]!r}; needs one of "
                f"{', '.join(self.names)}",
                "give teacher.models the names that the column has with --teacher.model_names",
            )
        return replace(problem, route=name)


def load_problems(
    path: str,
    *,
    split: str,
    columns: ColumnsSection,
    on_bad_row: Literal["stop", "skip"],
    max_rows: int | None,
    section: Literal["data", "eval"] = "data",
    needs_solution: bool = True,
    needs_answer: bool = True,
    revision: str | None = None,
    routes: Routes | None = None,
) -> LoadedProblems:
    """Loads the problems of "tiny", a .jsonl/.json/.parquet file, a directory or a `datasets`
    id[:config].

    split: the split of "tiny" or of a `datasets` id; files have none.
    max_rows: uses only this many usable rows, from the start; None = all.
    section: the configuration section whose keys the messages name. "eval" needs no solution.
    needs_solution, needs_answer: rows must have one. If none is needed and a row has none, it is
        "". Evaluations always need an answer.
    revision: commit, tag or branch of a `datasets` id; None = the newest.
    routes: the column that names a row's teacher; None = there is none.

    Raises ValueError if a row cannot be used (with on_bad_row "stop"), if the source cannot be
    read, or if no problem is left.
    """
    if revision is not None and (path == "tiny" or _file_of(path).exists()):
        raise ValueError(
            f"--{section}.revision {revision}: --{section}.path {path} is no data set of the hub, "
            f"whose versions have names; leave out --{section}.revision"
        )
    if path == "tiny" and routes is not None:
        raise ValueError(
            f"teacher.route_column: got {routes.column!r} with --{section}.path tiny, whose rows "
            f"have no columns; leave it out, or name a file with --{section}.path"
        )
    if path == "tiny":
        from paint_engine.tiny.problems import load_split

        return LoadedProblems(tuple(load_split(split, max_rows)), 0)
    problems: list[Problem] = []
    num_skipped, first_bad = 0, ""
    needs = {
        "needs_solution": needs_solution and section == "data",
        "needs_answer": needs_answer or section == "eval",
    }
    commit, rows = _read_rows(path, split, section, revision)
    for place, row in rows:
        try:
            problem = _to_problem(place, row, columns, **needs)
            problems.append(problem if routes is None else routes.add(problem, row))
        except _BadRow as error:
            if on_bad_row == "stop":
                remedy = error.remedy or (
                    f"name the columns with --{section}.columns.problem NAME (.solution, .answer)"
                )
                raise ValueError(
                    f"{place}: {error}; correct the row, {remedy}, or leave such rows out with "
                    "--data.on_bad_row skip"
                ) from error
            num_skipped += 1
            first_bad = first_bad or f", the first {place}: {error}"
        if len(problems) == max_rows:
            break
    if not problems:
        raise ValueError(
            f"--{section}.path {path}: no problem left ({num_skipped} rows skipped{first_bad}); "
            f"needs at least one row that can be used; name its columns with "
            f"--{section}.columns.problem NAME (.solution, .answer), or choose other data"
        )
    return LoadedProblems(tuple(problems), num_skipped, commit)


def _file_of(path: str) -> Path:
    # pathlib's own raises RuntimeError for a user that this machine does not have.
    return Path(os.path.expanduser(path))


def _read_rows(
    path: str, split: str, section: str, revision: str | None
) -> tuple[str | None, Iterator[tuple[str, object]]]:
    """Returns the commit of a data set from the hub, and (place, row) pairs. A JSONL row is the
    bytes of its line, so a malformed one can be skipped."""
    file = _file_of(path)
    ending = file.suffix.lower()
    if not file.is_file():
        # An id has at most one slash, between owner and name.
        is_path = ending in _FILE_ENDINGS or path.startswith(("/", ".", "~")) or path.count("/") > 1
        if is_path and not file.is_dir():
            raise ValueError(
                f"--{section}.path {path}: there is no such file; needs a .jsonl, .json or "
                f".parquet file, or a datasets id; check the path (relative to {Path.cwd()})"
            )
        return _dataset_rows(path, split, section, revision)
    if ending not in _FILE_ENDINGS:
        raise ValueError(
            f"--{section}.path {path}: got the file ending {ending!r}; needs one of "
            f"{', '.join(_FILE_ENDINGS)}; convert the file, or rename it if it is one of these"
        )
    if file.stat().st_size == 0:
        raise ValueError(
            f"--{section}.path {path}: the file is empty; needs at least one row; "
            "check how it was written, or choose another file"
        )
    read = {".jsonl": _jsonl_rows, ".json": _json_rows, ".parquet": _parquet_rows}[ending]
    return None, read(file)


def _decimal(number: str) -> Decimal:
    """Reads a number of JSON exactly; a float would round 12345678901234567890.5."""
    try:
        return Decimal(number)
    except InvalidOperation as error:
        raise ValueError(f"the number {number[:40]} is out of range") from error


def _jsonl_rows(file: Path) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(file.read_bytes().rstrip().split(b"\n"), start=1):
        yield f"{file.name}:{number}", line


def _json_rows(file: Path) -> Iterator[tuple[str, object]]:
    try:
        rows = json.loads(file.read_bytes(), parse_float=_decimal)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file}: malformed JSON: {error}; needs a list of objects; correct it, or rename the "
            "file to .jsonl if each line is one object"
        ) from error
    if not isinstance(rows, list):
        raise ValueError(
            f"{file}: got {_kind(rows)}; needs a list of objects; store only the list, or one "
            "object per line in a .jsonl file"
        )
    return ((f"{file.name}[{index}]", row) for index, row in enumerate(rows))


def _parquet_rows(file: Path) -> Iterator[tuple[str, object]]:
    # Imported here, like datasets below, because the import takes longer than the set-up of a small
    # run.
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{file}: not readable as Parquet: {error}; needs a whole .parquet file; "
            "write or download it again"
        ) from error
    # Python's floats have 64 bits: the 0.1 of a 32-bit column would become 0.10000000149011612.
    short = [field.name for field in table.schema if str(field.type) in ("float", "halffloat")]
    for name in short:
        values = [[float(str(number)) for number in table[name].to_numpy()]]
        table = table.set_column(table.schema.get_field_index(name), name, values)
    rows = (row for batch in table.to_batches(max_chunksize=1024) for row in batch.to_pylist())
    return ((f"{file.name}[{index}]", row) for index, row in enumerate(rows))


def _dataset_rows(
    path: str, split: str, section: str, revision: str | None
) -> tuple[str | None, Iterator[tuple[str, object]]]:
    import datasets
    from huggingface_hub import is_offline_mode

    directory, config_name = _file_of(path), ""
    if directory.is_dir():
        name = path
    else:
        name, _, config_name = path.partition(":")
        directory = _file_of(name)
    if "/" not in name:
        _refuse_packaged_builder(name, path, section)
    if directory.is_dir():
        check_directory(directory, section)
        # Whole, since ./json would be json, which is the name of a file format.
        name = str(directory.absolute())
    try:
        rows = datasets.load_dataset(name, config_name or None, split=split, revision=revision)
    except Exception as error:
        # The library has a separate exception type for no network, an unknown id, an unknown split
        # and a missing config. For a file that it cannot read, only the cause says so.
        cause = f" ({error.__cause__})".splitlines()[0] if error.__cause__ else ""
        raise ValueError(
            f"--{section}.path {path}: not a file, and datasets.load_dataset({name!r}, "
            f"{config_name or None!r}, split={split!r}) failed with {type(error).__name__}: "
            f"{error}{cause}; needs a .jsonl, .json or .parquet file or the id of a data set; "
            f"check the spelling, the network, the split (--{section}.split), or add a config "
            f"(--{section}.path {name}:CONFIG)"
        ) from error
    label = Path(name).name if Path(name).is_dir() else name
    commit = None if Path(name).is_dir() else _commit_of(rows.cache_files)
    rows = rows.remove_columns(opened_columns(rows.features))
    if revision is not None:
        offline = is_offline_mode()
        _check_revision(revision, commit, path, section, offline=offline)
    return commit, ((f"{label}[{index}]", row) for index, row in enumerate(rows))


def _refuse_packaged_builder(name: str, path: str, section: str) -> None:
    """Raises ValueError for what `datasets` takes for one of its own readers ("csv", "pandas") and
    not for a data set: they read whatever lies in the working directory, one of them pickles."""
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    if name.lower() in _PACKAGED_DATASETS_MODULES:
        raise ValueError(
            f"--{section}.path {path}: is the name of a file format in the package datasets; needs "
            "a .jsonl, .json or .parquet file or the id of a data set; give the file itself, or "
            f"./{name} for a directory of that name"
        )


def _commit_of(cache_files: Sequence[Mapping[str, str]]) -> str | None:
    """The commit that names the directory of the library's cache: .../VERSION/COMMIT/FILE."""
    names = {Path(file["filename"]).parent.name for file in cache_files}
    commits = [name for name in names if _COMMIT.fullmatch(name)]
    return commits[0] if len(commits) == 1 else None


def _check_revision(
    revision: str, commit: str | None, path: str, section: str, *, offline: bool
) -> None:
    """Raises ValueError if the rows may be of another revision: without the network, the library
    takes whatever version its cache has."""
    is_commit = _COMMIT.fullmatch(revision) is not None
    if commit == revision or (commit is not None and not is_commit and not offline):
        return
    remedy = "allow the network" if is_commit else "give the commit itself, or allow the network"
    raise ValueError(
        f"--{section}.revision {revision}: the cached data set {path} is at commit {commit}; needs "
        f"that revision; {remedy}"
    )


def _to_problem(
    place: str, row: object, columns: ColumnsSection, *, needs_solution: bool, needs_answer: bool
) -> Problem:
    fields = _parse_line(row) if isinstance(row, bytes) else row
    if not isinstance(fields, dict):
        raise _BadRow(f"got {_kind(fields)}; needs an object with a value for each column")
    found = _split_row(
        place, fields, columns, needs_solution=needs_solution, needs_answer=needs_answer
    )
    feedback = columns.feedback if isinstance(columns, DataColumnsSection) else None
    if feedback is None:
        return found
    with _remedy("name the column of feedback with --data.columns.feedback"):
        return replace(found, feedback=_text(fields, feedback, "feedback", required=False))


def _split_row(
    place: str,
    fields: Mapping[str, Any],
    columns: ColumnsSection,
    *,
    needs_solution: bool,
    needs_answer: bool,
) -> Problem:
    """Returns the problem of a row, without feedback."""
    needs_one = needs_solution or needs_answer
    problem_column, solution_column, answer_column = _find_columns(
        fields, columns, needs_one=needs_one
    )
    problem = _text(fields, problem_column, "problem")
    dispensable = not needs_solution and (answer_column is not None or not needs_answer)
    if not needs_one and columns.solution is not None:
        # It may be empty; a name that no column has is a mistake.
        dispensable = columns.solution in fields
    if solution_column is None or (dispensable and not fields.get(solution_column)):
        if needs_solution:
            raise _BadRow(f"no column with a solution; {_found(fields)}; training needs one")
        if answer_column is None and not needs_one:
            return Problem(place, problem, "", "")
        answer = _text(fields, answer_column or "answer", "answer", required=needs_one)
        return Problem(place, problem, "", answer)
    solution = _text(fields, solution_column, "solution")
    if answer_column is None:
        # A column of answers may contain answers alone; a solution without an answer is a bad row.
        is_answer = solution_column.lower() == "answer" and len(solution) <= _MAX_ANSWER_CHARS
        solution, answer = _split_answer(solution)
        if answer is None and is_answer and not needs_solution:
            return Problem(place, problem, "", solution)
        if answer is None and is_answer and _is_number_like(solution):
            raise _BadRow(
                f"no solution: the column {solution_column!r} holds an answer alone; training "
                "needs the reasoning, which ends in '#### 72' or has a \\boxed{} answer"
            )
    else:
        answer = _text(fields, answer_column, "answer", required=needs_answer)
        if answer_column == "Answer" and len(answer) > _MAX_ANSWER_CHARS:
            answer = extract_boxed(answer) or extract_boxed(solution)
        elif "\\boxed" in answer:
            answer = extract_boxed(answer)
    answer = (answer or "").strip()
    if needs_answer and not answer:
        raise _BadRow(
            f"no answer to verify against; {_found(fields)}; needs an answer column, or a solution "
            "that ends in '#### 72' or has a \\boxed{} answer"
        )
    return Problem(place, problem, solution, answer)


def _parse_line(line: bytes) -> object:
    if not line.strip():
        raise _BadRow("the line is empty; needs one JSON object per line")
    try:
        return json.loads(line, parse_float=_decimal)
    except (ValueError, RecursionError) as error:
        # json counts lines within the row, which has only one. Its line number would mislead.
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise _BadRow(f"malformed JSON ({reason}); needs one object per line") from error


def _find_columns(
    fields: Mapping[str, Any], columns: ColumnsSection, *, needs_one: bool
) -> tuple[str, str | None, str | None]:
    """Returns the columns of problem, solution and answer. None means no solution, or that the
    answer is inside the solution.

    needs_one: a row needs a solution or an answer.
    """
    for problem, solution, answers in _KNOWN_COLUMNS:
        needed = (problem, solution) if solution else (problem, *answers)
        if all(name in fields for name in needed):
            answer = next((name for name in answers if name in fields), None)
            break
    else:
        alone = columns.problem or next((name for name in _PROBLEM_COLUMNS if name in fields), "")
        if alone in fields and not needs_one:
            solution, answer = (name if name in fields else None for name in ("solution", "answer"))
            return alone, columns.solution or solution, columns.answer or answer
        if columns.problem is None and columns.solution is None:
            raise _BadRow(
                f"none of the known sets of columns; {_found(fields)}; needs problem and solution "
                "(for evaluation, problem and answer), question and answer, Question and "
                "COT_Reason, or Question and Answer"
            )
        problem, solution = "problem", "solution"
        answer = "answer" if "answer" in fields else None
    problem, solution = columns.problem or problem, columns.solution or solution
    if columns.answer is None and answer in (solution, None):
        # A solution column named by the user may leave a column of plain answers free.
        free = (name for name in ("answer", "Answer") if name in fields and name != solution)
        answer = next(free, None) if columns.solution else None
    return problem, solution, columns.answer or answer


def _text(fields: Mapping[str, Any], column: str, role: str, *, required: bool = True) -> str:
    """Returns a column's text. A column that is empty is refused, or is "" if not `required`."""
    if column not in fields:
        raise _BadRow(f"no {role}: the column {column!r} is missing; {_found(fields)}")
    value = fields[column]
    if isinstance(value, float):
        value = Decimal(repr(value))
    if isinstance(value, Decimal):
        # NaN is an empty cell in a table that pandas wrote.
        value = _plain_number(value, column) if value.is_finite() else None
    elif isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        if not required:
            return ""
        raise _BadRow(f"no {role}: the column {column!r} is empty; needs text")
    if not isinstance(value, str):
        raise _BadRow(f"no {role}: the column {column!r} holds {_kind(value)}; needs text")
    if _LONE_SURROGATE.search(value):
        raise _BadRow(f"the column {column!r} holds half a surrogate pair; needs valid Unicode")
    return value.strip()


def _is_number_like(text: str) -> bool:
    is_short = len(text) <= _MAX_ANSWER_CHARS
    return is_short and _NUMBER_LIKE.fullmatch(_IN_NUMBER.sub(" ", text)) is not None


def _plain_number(value: Decimal, column: str) -> str:
    """Returns the digits of a number, without an exponent, which the answer check would not read:
    0.0000001 for 1e-7."""
    if abs(value.adjusted()) > _MAX_DIGITS:
        raise _BadRow(
            f"the column {column!r} holds {value}, which has more than {_MAX_DIGITS} digits; "
            "write it as text"
        )
    digits = f"{value:f}" if value else "0"
    return digits.rstrip("0").rstrip(".") if "." in digits else digits


def _split_answer(solution: str) -> tuple[str, str | None]:
    """Returns solution and answer of a text that contains both. GSM8K's form gets a boxed
    answer."""
    marks = [mark for mark in _MARK.finditer(solution) if _is_number_like(mark["answer"])]
    if not marks or marks[-1].end() < len(solution):
        boxed = extract_boxed(solution)
        if marks and not boxed:
            raise _BadRow(
                f"{marks[-1].group()!r} is not the last line; needs the answer there, or in a "
                "\\boxed{}"
            )
        return solution, boxed
    answer = _THOUSANDS_SEPARATOR.sub("", marks[-1]["answer"])
    reasoning = _CALCULATOR_MARK.sub("", solution[: marks[-1].start()]).strip()
    if not reasoning:
        raise _BadRow("no solution: there is no text before '####'; needs the reasoning there")
    # The reference then ends as the instruction asks and as the answer checker reads it.
    return f"{reasoning}\nThe answer is \\boxed{{{answer}}}.", answer


def _found(fields: Mapping[str, Any]) -> str:
    return f"found the columns {', '.join(map(str, fields))}" if fields else "found no column"


def _kind(value: object) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    names = {dict: "an object", list: "a list", str: "text"}
    return names.get(type(value), f"a value of type {type(value).__name__}")
