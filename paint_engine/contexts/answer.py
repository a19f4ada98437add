"""The reference's final answer alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from paint_engine.config import templates
from paint_engine.contexts.base import Context, Shown

if TYPE_CHECKING:
    from paint_engine.recipes import StepContext
    from paint_engine.types import Problem, Request, TrainExample


class Answer(Context):
    """The final answer of the rollout's problem, whole."""

    needs_answer = True
    teacher_template = templates.ANSWER_TEACHER
    reason_template = templates.ANSWER_REASON

    def show(self, example: TrainExample, request: Request, step: StepContext) -> Shown | None:
        """Returns the answer."""
        problem = example.rollout.problem
        return Shown(problem.answer, problem.problem_id)

    def placeholder(self, problem: Problem, problems: Sequence[Problem]) -> str:
        """Returns the answer."""
        return problem.answer

    def texts_of(self, problem: Problem) -> tuple[str, ...]:
        """Returns the answer."""
        return (problem.answer,)


CONTEXT = Answer
