"""A verified success among the group's other rollouts: SDPO's context (arXiv 2601.20802)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from paint_engine.config import templates
from paint_engine.contexts.base import Context, Shown
from paint_engine.seeds import sibling_generator

if TYPE_CHECKING:
    from paint_engine.recipes import StepContext
    from paint_engine.types import Problem, Request, TrainExample

_PLACEHOLDER = "(a correct rollout of the same problem)"


class Sibling(Context):
    """The text of a correct rollout of the same group, without its thought.

    A rollout is shown neither itself nor a sibling that wrote the same.
    """

    needs_answer = True
    needs_group = True
    is_optional = True
    teacher_template = templates.SIBLING_TEACHER
    reason_template = templates.SIBLING_REASON

    def show(self, example: TrainExample, request: Request, step: StepContext) -> Shown | None:
        """Returns one of the group's other correct rollouts, each being equally likely."""
        # Imported here because declarations are read without transformers.
        from paint_engine.prompts.control import without_thought

        own, size = example.rollout, step.group_size
        first = request.index - request.index % size
        correct = []
        for place in range(first, first + size):
            sibling = step.batch[place]
            assert sibling.rollout.problem == own.problem, (place, size)
            is_other = place != request.index and sibling.rollout.text != own.text
            if is_other and sibling.verdict is not None and sibling.verdict.correct:
                text = without_thought(sibling.rollout.text).strip()
                correct += [Shown(text, f"rollout {place} of the batch")] if text else []
        if not correct:
            return None
        seed, problem_id = self.config.train.seed, own.problem.problem_id
        return sibling_generator(seed, step.step, problem_id, request.index).choice(correct)

    def placeholder(self, problem: Problem, problems: Sequence[Problem]) -> str:
        """Returns a few words: nothing is sampled yet."""
        return _PLACEHOLDER

    @property
    def num_added_tokens(self) -> int:
        """The longest rollout."""
        return self.config.rollout.max_new_tokens


CONTEXT = Sibling
