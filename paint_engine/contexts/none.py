"""Nothing: plain on-policy distillation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from paint_engine.contexts.base import KEY, Context, Shown

if TYPE_CHECKING:
    from paint_engine.recipes import StepContext
    from paint_engine.types import Problem, Request, TrainExample

# Teachers that are the base, or the student, as the run starts.
_OWN_WEIGHTS = ("fixed", "ema", "live")


class Nothing(Context):
    """The student's message, with the teacher's thinking switch and suffix, or a template of the
    user's own without {solution}."""

    shows_text = False

    @property
    def message(self) -> str:
        """The student's template in place of the default."""
        prompts = self.config.prompts
        default = type(prompts).model_fields["teacher_template"].default
        own = prompts.teacher_template
        return prompts.student_template if own == default else own

    def check(self) -> None:
        """Raises ValueError for a rationale, or a template with a place, of a text that is not
        there."""
        if self.config.teacher.reason_first:
            raise ValueError(
                f"teacher.reason_first: got true with {KEY} {self.name!r}, which shows the teacher "
                f"no text to reason from; leave it out, or use another --{KEY}"
            )
        for name in ("{solution}", "{part_of}", "{rationale}"):
            if name in self.message:
                raise ValueError(
                    f"prompts.teacher_template: got {self.message!r} with {KEY} {self.name!r}, "
                    f"which shows the teacher no text; needs no {name} in it; leave the template "
                    f"out to give the teacher the student's message, or use another --{KEY}"
                )
        super().check()

    def notes(self) -> list[str]:
        """Returns a note if student and teacher are one model on one prompt."""
        prompts, teacher = self.config.prompts, self.config.teacher
        weights = teacher.weights
        is_same = self.message == prompts.student_template and prompts.teacher_suffix == ""
        is_same = is_same and prompts.teacher_thinking == prompts.student_thinking
        own_weights = weights in _OWN_WEIGHTS or (
            weights == "external" and teacher.model == self.config.model.name_or_path
        )
        if not is_same or not own_weights or teacher.url is not None:
            return []
        whose = (
            "the student itself" if weights == "live" else "the base, as which the student starts,"
        )
        return [
            f"with {KEY} {self.name} and teacher.weights {weights} the teacher is {whose} on the "
            "student's own prompt: they agree, and the loss stays at zero but for rounding; a "
            "teacher that differs has other weights, or --prompts.teacher_thinking or "
            "--prompts.teacher_suffix of its own"
        ]

    def show(self, example: TrainExample, request: Request, step: StepContext) -> Shown | None:
        """Returns an empty text."""
        return Shown("", "")

    def placeholder(self, problem: Problem, problems: Sequence[Problem]) -> str:
        """Returns an empty text."""
        return ""


CONTEXT = Nothing
