"""Feedback on the rollout: from the reward function, else from a column of the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from paint_engine.config import templates
from paint_engine.config.plugins import is_own
from paint_engine.contexts.base import KEY, Context, Shown
from paint_engine.types import MAX_FEEDBACK_CHARACTERS

if TYPE_CHECKING:
    from paint_engine.recipes import StepContext
    from paint_engine.types import Problem, Request, TrainExample

_PLACEHOLDER = "(what the reward function returns as feedback)"
# Of English text in the usual vocabularies.
_CHARACTERS_PER_TOKEN = 4


class Feedback(Context):
    """`Verdict.feedback` of the rollout if the reward function returned one, else the row's column
    `data.columns.feedback`."""

    keys = ("data.columns.feedback",)
    is_optional = True
    teacher_template = templates.FEEDBACK_TEACHER
    reason_template = templates.FEEDBACK_REASON

    @property
    def _may_be_returned(self) -> bool:
        """Whether the reward function may return feedback: a user's own, no built-in one."""
        return is_own(self.config.reward.function)

    def check(self) -> None:
        """Raises ValueError where no feedback can come from anywhere."""
        super().check()
        function = self.config.reward.function
        if self.config.data.columns.feedback is None and not self._may_be_returned:
            raise ValueError(
                f"{KEY}: got {self.name!r} with reward.function {function!r}, which returns no "
                "feedback, and data.columns.feedback none; needs one of the two; name a column "
                "with --data.columns.feedback NAME, or with --reward.function a function of your "
                "own that returns Verdict(reward, correct, feedback=...)"
            )

    def check_problems(self, problems: Sequence[Problem]) -> None:
        """Raises ValueError if the column is the only source, and empty in every row."""
        if not self._may_be_returned and not any(p.feedback for p in problems):
            data = self.config.data
            raise ValueError(
                f"{data.path}: no feedback in the column {data.columns.feedback!r} of any of "
                f"{len(problems)} rows; {KEY} {self.name!r} needs text in some; name another "
                "column with --data.columns.feedback"
            )

    def show(self, example: TrainExample, request: Request, step: StepContext) -> Shown | None:
        """Returns the feedback, or None if there is none for this rollout."""
        problem, verdict = example.rollout.problem, example.verdict
        returned = "" if verdict is None else verdict.feedback.strip()
        text = returned or problem.feedback
        return Shown(text, problem.problem_id) if text else None

    def placeholder(self, problem: Problem, problems: Sequence[Problem]) -> str:
        """Returns the column's text, or a few words for what the reward function returns."""
        return problem.feedback or _PLACEHOLDER

    @property
    def num_added_tokens(self) -> int:
        """About the longest feedback that a reward function may return."""
        return MAX_FEEDBACK_CHARACTERS // _CHARACTERS_PER_TOKEN if self._may_be_returned else 0

    def texts_of(self, problem: Problem) -> tuple[str, ...]:
        """Returns the column's text."""
        return (problem.feedback,)


CONTEXT = Feedback
