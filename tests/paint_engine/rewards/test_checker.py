"""Final-answer checking: verdicts, hostile answers, and the life of the child process."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from paint_engine.rewards.boxes import extract_boxed, first_box_equals
from paint_engine.rewards.checker import MAX_ANSWER_CHARS, AnswerCheck, AnswerChecker, check_answer


@pytest.fixture(scope="module")
def checker() -> Iterator[AnswerChecker]:
    with AnswerChecker() as shared:
        yield shared


@pytest.fixture(scope="module")
def brief_checker() -> Iterator[AnswerChecker]:
    with AnswerChecker(timeout_s=2.0) as shared:
        yield shared


def boxed(answer: str) -> str:
    return f"Adding up, the answer is $\\boxed{{{answer}}}$."


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{72}", "72"),
        (r"\boxed{1} and then \boxed{2}", "2"),
        (r"\boxed{ \frac{1}{\sqrt{2}} }", r"\frac{1}{\sqrt{2}}"),
        (r"\framebox{204} minutes", "204"),
        (r"\fbox {x = \{1, 2\}}", r"x = \{1, 2\}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"{ unbalanced \boxed{7}", "7"),
        (r"\boxed{8} but then \boxed{9", "8"),
        (r"\boxed{}", ""),
        (r"\boxed 5", "5"),
        ("no box", None),
        ("", None),
    ],
)
def test_the_last_balanced_box_is_extracted(text: str, content: str | None) -> None:
    assert extract_boxed(text) == content


@pytest.mark.parametrize(
    ("text", "answer", "equal"),
    [
        (r"so \boxed{72}", "72", True),
        (r"\boxed{72} or rather \boxed{70}", "72", True),
        (r"\boxed{70} or rather \boxed{72}", "72", False),
        (r"\boxed{ \frac{1}{2} }", r"\frac{1}{2}", True),
        (r"\boxed{\frac{1}{2}}", "0.5", False),
        (r"\boxed{1,000}", "1000", False),
        (r"\boxed{East}", " EAST ", True),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}", True),
        (r"\fbox{5} \boxed{6}", "6", True),
        (r"\boxed{5 and \boxed{6}", "6", False),
        (r"\boxed{}", "6", False),
        ("6", "6", False),
        ("", "", False),
    ],
)
def test_the_first_box_is_compared_as_text(text: str, answer: str, equal: bool) -> None:
    assert first_box_equals(text, answer) is equal


EQUAL = [
    ("72", "72"),
    ("204", "0204"),
    ("1000", "1,000"),
    ("1,000", "1{,}000"),
    ("18", r"\$18"),
    ("18", r"18.00\text{ dollars}"),
    ("-5", "\u2212 5"),
    ("- 5", "-5"),
    ("50", r"50\%"),
    ("90", r"90^\circ"),
    (r"\boxed{7}", "7"),
    ("0.5", r"\frac12"),
    (r"\frac{1}{2}", "0.5"),
    (r"\frac{1}{2}", r"\dfrac 1 2"),
    ("1/3", "0.3333333333"),
    ("5", "x=5"),
    ("x=5", "5"),
    ("[1,2)", "[1, 2)"),
    (r"\{1,2\}", r"\{2,1\}"),
    ("1, 2", "2, 1"),
    (r"(-\infty, 3]", r"\left(-\infty, 3\right]"),
    ("1<x<2", "(1,2)"),
    (r"\sqrt{8}", r"2\sqrt{2}"),
    ("x^2+2x+1", "(x+1)^2"),
    ("1000000", "10^6"),
    (r"\text{Monday}", "Monday"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    ("9" * 1500, "9" * 1500),
]
UNEQUAL = [
    ("72", "73"),
    ("7", "-7"),
    ("7", "- 7"),
    ("12", "124"),
    ("9" * 1500, "9" * 1499 + "8"),
    ("9007199254740993", "9007199254740992"),
    ("0.5", "0.6"),
    (r"\frac12", r"\frac13"),
    ("[1,2)", "[1,2]"),
    (r"\{1,2\}", r"\{1,3\}"),
    ("y=2x", "x=2y"),
    ("x^2", "x^3"),
    (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ("72", r"\text{unknown}"),
    ("72", "???"),
    ("72", r"\frac{72}"),
]


@pytest.mark.parametrize(("answer", "given"), EQUAL)
def test_equal_answers(checker: AnswerChecker, answer: str, given: str) -> None:
    assert checker.check(answer, boxed(given)) == AnswerCheck(True, given, None)


@pytest.mark.parametrize(("answer", "given"), UNEQUAL)
def test_unequal_answers(checker: AnswerChecker, answer: str, given: str) -> None:
    assert checker.check(answer, boxed(given)) == AnswerCheck(False, given, None)


def test_only_the_last_box_counts(checker: AnswerChecker) -> None:
    assert checker.check("72", r"\boxed{72}, no: \boxed{71}").correct is False
    assert checker.check("72", r"\boxed{71}, no: \framebox{72}").correct is True


@pytest.mark.parametrize("answer", ["72", "", r"\boxed{}"])
@pytest.mark.parametrize("text", [boxed(""), boxed(" \n"), r"\boxed{72}, as in \boxed{}"])
def test_a_blank_box_is_no_answer(checker: AnswerChecker, answer: str, text: str) -> None:
    """And the last box is the one that counts, even so."""
    assert checker.check(answer, text) == AnswerCheck(False, None, None)


def test_no_box_is_wrong_and_no_error() -> None:
    assert check_answer("72", "the answer is 72") == AnswerCheck(False, None, None)


HOSTILE = {
    "tower": "9^{9^{9^{9}}}",
    "factorials": "(((10!)!)!)!",
    "endless sum": r"\sum_{n=1}^{10^{12}} \frac{1}{n^3+n}",
    "nested braces": "{" * 900 + "1" + "}" * 900,
    "nested brackets": "(" * 990 + "1" + ")" * 990,
    "nested roots": r"\sqrt{" * 250 + "2" + "}" * 250,
    "long": "x+" * 50_000,
    "digits": "9" * 100_000,
    "file": r"\input{/etc/passwd}",
    "control": "\x00\x07\ud800",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_are_not_correct(brief_checker: AnswerChecker, name: str) -> None:
    check = brief_checker.check("x^2+1", boxed(HOSTILE[name]))
    assert check.correct is False
    # The next answer is not touched by it.
    assert brief_checker.check("5", boxed("x=5")) == AnswerCheck(True, "x=5", None)


def test_the_slowest_answer_is_given_up() -> None:
    check = check_answer("x^2+1", boxed(HOSTILE["tower"]))
    assert check.correct is False
    assert check.error == "the comparison took longer than 5 s"


def test_an_unbalanced_flood_of_boxes_ends_in_time(checker: AnswerChecker) -> None:
    """In processor time, of which a busy machine takes no more."""
    start = time.process_time()
    assert checker.check("72", r"\boxed{" * 14_000).extracted is None
    assert time.process_time() - start < 10.0


@pytest.mark.parametrize(
    "code",
    [
        "__import__('os').system('touch {path}')",
        "\\text{{__import__('os').system('touch {path}')}}",
        "open('{path}', 'w')",
        "\\immediate\\write18{{touch {path}}}",
    ],
)
def test_answers_are_never_run_as_code(checker: AnswerChecker, code: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    for answer, given in (("72", code.format(path=trace)), (code.format(path=trace), "x+1")):
        assert checker.check(answer, boxed(given)).correct is False
    assert not trace.exists()


def test_long_answers_are_refused_with_their_length(checker: AnswerChecker) -> None:
    check = checker.check("72", boxed("7" * (MAX_ANSWER_CHARS + 1)))
    assert check.correct is False and check.extracted == "7" * MAX_ANSWER_CHARS
    assert check.error is not None and "2001 characters" in check.error


def test_a_timeout_is_an_error_and_the_next_check_works() -> None:
    with AnswerChecker(timeout_s=3.0) as checker:
        check = checker.check("72", boxed("9^{9^{9^{9}}}"))
        assert check == AnswerCheck(False, "9^{9^{9^{9}}}", "the comparison took longer than 3 s")
        assert checker.check(r"\frac12", boxed("0.5")).correct is True


def worker_pid(checker: AnswerChecker) -> int:
    assert checker.check(r"\frac12", boxed("0.5")).correct is True
    assert checker._worker._child is not None
    return checker._worker._child._process.pid


def test_a_child_that_died_between_checks_is_replaced() -> None:
    with AnswerChecker() as checker:
        pid = worker_pid(checker)
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert worker_pid(checker) != pid


def test_a_child_that_dies_during_a_check_is_an_error() -> None:
    with AnswerChecker() as checker:
        killer = threading.Timer(0.5, os.kill, (worker_pid(checker), signal.SIGKILL))
        killer.start()
        check = checker.check("72", boxed("9^{9^{9^{9}}}"))
        killer.join()
        assert check.correct is False
        assert check.error == "the answer checker stopped (exit code -9)"
        assert checker.check(r"\frac12", boxed("0.5")).correct is True


def test_close_ends_the_child_and_a_later_check_starts_another() -> None:
    checker = AnswerChecker()
    pid = worker_pid(checker)
    checker.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert worker_pid(checker) != pid
    checker.close()
    checker.close()


def test_the_child_does_not_share_the_terminal_session() -> None:
    with AnswerChecker() as checker:
        assert os.getsid(worker_pid(checker)) != os.getsid(0)


def test_the_answer_of_an_interrupted_check_is_not_the_next_one_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with AnswerChecker() as checker:
        worker_pid(checker)
        with monkeypatch.context() as patched:
            patched.setattr("paint_engine.worker.json.loads", interrupt)
            with pytest.raises(KeyboardInterrupt):
                checker.check(r"\frac12", boxed("0.5"))
        assert checker.check(r"\frac12", boxed("0.6")).correct is False
        assert checker.check(r"\frac12", boxed("0.5")).correct is True


def interrupt(line: str) -> None:
    raise KeyboardInterrupt


def test_threads_share_one_checker(checker: AnswerChecker) -> None:
    verdicts: dict[int, bool] = {}

    def check(number: int) -> None:
        verdicts[number] = checker.check(f"{number}", boxed(f"\\frac{{{2 * number}}}{{2}}")).correct

    threads = [threading.Thread(target=check, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == dict.fromkeys(range(8), True)


SCRIPT = r"""
import sys
from paint_engine.rewards.checker import _shared_checker, check_answer
assert check_answer(r"\frac{1}{2}", r"\boxed{0.5}").correct
assert not {"math_verify", "sympy", "torch"} & set(sys.modules)
print(_shared_checker(5.0)._worker._child._process.pid)
"""


@pytest.mark.parametrize("how", ["-c", "stdin"])
def test_a_process_without_main_module_ends_cleanly(how: str) -> None:
    arguments = ["-c", SCRIPT] if how == "-c" else ["-"]
    done = subprocess.run(
        [sys.executable, *arguments],
        input=SCRIPT if how == "stdin" else "",
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert done.stderr == ""
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)


def test_timeout_must_be_positive() -> None:
    with pytest.raises(ValueError, match=r"timeout_s is 0\.0"):
        AnswerChecker(timeout_s=0.0)
