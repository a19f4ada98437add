"""Final-answer checking, bounded in time and memory.

The comparison of two LaTeX answers (math-verify, on sympy) runs in one child process that is killed
when it exceeds its time: what a model writes into a box can keep a computer-algebra system busy for
ever. In the calling process this module imports neither math-verify nor torch.
"""

import atexit
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Self

from paint_engine.prompts.anchors import normalize_math
from paint_engine.rewards.boxes import extract_boxed

# Final answers are short; a longer one is degenerate text, and the parsers are superlinear in it.
MAX_ANSWER_CHARS = 2000


# Starting the child is one import of sympy, 0.5 s where the disk is warm.
_START_LIMIT_S = 60.0
_MEMORY_LIMIT_BYTES = 2 << 30
_UNIT = re.compile(r"\s*\\(?:text|mbox|mathrm|textrm|rm)\s*\{[^{}]*\}(?:\^\{?[0-9]\}?)?$")
_LAYOUT = re.compile(r"\\begin|\\\\|&")
_DECIMAL = re.compile(r"([+-]?)([0-9]+)(?:\.([0-9]+))?")


@dataclass(frozen=True)
class AnswerCheck:
    """The verdict on one completion.

    AnswerCheck(correct=True, extracted="\\\\frac{1}{2}", error=None)

    `extracted` is the last boxed answer, None where there is none or the last box is blank. `error`
    says why no verdict was reached (time, memory, length); then `correct` is False, and it counts
    apart from wrong answers.
    """

    correct: bool
    extracted: str | None
    error: str | None


def check_answer(answer: str, completion: str) -> AnswerCheck:
    """Whether the last boxed answer of `completion` equals the gold `answer`.

    One checker serves the whole process: its child starts with the first comparison that needs it
    and ends with the process. Returns within 10 seconds whatever the text. See AnswerChecker.
    """
    return _shared_checker().check(answer, completion)


def equal_answers(first: str, second: str) -> bool | None:
    """Whether two boxed answers, neither of which is the reference, say the same; None where that
    could not be found out in time.

    The comparison takes its two sides differently (x = 5 answers 5), so both ways are tried.
    """
    for gold, answer in ((first, second), (second, first)):
        verdict = check_answer(gold, f"\\boxed{{{answer}}}")
        if verdict.error is not None:
            return None
        if verdict.correct:
            return True
    return False


class AnswerChecker:
    """One child process that compares answers, restarted after a timeout or a crash.

    with AnswerChecker(timeout_s=5.0) as checker:
        checker.check("72", "so the total is \\\\boxed{72}").correct

    `timeout_s` bounds one comparison, in seconds. Threads may share a checker: they take turns.
    """

    def __init__(self, timeout_s: float = 5.0) -> None:
        if not 0.0 < timeout_s < float("inf"):
            raise ValueError(f"timeout_s is {timeout_s}: give a positive number of seconds.")
        self.timeout_s = timeout_s
        self._worker: _Worker | None = None
        self._lock = threading.Lock()

    def check(self, answer: str, completion: str) -> AnswerCheck:
        """Compare the last boxed answer of `completion` with the gold `answer`.

        Equal in notation, or both integers: decided here. Everything else: math-verify, gold first,
        so that x = 5 answers 5, 0.5 answers \\frac{1}{2}, and sets and intervals compare as such.
        """
        extracted = extract_boxed(completion)
        # A blank box is no answer: a thinking model quotes the \boxed{} of its instruction.
        if not extracted:
            return AnswerCheck(False, None, None)
        for name, text in (("the reference answer", answer), ("the boxed answer", extracted)):
            if len(text) > MAX_ANSWER_CHARS:
                error = (
                    f"{name} has {len(text)} characters; at most {MAX_ANSWER_CHARS} are compared"
                )
                return AnswerCheck(False, extracted[:MAX_ANSWER_CHARS], error)
        boxed_gold = extract_boxed(answer)
        gold = answer.strip() if boxed_gold is None else boxed_gold
        verdict = _compare_plain(gold, extracted)
        if verdict is not None:
            return AnswerCheck(verdict, extracted, None)
        with self._lock:
            return self._compare_symbolic(gold, extracted)

    def _compare_symbolic(self, gold: str, extracted: str) -> AnswerCheck:
        if self._worker is None or not self._worker.alive():
            self._stop_worker()
            self._worker = _Worker(self.timeout_s)
        worker = self._worker
        worker.wait_until_ready()
        reply = worker.ask(gold, extracted, self.timeout_s)
        if isinstance(reply, bool):
            return AnswerCheck(reply, extracted, None)
        if not worker.reusable:
            # The replacement imports sympy while the caller goes on.
            self._stop_worker()
            self._worker = _Worker(self.timeout_s)
        return AnswerCheck(False, extracted, reply)

    def _stop_worker(self) -> None:
        if self._worker is not None:
            self._worker.stop()
            self._worker = None

    def close(self) -> None:
        """End the child process. A later check starts a new one."""
        with self._lock:
            self._stop_worker()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


@cache
def _shared_checker() -> AnswerChecker:
    checker = AnswerChecker()
    atexit.register(checker.close)
    return checker


def _compare_plain(gold: str, extracted: str) -> bool | None:
    """The verdict where no algebra is needed, else None."""
    gold_number, number = _plain_number(gold), _plain_number(extracted)
    if gold_number is not None and number is not None:
        if gold_number == number:
            return True
        if "." not in gold_number and "." not in number:
            return False
    # The notation of matrices and aligned lines does not survive normalisation.
    if _LAYOUT.search(gold + extracted):
        return None
    normalized = _normalized(gold)
    return True if normalized and normalized == _normalized(extracted) else None


def _normalized(text: str) -> str:
    # Between delimiters "- 7" is a number; elsewhere it is an item of a list.
    return normalize_math(f"\\({' '.join(text.split())}\\)")


def _plain_number(text: str) -> str | None:
    """An integer or decimal without +, needless zeros, unit, $ or %; None for anything else.

    Numbers stay text: int() refuses 4,301 digits, and float() makes different integers equal.
    """
    text = _UNIT.sub("", text.strip().rstrip("."))
    text = _normalized(text).rstrip("%").rstrip(".")
    match = _DECIMAL.fullmatch(text)
    if match is None:
        return None
    sign, whole, decimals = match.groups(default="")
    whole, decimals = whole.lstrip("0") or "0", decimals.rstrip("0")
    magnitude = f"{whole}.{decimals}" if decimals else whole
    return f"-{magnitude}" if sign == "-" and magnitude != "0" else magnitude


class _Worker:
    """The child process and the socket to it: one JSON line each way per question.

    A plain child, not multiprocessing, which would import the caller's __main__ again, or fork a
    process that holds threads and a GPU. Its own session keeps a Ctrl-C at the terminal from it.
    """

    _SOURCE = (
        "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
        "from paint_engine.rewards.checker import _serve; "
        "_serve(int(sys.argv[2]), float(sys.argv[3]))"
    )

    def __init__(self, timeout_s: float) -> None:
        self._socket, child_socket = socket.socketpair()
        with child_socket:
            handle = child_socket.fileno()
            arguments = [json.dumps(sys.path), str(handle), str(timeout_s)]
            self._process = subprocess.Popen(
                [sys.executable, "-c", self._SOURCE, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(handle,),
                start_new_session=True,
            )
        self._replies = self._socket.makefile("r", encoding="utf-8")
        self._ready = False
        self.reusable = True

    def alive(self) -> bool:
        return self._process.poll() is None

    def wait_until_ready(self) -> None:
        if self._ready:
            return
        self._socket.settimeout(_START_LIMIT_S)
        try:
            greeting = self._replies.readline()
        except TimeoutError:
            greeting = ""
        if not greeting:
            self.stop()
            raise RuntimeError(
                f"The answer checker did not start within {_START_LIMIT_S:.0f} s (exit code "
                f"{self._process.returncode}). See what this says: "
                f'{sys.executable} -c "import math_verify"'
            )
        self._ready = True

    def ask(self, gold: str, extracted: str, timeout_s: float) -> bool | str:
        """Whether the two answers are equal, or why there is no verdict."""
        self._socket.settimeout(timeout_s)
        self.reusable = False
        try:
            self._socket.sendall((json.dumps([gold, extracted]) + "\n").encode())
            line = self._replies.readline()
        except TimeoutError:
            return f"the comparison took longer than {timeout_s:g} s"
        except ConnectionError:
            line = ""
        if not line:
            return f"the answer checker stopped (exit code {self._process.wait()})"
        self.reusable = True
        return json.loads(line)

    def stop(self) -> None:
        self._replies.close()
        self._socket.close()
        self._process.kill()
        self._process.wait()


def _serve(handle: int, timeout_s: float) -> None:
    """The child's life: greet, then answer one line at a time until the parent's end closes."""
    from math_verify import LatexExtractionConfig, parse, verify

    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_LIMIT_BYTES, _MEMORY_LIMIT_BYTES))
    # LaTeX only: math-verify's plain-expression parser hands its text to Python's eval.
    gold_config = [LatexExtractionConfig()]
    answer_config = [
        LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)
    ]

    def judge(gold: str, extracted: str) -> bool:
        # math-verify's own timeouts rest on a Python signal handler, which waits for C code to end.
        parsed_gold = parse(f"${gold}$", gold_config, parsing_timeout=0, raise_on_error=True)
        parsed = parse(
            f"\\boxed{{{extracted}}}", answer_config, parsing_timeout=0, raise_on_error=True
        )
        return verify(parsed_gold, parsed, timeout_seconds=0)

    with socket.socket(fileno=handle) as connection:
        channel = connection.makefile("rw", encoding="utf-8")
        channel.write("ready\n")
        channel.flush()
        for line in channel:
            # The kernel ends the child even if the parent has died in the meantime.
            signal.setitimer(signal.ITIMER_REAL, timeout_s + 5.0)
            try:
                reply = bool(judge(*json.loads(line)))
            except Exception as error:
                reply = f"{type(error).__name__}: {str(error)[:200]}"
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            channel.write(json.dumps(reply) + "\n")
            channel.flush()
