"""Reading rows of every known form, refusing bad ones, and the order of training."""

import json
import shutil
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paint_engine.config.sections import ColumnsSection, DataColumnsSection
from paint_engine.data.problem_sets import batch_indices
from paint_engine.data.rows import LoadedProblems, Routes, load_problems
from paint_engine.seeds import problem_order
from paint_engine.types import Problem

properties = settings(deadline=None, derandomize=True, max_examples=60)

GOOD = {"problem": "What is 1 + 1?", "solution": "1 + 1 = 2, so \\boxed{2}.", "answer": "2"}
GSM8K = {
    "question": "Ann has 1,200 beads and buys 40 more. How many has she?",
    "answer": "She has 1200+40 = <<1200+40=1240>>1,240 beads.\nThat is all.\n#### 1,240",
}


def load(
    path: Path | str,
    *,
    columns: dict[str, str] | None = None,
    on_bad_row: Literal["stop", "skip"] = "stop",
    max_rows: int | None = None,
    section: Literal["data", "eval"] = "data",
    split: str = "train",
    needs_solution: bool = True,
    needs_answer: bool = True,
    revision: str | None = None,
    routes: Routes | None = None,
) -> LoadedProblems:
    kind = DataColumnsSection if section == "data" else ColumnsSection
    return load_problems(
        str(path),
        split=split,
        columns=kind(**(columns or {})),
        on_bad_row=on_bad_row,
        max_rows=max_rows,
        section=section,
        needs_solution=needs_solution,
        needs_answer=needs_answer,
        revision=revision,
        routes=routes,
    )


def write_jsonl(file: Path, rows: Sequence[object]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def load_row(tmp_path: Path, row: object, **kwargs: Any) -> Problem:
    (problem,) = load(write_jsonl(tmp_path / "rows.jsonl", [row]), **kwargs).problems
    return problem


def refusal(path: Path | str, **kwargs: Any) -> str:
    with pytest.raises(ValueError) as caught:
        load(path, **kwargs)
    return str(caught.value)


# Routes to teachers


def test_a_column_names_the_teacher_of_a_row(tmp_path: Path) -> None:
    routes = Routes("domain", ("math", "2"))
    rows = [GOOD | {"domain": "math"}, GOOD | {"domain": 2}, GOOD | {"domain": " math "}]
    loaded = load(write_jsonl(tmp_path / "rows.jsonl", rows), routes=routes)
    assert [problem.route for problem in loaded.problems] == ["math", "2", "math"]
    assert load_row(tmp_path, rows[0]).route == ""
    bad = {"other": "'code'; needs one of math, 2", "none": "'domain' is missing"}
    keys = {"other": "teacher.model_names", "none": "teacher.route_column"}
    for name, row in (("other", GOOD | {"domain": "code"}), ("none", GOOD)):
        path = write_jsonl(tmp_path / f"{name}.jsonl", [rows[0], row])
        message = refusal(path, routes=routes)
        assert message.startswith(f"{name}.jsonl:2: no teacher: the column ")
        assert bad[name] in message
        assert f"with --{keys[name]}, or leave such rows out" in message
        assert "data.columns" not in message
        loaded = load(path, routes=routes, on_bad_row="skip")
        assert (len(loaded.problems), loaded.num_skipped) == (1, 1)


def test_the_bundled_problems_have_no_routes() -> None:
    assert "teacher.route_column: got 'domain' with --data.path tiny" in refusal(
        "tiny", routes=Routes("domain", ("a", "b"))
    )


# Forms of rows


def test_problem_solution_answer(tmp_path: Path) -> None:
    row = {"id": 60, **GOOD, "url": "https://example.org", "question": "not this one"}
    problem = load_row(tmp_path, row)
    assert problem == Problem("rows.jsonl:1", GOOD["problem"], GOOD["solution"], "2")


def test_gsm8k_gets_a_boxed_answer_and_loses_calculator_marks(tmp_path: Path) -> None:
    problem = load_row(tmp_path, GSM8K)
    assert problem.problem == GSM8K["question"]
    assert problem.answer == "1240"
    assert problem.solution == (
        "She has 1200+40 = 1,240 beads.\nThat is all.\nThe answer is \\boxed{1240}."
    )


@pytest.mark.parametrize(
    ("tail", "answer"),
    [
        ("\n#### 72", "72"),
        ("\n####72", "72"),
        ("\n#### -3", "-3"),
        ("\n#### 2.5", "2.5"),
        ("\n#### 109,200,000\n", "109200000"),
        (" #### 1,2", "1,2"),
    ],
)
def test_gsm8k_answers(tmp_path: Path, tail: str, answer: str) -> None:
    problem = load_row(tmp_path, {"question": "q", "answer": "Steps." + tail})
    assert (problem.solution, problem.answer) == (
        f"Steps.\nThe answer is \\boxed{{{answer}}}.",
        answer,
    )


def test_openthoughts_with_a_short_answer(tmp_path: Path) -> None:
    row = {"Question": "q", "COT_Reason": "Long trace \\boxed{7}", "Answer": "8"}
    assert load_row(tmp_path, row) == Problem("rows.jsonl:1", "q", "Long trace \\boxed{7}", "8")


@pytest.mark.parametrize("answer", ["word " * 30, "Here it is: \\boxed{7}"])
def test_openthoughts_with_a_worked_answer(tmp_path: Path, answer: str) -> None:
    row = {"Question": "q", "COT_Reason": "Trace \\boxed{6} \\boxed{7}", "Answer": answer}
    assert load_row(tmp_path, row).answer == "7"


def test_question_answer_with_capitals_takes_the_answer_as_solution(tmp_path: Path) -> None:
    row = {"Question": "q", "Answer": "We add: \\boxed{\\frac{1}{2}}"}
    expected = Problem("rows.jsonl:1", "q", "We add: \\boxed{\\frac{1}{2}}", "\\frac{1}{2}")
    assert load_row(tmp_path, row) == expected


def test_problem_and_solution_win_over_question_and_answer(tmp_path: Path) -> None:
    row = {"Question": "Q", "COT_Reason": "C", "Answer": "5", "problem": "p", "solution": "s"}
    assert load_row(tmp_path, row) == Problem("rows.jsonl:1", "p", "s", "5")


def test_answer_is_the_last_box_of_the_solution(tmp_path: Path) -> None:
    row = {"problem": "p", "solution": "\\boxed{1}, no: \\boxed{x^{2}}. Done", "level": 5}
    assert load_row(tmp_path, row).answer == "x^{2}"


@pytest.mark.parametrize(
    ("value", "text"), [(25, "25"), (25.0, "25"), (2.5, "2.5"), (-1, "-1"), (" 025 ", "025")]
)
def test_numbers_as_answers(tmp_path: Path, value: object, text: str) -> None:
    assert load_row(tmp_path, {**GOOD, "answer": value}).answer == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        ("1e-7", "0.0000001"),
        ("1E21", "1" + "0" * 21),
        ("12345678901234567890", "12345678901234567890"),
        ("12345678901234567890.5", "12345678901234567890.5"),
        ("0.1", "0.1"),
        ("0.10", "0.1"),
        ("-0.30000000000000004", "-0.30000000000000004"),
        ("72.0", "72"),
        ("1200", "1200"),
        ("-0.0", "0"),
        ("1e400", "1" + "0" * 400),
    ],
)
@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_json_numbers_keep_their_value(tmp_path: Path, number: str, text: str, ending: str) -> None:
    row = f'{{"problem": "p", "solution": "s", "answer": {number}}}'
    file = tmp_path / f"rows.{ending}"
    file.write_text(row if ending == "jsonl" else f"[{row}]")
    assert load(file).problems[0].answer == text


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        (pyarrow.decimal128(30, 10), Decimal("12345678901234567890.5"), "12345678901234567890.5"),
        (pyarrow.decimal128(20, 12), Decimal("1e-7"), "0.0000001"),
        (pyarrow.float64(), 1e-7, "0.0000001"),
        (pyarrow.float64(), 1e21, "1" + "0" * 21),
        (pyarrow.float32(), 0.1, "0.1"),
        (pyarrow.float16(), 0.1, "0.1"),
        (pyarrow.float32(), 72.0, "72"),
        (pyarrow.uint64(), 12345678901234567890, "12345678901234567890"),
    ],
)
def test_numbers_of_a_table_keep_their_value(
    tmp_path: Path, kind: pyarrow.DataType, value: Any, text: str
) -> None:
    file = tmp_path / "rows.parquet"
    columns = {"problem": ["p", "q"], "solution": ["s", "s"]}
    if kind == pyarrow.float16():
        value = numpy.float16(value)
    table = pyarrow.table(columns | {"answer": pyarrow.array([value, None], kind)})
    pyarrow.parquet.write_table(table, file)
    first, second = load(file, needs_answer=False).problems
    assert (first.answer, second.answer) == (text, "")


def test_a_number_without_end_is_refused(tmp_path: Path) -> None:
    file = write_jsonl(
        tmp_path / "a.jsonl", ['{"problem": "p", "solution": "s", "answer": 1e999999}']
    )
    assert "a.jsonl:1: the column 'answer' holds 1E+999999, which has more than" in refusal(file)
    file.write_text('{"problem": "p", "solution": "s", "answer": 1e-99999999999999999999}')
    assert "malformed JSON (the number 1e-99999999999999999999 is out of range)" in refusal(file)


@pytest.mark.parametrize(
    "heading",
    [
        "#### Remark: units are cm",
        "#### 2. Conclusion",
        "#### 3 ways to see it",
        "####",
        "#### Step",
    ],
)
def test_a_heading_of_markdown_is_no_gsm8k_mark(tmp_path: Path, heading: str) -> None:
    solution = f"## Plan\nSo \\boxed{{7}}.\n\n{heading}"
    problem = load_row(tmp_path, {"problem": "p", "solution": solution})
    assert (problem.solution, problem.answer) == (solution, "7")


@pytest.mark.parametrize(
    "answer",
    [
        *("72", "-3", "2.5", "$18", "18%", "42 cm", "5 apples", "3/4", "1 1/2", "10^{5}", "1e-7"),
        *("\\frac{1}{2}", "$\\frac12$", "\\sqrt{2}", "2\\pi", "9.8 m/s\u00b2", "3 \\text{ cm}"),
        "\uff17\uff12",
    ],
)
def test_what_follows_gsm8k_s_mark_is_like_a_number(tmp_path: Path, answer: str) -> None:
    row = {"question": "q", "answer": f"Steps with \\boxed{{1}}.\n#### {answer}"}
    assert load_row(tmp_path, row).answer == answer


@pytest.mark.parametrize("needs_answer", [True, False])
def test_a_mark_before_the_last_line_is_refused(tmp_path: Path, needs_answer: bool) -> None:
    """Else the row would count as one without an answer."""
    row = {"question": "q", "answer": "2+40=42\n#### 42\n and the reasoning above confirms it."}
    file = write_jsonl(tmp_path / "a.jsonl", [row])
    message = refusal(file, needs_answer=needs_answer)
    assert message.startswith("a.jsonl:1: '#### 42' is not the last line; needs the answer there")
    row["answer"] += " \\boxed{42}"
    assert load_row(tmp_path, row).answer == "42"


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("So the answer is $\\boxed 2$.", "2"),
        ("\\boxed\\frac12", "\\frac12"),
        ("\\fbox -1.5.", "-1.5"),
        ("$\\boxed{\\fbox{3}}$", "3"),
    ],
)
def test_boxes_need_no_braces(tmp_path: Path, solution: str, answer: str) -> None:
    assert load_row(tmp_path, {"problem": "p", "solution": solution}).answer == answer


@pytest.mark.parametrize(
    "row",
    [
        {"problem": "Prove that 1 > 0.", "solution": "Clear."},
        {"problem": "p", "solution": "Clear.", "answer": None},
        {"problem": "p", "solution": "Clear.", "answer": " "},
        {"Question": "p", "COT_Reason": "Clear."},
        {"question": "p", "answer": "It is clear."},
    ],
)
def test_an_answer_may_be_missing_where_none_is_needed(tmp_path: Path, row: Any) -> None:
    problem = load_row(tmp_path, row, needs_answer=False)
    assert problem.answer == "" and "lear." in problem.solution
    file = write_jsonl(tmp_path / "a.jsonl", [row, GOOD])
    assert "a.jsonl:1: no " in refusal(file)
    assert load(file, on_bad_row="skip").num_skipped == 1
    # An evaluation always needs one; it takes a short text in a column of answers for it.
    if row.get("answer") != "It is clear.":
        assert "a.jsonl:1: no " in refusal(file, section="eval", needs_answer=False)


@pytest.mark.parametrize(
    ("row", "columns", "solution", "answer"),
    [
        ({"problem": "p"}, {}, "", ""),
        ({"question": "p", "level": 3}, {}, "", ""),
        ({"prompt": "p"}, {"problem": "prompt"}, "", ""),
        ({"prompt": "p", "answer": "7"}, {"problem": "prompt"}, "", "7"),
        (
            {"prompt": "p", "steps": "So 7."},
            {"problem": "prompt", "solution": "steps"},
            "So 7.",
            "",
        ),
        ({"problem": "p", "answer": " "}, {}, "", ""),
        ({"problem": "p", "solution": None}, {}, "", ""),
        ({"problem": "p", "solution": "Clear."}, {}, "Clear.", ""),
        ({"problem": "p", "answer": "7"}, {}, "", "7"),
        ({"question": "p", "answer": "70"}, {}, "", "70"),
    ],
)
def test_a_problem_alone_is_enough_where_nothing_else_is_needed(
    tmp_path: Path, row: Any, columns: dict[str, str], solution: str, answer: str
) -> None:
    needs = {"needs_solution": False, "needs_answer": False}
    problem = load_row(tmp_path, row, columns=columns, **needs)
    assert problem == Problem("rows.jsonl:1", "p", solution, answer)
    # An evaluation always needs an answer.
    if not answer:
        file = write_jsonl(tmp_path / "a.jsonl", [row])
        assert "a.jsonl:1: no" in refusal(file, columns=columns, section="eval", **needs)


def test_a_column_that_is_named_must_be_there(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"problem": "p"}])
    for role in ("solution", "answer"):
        message = refusal(file, columns={role: "x"}, needs_solution=False, needs_answer=False)
        assert f"no {role}: the column 'x' is missing" in message


def test_feedback_is_a_column_that_may_be_empty(tmp_path: Path) -> None:
    columns = {"feedback": "hint"}
    problem = load_row(tmp_path, GOOD | {"hint": " Look again. "}, columns=columns)
    assert problem == Problem(
        "rows.jsonl:1", GOOD["problem"], GOOD["solution"], "2", feedback="Look again."
    )
    assert load_row(tmp_path, GOOD | {"hint": None}, columns=columns).feedback == ""
    assert load_row(tmp_path, GOOD | {"hint": "Look again."}).feedback == ""
    file = write_jsonl(tmp_path / "a.jsonl", [GOOD])
    message = refusal(file, columns=columns)
    assert "no feedback: the column 'hint' is missing" in message
    assert "with --data.columns.feedback, or leave" in message


def test_a_bare_answer_is_no_solution(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": "70"}])
    message = refusal(file, needs_answer=False)
    assert "no solution: the column 'answer' holds an answer alone" in message


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        (
            {"prompt": "p", "response": "r", "final": 3},
            {"problem": "prompt", "solution": "response", "answer": "final"},
            ("p", "r", "3"),
        ),
        (
            {"prompt": "p", "solution": "s \\boxed{4}"},
            {"problem": "prompt"},
            ("p", "s \\boxed{4}", "4"),
        ),
        (
            {"prompt": "p", "answer": "Add.\n#### 4"},
            {"problem": "prompt", "solution": "answer"},
            ("p", "Add.\nThe answer is \\boxed{4}.", "4"),
        ),
        ({**GOOD, "gold": "9"}, {"answer": "gold"}, (GOOD["problem"], GOOD["solution"], "9")),
    ],
)
def test_column_map(
    tmp_path: Path, row: object, columns: dict[str, str], expected: tuple[str, str, str]
) -> None:
    problem = load_row(tmp_path, row, columns=columns)
    assert (problem.problem, problem.solution, problem.answer) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"problem_idx": 1, "problem": "p", "answer": 70}, ("p", "", "70")),
        ({"question": "p", "answer": "70"}, ("p", "", "70")),
        ({"problem": "p", "solution": "", "answer": "70"}, ("p", "", "70")),
        ({"question": "p", "answer": "x\n#### 70"}, ("p", "x\nThe answer is \\boxed{70}.", "70")),
        (GOOD, (GOOD["problem"], GOOD["solution"], "2")),
    ],
)
def test_evaluation_needs_no_solution(
    tmp_path: Path, row: object, expected: tuple[str, str, str]
) -> None:
    problem = load_row(tmp_path, row, section="eval")
    assert (problem.problem, problem.solution, problem.answer) == expected


# Sources


def test_json_list(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([GOOD, GSM8K]))
    assert [p.problem_id for p in load(file).problems] == ["rows.json[0]", "rows.json[1]"]


def test_parquet_in_several_batches(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    rows = [{**GOOD, "answer": index} for index in range(2500)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    problems = load(file).problems
    assert [p.answer for p in problems] == [str(index) for index in range(2500)]
    assert problems[2499].problem_id == "rows.parquet[2499]"


def test_datasets_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "mine"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [GOOD] * 3)
    write_jsonl(folder / "test.jsonl", [{**GOOD, "answer": "3"}])
    assert [p.problem_id for p in load(folder).problems] == ["mine[0]", "mine[1]", "mine[2]"]
    assert load(folder, split="test").problems[0].answer == "3"
    message = refusal(folder, split="validation")
    assert "failed with ValueError" in message and "(--data.split)" in message


@pytest.mark.parametrize("path", ["pandas", "csv:x", "text"])
def test_the_name_of_a_file_format_is_no_data_set(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` would read the working directory's files with it, of "pandas" a pickle."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.pkl").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    (tmp_path / "train.csv").write_text("problem,solution,answer\na,b,c\n")
    assert f"--data.path {path}: is the name of a file format" in refusal(path)
    assert not (tmp_path / "ran").exists()


def test_datasets_id_with_a_config(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fake(*args: object, **kwargs: object) -> datasets.Dataset:
        calls.append((args, kwargs))
        return datasets.Dataset.from_list([GSM8K])

    monkeypatch.setattr(datasets, "load_dataset", fake)
    assert load("openai/gsm8k:main").problems[0].problem_id == "openai/gsm8k[0]"
    assert calls == [(("openai/gsm8k", "main"), {"split": "train", "revision": None})]


@pytest.mark.parametrize("offline", [False, True])
def test_a_pinned_data_set_is_of_that_revision_or_refused(
    offline: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the network the library takes whatever version is in its cache."""
    commit, asked = "a" * 40, []
    # As the library's cache names its directories.
    file = tmp_path / "some___id" / "0.0.0" / commit / "id-train.arrow"
    file.parent.mkdir(parents=True)
    datasets.Dataset.from_list([GSM8K]).save_to_disk(tmp_path / "saved")
    shutil.copy(next((tmp_path / "saved").glob("*.arrow")), file)

    def fake(*_: object, revision: str | None, **__: object) -> datasets.Dataset:
        asked.append(revision)
        return datasets.Dataset.from_file(str(file))

    monkeypatch.setattr(datasets, "load_dataset", fake)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    assert load("some/id").commit == load("some/id", revision=commit).commit == commit
    with pytest.raises(ValueError, match=rf"--data.revision b+: .* is at commit {commit}; needs"):
        load("some/id", revision="b" * 40)
    if offline:
        with pytest.raises(ValueError, match="give the commit itself"):
            load("some/id", revision="v1")
    else:
        assert load("some/id", revision="v1").commit == commit
    assert asked == [None, commit, "b" * 40, "v1"]


def test_a_revision_of_a_file_is_refused(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [GSM8K])
    for path in (file, tmp_path, "tiny"):
        with pytest.raises(ValueError, match=r"--data.revision v1: .* is no data set of the hub"):
            load(path, revision="v1")


def test_datasets_failure_says_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", fake)
    with pytest.raises(ValueError) as caught:
        load("some/id", section="eval")
    assert isinstance(caught.value.__cause__, ConnectionError)
    for part in (
        "--eval.path some/id",
        "datasets.load_dataset('some/id', None, split='train')",
        "ConnectionError: no route to the hub",
        "needs a .jsonl, .json or .parquet file or the id of a data set",
        "check the spelling, the network, the split (--eval.split)",
        "--eval.path some/id:CONFIG",
    ):
        assert part in str(caught.value)


def test_tiny_goes_to_the_bundled_problems() -> None:
    loaded = load("tiny", split="test", max_rows=3)
    assert loaded.num_skipped == 0
    assert len(loaded.problems) == 3
    assert all(p.problem and p.answer in p.solution for p in loaded.problems)


def test_blanks_at_the_end_windows_lines_and_a_byte_order_mark_are_fine(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    row = json.dumps({**GOOD, "problem": "line\u2028separator"}, ensure_ascii=False).encode()
    file.write_bytes(b"\xef\xbb\xbf" + row + b"\r\n" + row + b"\r\n\n  \n")
    problems = load(file).problems
    assert [p.problem for p in problems] == ["line\u2028separator"] * 2


def test_max_rows_counts_usable_rows_and_reads_no_further(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ["{", GOOD, "{", GOOD, "{", GOOD])
    loaded = load(file, on_bad_row="skip", max_rows=2)
    assert [p.problem_id for p in loaded.problems] == ["a.jsonl:2", "a.jsonl:4"]
    assert loaded.num_skipped == 2


# Bad rows


def test_a_short_solution_is_no_answer(tmp_path: Path) -> None:
    """To be evaluated on, a row needs no solution, but what stands there is not its answer."""
    row = {"problem": "p", "solution": "$6 \\times 5 = 30$. The answer is 30."}
    file = write_jsonl(tmp_path / "a.jsonl", [row])
    assert "no answer to verify against" in refusal(file, section="eval")


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ('{"problem": "p", ', "malformed JSON (Expecting property name"),
        ("[" * 100_000, "malformed JSON"),
        ("", "the line is empty; needs one JSON object per line"),
        ("[1, 2]", "got a list; needs an object"),
        ("3", "got a value of type int; needs an object"),
        ("null", "got null; needs an object"),
        ("{}", "none of the known sets of columns; found no column; needs problem and solution"),
        ({"prompt": "p", "x": 1}, "none of the known sets of columns; found the columns prompt, x"),
        ({"problem": "p", "answer": "3"}, "no column with a solution"),
        ({**GOOD, "problem": "  "}, "no problem: the column 'problem' is empty; needs text"),
        ({**GOOD, "solution": ""}, "no solution: the column 'solution' is empty; needs text"),
        ({**GOOD, "answer": None}, "no answer: the column 'answer' is empty; needs text"),
        ('{"problem": "p", "solution": "s", "answer": NaN}', "the column 'answer' is empty"),
        ({**GOOD, "answer": ["2"]}, "no answer: the column 'answer' holds a list; needs text"),
        ({**GOOD, "answer": True}, "no answer: the column 'answer' holds true; needs text"),
        ({**GOOD, "problem": "\ud800"}, "the column 'problem' holds half a surrogate pair"),
        ({"problem": "p", "solution": "no box"}, "no answer to verify against; found the columns"),
        ({"problem": "p", "solution": "\\boxed{ }"}, "no answer to verify against"),
        ({"question": "q", "answer": "It is 70."}, "ends in '#### 72' or has a \\boxed{} answer"),
        ({"question": "q", "answer": "x ####"}, "no answer to verify against"),
        ({"question": "q", "answer": "70"}, "holds an answer alone; training needs the reasoning"),
        ({"question": "q", "answer": "#### 70"}, "there is no text before '####'"),
    ],
)
def test_bad_row_stops_or_is_skipped(tmp_path: Path, bad: object, said: str) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [GOOD, bad, GSM8K])
    message = refusal(file)
    assert message.startswith("a.jsonl:2: ")
    assert said in message
    assert "--data.columns.problem NAME" in message
    assert message.endswith("--data.on_bad_row skip")
    loaded = load(file, on_bad_row="skip")
    assert [p.problem_id for p in loaded.problems] == ["a.jsonl:1", "a.jsonl:3"]
    assert loaded.num_skipped == 1


def test_mapped_column_that_is_missing(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [GOOD])
    message = refusal(file, columns={"problem": "prompt"}, section="eval")
    assert "a.jsonl:1: no problem: the column 'prompt' is missing" in message
    assert "found the columns problem, solution, answer" in message
    assert "--eval.columns.problem NAME" in message


def test_bad_bytes(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"problem": "caf\xe9"}\n')
    assert "a.jsonl:1: malformed JSON ('utf-8' codec can't decode" in refusal(file)


def test_no_problem_left(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ["{", {**GOOD, "answer": ""}])
    message = refusal(file, on_bad_row="skip")
    assert "no problem left (2 rows skipped, the first a.jsonl:1: malformed JSON" in message
    assert "needs at least one row" in message
    assert "--data.columns.problem NAME" in message


@pytest.mark.parametrize(
    ("name", "content", "said", "remedy"),
    [
        ("a.csv", b"x", "got the file ending '.csv'; needs one of .jsonl, .json", "convert"),
        ("a.jsonl", b"", "the file is empty; needs at least one row", "check how"),
        ("a.jsonl", b" \n\n", "the line is empty", "skip"),
        ("a.json", b"[]", "no problem left (0 rows skipped)", "choose other data"),
        ("a.json", b'{"data": []}', "got an object; needs a list of objects", "only the list"),
        ("a.json", b'{"a": 1}\n{"a": 2}\n', "malformed JSON: Extra data: line 2", ".jsonl"),
        ("a.json", b"[" * 100_000, "malformed JSON", "correct it"),
        ("a.parquet", b"x" * 99, "not readable as Parquet", "write or download it again"),
        ("absent.jsonl", None, "there is no such file; needs a .jsonl", "check the path"),
    ],
)
def test_refused_sources(
    tmp_path: Path, name: str, content: bytes | None, said: str, remedy: str
) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    message = refusal(file)
    assert name in message
    assert said in message
    assert remedy in message


# Order


@properties
@given(n=st.integers(1, 300), seed=st.integers(0, 2**40), epoch=st.integers(0, 1000))
def test_order_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    order = problem_order(n, seed, epoch)
    assert sorted(order) == list(range(n))
    problem_order.cache_clear()
    assert problem_order(n, seed, epoch) == order


def test_order_never_changes_between_versions() -> None:
    assert problem_order(10, 0, 0) == (1, 3, 7, 6, 8, 5, 4, 0, 9, 2)
    assert batch_indices(10, 4, 0, 2) == [9, 2, 3, 6]


def test_order_differs_by_seed_and_epoch_and_is_spread_evenly() -> None:
    orders = {problem_order(50, seed, epoch) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100
    firsts = [problem_order(4, seed, 0)[0] for seed in range(4000)]
    # Each of the 4 comes first 1000 times on average, with a standard deviation of 27.
    assert all(abs(firsts.count(index) - 1000) < 5 * 27 for index in range(4))


@properties
@given(
    n=st.integers(1, 40),
    batch_size=st.integers(1, 50),
    seed=st.integers(0, 9),
    epochs=st.integers(1, 4),
)
def test_steps_walk_through_whole_epochs(n: int, batch_size: int, seed: int, epochs: int) -> None:
    num_steps = -(-n * epochs // batch_size)
    walked = [i for step in range(num_steps) for i in batch_indices(n, batch_size, seed, step)]
    assert len(walked) == num_steps * batch_size
    for epoch in range(epochs):
        assert tuple(walked[epoch * n : (epoch + 1) * n]) == problem_order(n, seed, epoch)


@properties
@given(n=st.integers(1, 40), world_size=st.sampled_from([1, 2, 4]), step=st.integers(0, 30))
def test_a_step_is_the_same_however_it_is_cut_into_smaller_ones(
    n: int, world_size: int, step: int
) -> None:
    whole = batch_indices(n, 8, 0, step)
    size = 8 // world_size
    parts = [batch_indices(n, size, 0, step * world_size + r) for r in range(world_size)]
    assert [index for part in parts for index in part] == whole
