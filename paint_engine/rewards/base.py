"""What a reward is, and how the value of a user's function becomes a verdict."""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from numbers import Real
from typing import ClassVar

from paint_engine.types import MAX_FEEDBACK_CHARACTERS, Problem, Verdict

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class RewardFailed(Exception):
    """Every call of the user's reward function failed: there is nothing to train on or to count."""


class Reward(ABC):
    """Judges completions. A built-in reward is a module of this package with its class as REWARD.

    has_answers: `final_answer` finds what a completion answers. An evaluation then counts the
        completions that give an answer, and takes a majority vote over the answers.
    is_own: it is the user's function, and a run stops where every call of it fails. A built-in
        reward fails on what a model wrote, which stops no run.
    """

    has_answers: ClassVar[bool] = False
    is_own: ClassVar[bool] = False

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s

    @abstractmethod
    def judge(self, problem: Problem, text: str) -> Verdict:
        """The verdict on a completion, within `timeout_s` seconds or with an error. Threads may
        call it at the same time."""

    def final_answer(self, text: str) -> str | None:
        """Returns what a completion answers, or None if it answers nothing."""
        return None

    def check_some_judged(self, errors: Sequence[str | None], what: str) -> None:
        """Raises RewardFailed where a user's function failed on every completion.

        errors: of the verdicts on all completions of `what`, a step or an evaluation.
        """
        if self.is_own and errors and None not in errors:
            raise RewardFailed(
                f"the reward function failed on each of {len(errors)} completions of {what}, first "
                f"with: {errors[0]}; needs one that returns a number, a bool or a Verdict within "
                f"reward.timeout_s ({self.timeout_s:g} s); correct it. These completions are not "
                "kept."
            )

    def close(self) -> None:  # noqa: B027 (most rewards hold nothing)
        """Frees what the reward holds."""


def to_verdict(value: object) -> Verdict:
    """A reward function's value as a verdict: a number, a bool or a Verdict.

    A number r is the reward, and the completion counts as correct where r > 0. True is 1.0, False
    0.0. A function that gives a wrong answer a positive reward, as for its format, returns a
    Verdict. So does one that returns feedback.

    Raises ValueError for anything else, for a reward that is not finite, and for feedback that is
    no text of at most `MAX_FEEDBACK_CHARACTERS` characters.
    """
    if isinstance(value, Verdict):
        verdict = value
        if not (isinstance(verdict.correct, bool) and isinstance(verdict.error, str | None)):
            raise ValueError(
                f"returned {verdict!r:.200}; needs a bool for correct, and a text or None for error"
            )
    elif isinstance(value, Real):
        verdict = Verdict(float(value), float(value) > 0)
    else:
        raise ValueError(
            f"returned {value!r:.200}, of type {type(value).__name__}; needs a number, a bool or a "
            "paint_engine.types.Verdict"
        )
    if not (isinstance(verdict.reward, Real) and math.isfinite(verdict.reward)):
        raise ValueError(f"returned {value!r:.200}; needs a reward that is a finite number")
    _check_feedback(verdict.feedback)
    return Verdict(
        float(verdict.reward), bool(verdict.correct), verdict.error, str(verdict.feedback)
    )


def _check_feedback(feedback: object) -> None:
    if not isinstance(feedback, str):
        raise ValueError(
            f"returned the feedback {feedback!r:.200}, of type {type(feedback).__name__}; needs a "
            'text; return "" for none'
        )
    if len(feedback) > MAX_FEEDBACK_CHARACTERS:
        raise ValueError(
            f"returned feedback of {len(feedback):,} characters; needs at most "
            f"{MAX_FEEDBACK_CHARACTERS:,}, since the teacher's prompt shows it; shorten it"
        )
    if _LONE_SURROGATE.search(feedback):
        raise ValueError(
            "returned feedback with half a surrogate pair; needs valid Unicode; decode the text "
            'with errors="replace"'
        )
