"""The problem's own reference solution, masked: PAINT's and OPSD's context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from paint_engine.contexts.base import Context, Shown

if TYPE_CHECKING:
    from paint_engine.recipes import StepContext
    from paint_engine.types import Problem, Request, TrainExample


class Solution(Context):
    """The reference solution of the rollout's problem."""

    needs_solution = True
    is_masked = True

    def show(self, example: TrainExample, request: Request, step: StepContext) -> Shown | None:
        """Returns the solution."""
        problem = example.rollout.problem
        return Shown(problem.solution, problem.problem_id)

    def placeholder(self, problem: Problem, problems: Sequence[Problem]) -> str:
        """Returns the solution."""
        return problem.solution

    def texts_of(self, problem: Problem) -> tuple[str, ...]:
        """Returns the solution."""
        return (problem.solution,)


CONTEXT = Solution
