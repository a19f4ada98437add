"""What the recipes with a privileged teacher share: its settings and its view of each rollout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from paint_engine.recipes.base import Recipe, StepContext, mean

if TYPE_CHECKING:
    from paint_engine.types import TrainExample


class TeacherRecipe(Recipe):
    """The student is compared with a teacher that sees a part of the verified solution."""

    keys = ("masking.*", "teacher.*")
    uses_teacher = True

    def check(self) -> None:
        """Raises ValueError for settings of the teacher that do not fit together."""
        super().check()
        teacher, prompts = self.config.teacher, self.config.prompts
        if teacher.weights != "ema" and teacher.ema_decay != 0.999:
            raise ValueError(
                f"teacher.ema_decay: got {teacher.ema_decay} with teacher.weights "
                f"{teacher.weights!r}, which is no running mean; leave it out, or use "
                "--teacher.weights ema"
            )
        if teacher.weights == "ema" and not self.config.lora.enabled:
            raise ValueError(
                "teacher.weights: got 'ema' with lora.enabled false; the running mean is one of "
                "adapters; train adapters, or use --teacher.weights fixed or live"
            )
        if teacher.reason_first and self.config.rollout.ahead:
            raise ValueError(
                "rollout.ahead: got 1 with teacher.reason_first true; the engine that samples the "
                "next batch also writes the rationales, so training would wait for both; leave "
                "out one of them"
            )
        if teacher.reason_first and "{rationale}" not in prompts.teacher_template:
            raise ValueError(
                f"prompts.teacher_template: got {prompts.teacher_template!r} with "
                "teacher.reason_first true; needs {rationale} in it, since a rationale would be "
                "written and shown to nobody; add it, or use --teacher.reason_first false"
            )

    def prepare(
        self, context: StepContext, examples: Sequence[TrainExample]
    ) -> Sequence[TrainExample]:
        """This rank's examples, each with the teacher's view."""
        from paint_engine.recipes.teacher_view import add_rationales, add_teacher_view

        pairs = zip(examples, context.requests, strict=True)
        viewed = [
            add_teacher_view(self.config, context, example, request) for example, request in pairs
        ]
        if self.config.teacher.reason_first:
            return add_rationales(self.config, context, viewed)
        return viewed

    def metrics(self, examples: Sequence[TrainExample]) -> dict[str, float]:
        """The rollouts' means, and those of the teacher's views."""
        views = [e.teacher_view for e in examples if e.teacher_view is not None]
        return super().metrics(examples) | {
            "mask_ratio": mean(view.mask_ratio for view in views),
            "shortened_solutions": mean(view.shortened for view in views),
        }
