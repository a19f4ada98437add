"""The answer check: whether a completion's last boxed answer equals the reference answer.

Answers that are equal in notation, or plain numbers, are compared here. `answers`, with math-verify
on sympy, compares the others in a child process that is killed at its time limit, because what a
model writes into a box can keep a computer-algebra system busy forever. The calling process imports
neither math-verify nor torch.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Self

from paint_engine.rewards.answers.units import Quantity, are_different_units, split_unit
from paint_engine.rewards.boxes import extract_boxed
from paint_engine.rewards.notation import normalize_answer, to_tex
from paint_engine.worker import Worker

# Final answers are short; a longer one is degenerate text, and the parsers are superlinear in it.
MAX_ANSWER_CHARS = 2000

# Starting the child is one import of sympy, 0.5 s where the disk is warm.
_START_LIMIT_S = 60.0
_MEMORY_LIMIT_BYTES = 2 << 30
_LAYOUT = re.compile(r"\\begin|\\\\|&")
_INTEGER = re.compile(r"-?[0-9]+")
_DECIMAL = re.compile(r"([+-]?)([0-9]+)(?:\.([0-9]+))?")


@dataclass(frozen=True)
class AnswerCheck:
    """What the check says of one completion.

    AnswerCheck(correct=True, extracted="\\\\frac{1}{2}", error=None)

    `extracted` is the last boxed answer, None where there is none or the last box is blank. `error`
    says why no verdict was reached (time, memory, length). `correct` is False then, and the
    completion counts apart from wrong ones.
    """

    correct: bool
    extracted: str | None
    error: str | None


def check_answer(answer: str, completion: str, timeout_s: float = 5.0) -> AnswerCheck:
    """Whether the last boxed answer of `completion` equals the gold `answer`.

    timeout_s: bound on the comparison, in seconds, whatever the text.

    One checker for each `timeout_s` serves the whole process: its child starts with the first
    comparison that needs it and ends with the process. See AnswerChecker.
    """
    return _shared_checker(timeout_s).check(answer, completion)


def equal_answers(first: str, second: str) -> bool | None:
    """Whether two boxed answers, neither of which is the reference, are equal; None where that
    could not be found out in time.

    The comparison is not symmetric (x = 5 answers 5), so both orders are tried.
    """
    for gold, answer in ((first, second), (second, first)):
        verdict = check_answer(gold, f"\\boxed{{{answer}}}")
        if verdict.error is not None:
            return None
        if verdict.correct:
            return True
    return False


def boxed_answer(completion: str) -> str | None:
    """The last boxed answer, cut at MAX_ANSWER_CHARS; None where there is none or it is blank."""
    # A blank box is no answer: a thinking model quotes the \boxed{} of its instruction.
    return (extract_boxed(completion) or "")[:MAX_ANSWER_CHARS] or None


class AnswerChecker:
    """One child process that compares answers, restarted after a timeout or a crash.

    with AnswerChecker(timeout_s=5.0) as checker:
        checker.check("72", "so the total is \\\\boxed{72}").correct

    `timeout_s` bounds one comparison, in seconds. Threads may share a checker: they take turns.
    """

    def __init__(self, timeout_s: float = 5.0) -> None:
        if not 0.0 < timeout_s < float("inf"):
            raise ValueError(f"timeout_s is {timeout_s}: give a positive number of seconds.")
        self._worker = Worker(
            "paint_engine.rewards.checker:load_comparison",
            [],
            call="the comparison",
            process="the answer checker",
            timeout_s=timeout_s,
            start_limit_s=_START_LIMIT_S,
            advice=f'see what this says: {sys.executable} -c "import math_verify"',
        )

    def check(self, answer: str, completion: str) -> AnswerCheck:
        """Compare the last boxed answer of `completion` with the gold `answer`.

        Answers that are equal in notation, or both plain numbers, are decided here. The others go
        to the child, gold first: x = 5 answers 5, 0.5 answers \\frac{1}{2}, and sets and intervals
        compare as such. docs/answers.md has the rules.
        """
        extracted = boxed_answer(completion)
        if extracted is None:
            return AnswerCheck(False, None, None)
        whole = extract_boxed(completion) or ""
        for name, text in (("the reference answer", answer), ("the boxed answer", whole)):
            if len(text) > MAX_ANSWER_CHARS:
                error = (
                    f"{name} has {len(text)} characters; at most {MAX_ANSWER_CHARS} are compared"
                )
                return AnswerCheck(False, extracted, error)
        boxed_gold = extract_boxed(answer)
        gold = answer.strip() if boxed_gold is None else boxed_gold
        verdict = _compare_plain(gold, extracted)
        if verdict is not None:
            return AnswerCheck(verdict, extracted, None)
        reply = self._worker.ask([gold, extracted])
        return AnswerCheck(reply.value is True, extracted, reply.error)

    def close(self) -> None:
        """End the child process. A later check starts a new one."""
        self._worker.close()

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
def _shared_checker(timeout_s: float) -> AnswerChecker:
    return AnswerChecker(timeout_s)


def _compare_plain(gold: str, extracted: str) -> bool | None:
    """The verdict where neither algebra nor structure is needed, else None."""
    if _INTEGER.fullmatch(gold) and _INTEGER.fullmatch(extracted):
        return _plain_number(Quantity(gold)) == _plain_number(Quantity(extracted))
    gold, extracted = to_tex(gold), to_tex(extracted)
    first, second = split_unit(gold, is_gold=True), split_unit(extracted)
    numbers = _plain_number(first), _plain_number(second)
    if None not in numbers:
        return numbers[0] == numbers[1] and not are_different_units(first.unit, second.unit)
    # The notation of matrices and aligned lines does not survive normalisation.
    if _LAYOUT.search(gold + extracted):
        return None
    normalized = normalize_answer(gold)
    return True if normalized and normalized == normalize_answer(extracted) else None


def _plain_number(quantity: Quantity) -> str | None:
    """An integer or decimal without +, needless zeros or degrees; None for anything else.

    Numbers stay text: int() refuses 4,301 digits, and float() makes different integers equal.
    """
    if quantity.magnitude:
        return None
    text = quantity.text
    if not _INTEGER.fullmatch(text):
        text = normalize_answer(text.strip().rstrip("."))
    match = _DECIMAL.fullmatch(text)
    if match is None:
        return None
    sign, whole, decimals = match.groups(default="")
    whole, decimals = whole.lstrip("0") or "0", decimals.rstrip("0")
    magnitude = f"{whole}.{decimals}" if decimals else whole
    return f"-{magnitude}" if sign == "-" and magnitude != "0" else magnitude


def load_comparison() -> Callable[[list[str]], bool]:
    """Builds the comparison of [gold, extracted]. The child process calls it."""
    from paint_engine.rewards.answers.algebra import MathVerify
    from paint_engine.rewards.answers.compare import compare_answers

    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_LIMIT_BYTES, _MEMORY_LIMIT_BYTES))
    algebra = MathVerify()
    return lambda answers: compare_answers(answers[0], answers[1], algebra)
