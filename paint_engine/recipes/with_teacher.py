"""The base of recipes with a privileged teacher: its settings and the teacher view of each
rollout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from paint_engine.recipes.base import Recipe, StepContext, mean

if TYPE_CHECKING:
    from paint_engine.types import TrainExample


class TeacherRecipe(Recipe):
    """A recipe that compares the student with a teacher that sees a part of the verified
    solution."""

    keys = ("masking.*", "teacher.*")
    uses_teacher = True

    def check(self) -> None:
        """Raises ValueError for settings of the teacher that contradict each other."""
        super().check()
        teacher, prompts = self.config.teacher, self.config.prompts
        if teacher.weights != "ema" and teacher.ema_decay != 0.999:
            raise ValueError(
                f"teacher.ema_decay: got {teacher.ema_decay} with teacher.weights "
                f"{teacher.weights!r}, which has no running mean; leave it out, or use "
                "--teacher.weights ema"
            )
        if teacher.weights == "ema" and not self.config.lora.enabled:
            raise ValueError(
                "teacher.weights: got 'ema' with lora.enabled false; the running mean needs "
                "adapters; set --lora.enabled true, or use --teacher.weights fixed or live"
            )
        if teacher.reason_first and self.config.rollout.ahead:
            raise ValueError(
                "rollout.ahead: got 1 with teacher.reason_first true; the engine that samples the "
                "next batch also writes the rationales, so training would wait for both; use only "
                "one of them"
            )
        if teacher.reason_first and "{rationale}" not in prompts.teacher_template:
            raise ValueError(
                f"prompts.teacher_template: got {prompts.teacher_template!r} with "
                "teacher.reason_first true; needs {rationale} in it, because the rationale would "
                "otherwise appear nowhere; add it, or use --teacher.reason_first false"
            )

    def prepare(
        self, context: StepContext, examples: Sequence[TrainExample]
    ) -> Sequence[TrainExample]:
        """Adds the teacher view to each of this rank's examples."""
        from paint_engine.recipes.teacher_view import add_rationales, add_teacher_view

        pairs = zip(examples, context.requests, strict=True)
        viewed = [
            add_teacher_view(self.config, context, example, request) for example, request in pairs
        ]
        if self.config.teacher.reason_first:
            return add_rationales(self.config, context, viewed)
        return viewed

    def metrics(self, examples: Sequence[TrainExample]) -> dict[str, float]:
        """Returns the rollouts' means and the teacher views' means."""
        views = [e.teacher_view for e in examples if e.teacher_view is not None]
        return super().metrics(examples) | {
            "mask_ratio": mean(view.mask_ratio for view in views),
            "shortened_solutions": mean(view.shortened for view in views),
        }
