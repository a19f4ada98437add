"""Another training problem's solution, masked: the control for what a solution's content does."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from paint_engine.contexts.base import KEY, Context, Shown
from paint_engine.seeds import other_generator

if TYPE_CHECKING:
    from paint_engine.recipes import StepContext
    from paint_engine.types import Problem, Request, TrainExample


class Other(Context):
    """The reference solution of another problem, drawn for each rollout.

    The message is that of the context "solution", word for word, so that runs with the two differ
    in the text alone.
    """

    needs_solution = True
    is_masked = True

    def check_problems(self, problems: Sequence[Problem]) -> None:
        """Raises ValueError if there is no other problem to show for one of them."""
        questions = Counter(p.problem for p in problems)
        solutions = Counter(p.solution for p in problems)
        both = Counter((p.problem, p.solution) for p in problems)
        for p in problems:
            num_same = questions[p.problem] + solutions[p.solution] - both[p.problem, p.solution]
            if num_same == len(problems):
                raise ValueError(
                    f"{self.config.data.path}: {p.problem_id}: none of {len(problems)} problems "
                    f"has both another question and another solution; {KEY} {self.name!r} needs "
                    f"at least two distinct problems; use more rows, or another --{KEY}"
                )

    def show(self, example: TrainExample, request: Request, step: StepContext) -> Shown | None:
        """Returns the solution of a problem with another id, question and solution, each such
        problem being equally likely."""
        problem = example.rollout.problem
        generator = other_generator(
            self.config.train.seed, step.step, problem.problem_id, request.index
        )
        other = draw_other(problem, step.problems, generator)
        return Shown(other.solution, other.problem_id)

    def placeholder(self, problem: Problem, problems: Sequence[Problem]) -> str:
        """Returns the solution that a rollout of the first step would be shown."""
        generator = other_generator(self.config.train.seed, 0, problem.problem_id, 0)
        return draw_other(problem, problems, generator).solution

    def texts_of(self, problem: Problem) -> tuple[str, ...]:
        """Returns the solution, which rollouts of other problems are shown."""
        return (problem.solution,)


def draw_other(problem: Problem, problems: Sequence[Problem], generator: random.Random) -> Problem:
    """Draws one of the problems whose question and solution both differ from this one's.

    There must be one (`check_problems`). A problem drawn in vain is drawn again: almost all of a
    data set's problems are distinct.
    """
    while True:
        other = problems[generator.randrange(len(problems))]
        if other.problem != problem.problem and other.solution != problem.solution:
            return other


CONTEXT = Other
