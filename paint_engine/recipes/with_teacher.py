"""The base of recipes with a teacher: its settings, its context, and the teacher view of each
rollout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from paint_engine.recipes.base import LossInputs, Recipe, StepContext, mean
from paint_engine.recipes.teacher_keys import check_teacher
from paint_engine.recipes.token_weights import load_weighting, weights_of

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from paint_engine.types import TrainExample


class TeacherRecipe(Recipe):
    """A recipe that compares the student with a teacher that sees what `teacher.context` shows: by
    default, a part of the verified solution.

    `objective.on` leaves the other rollouts out of the passes. A recipe whose loss multiplies its
    tokens by `token_weights` has "objective.token_weights" in its keys.
    """

    keys = ("masking.*", "teacher.*", "data.columns.feedback", "objective.on")
    uses_teacher = True

    @property
    def needs_answer(self) -> bool:
        """The context's need, and that of `objective.on`: without answers there are no verdicts to
        choose by."""
        return super().needs_answer or self.config.objective.on != "all"

    @property
    def second_pass(self) -> Literal["teacher", "base"] | None:
        """The teacher's pass, unless a server scores the rollouts."""
        return super().second_pass if self.served_top_k is None else None

    @property
    def served_top_k(self) -> int | None:
        """`teacher.served_top_k` if there is a server."""
        teacher = self.config.teacher
        return None if teacher.url is None else teacher.served_top_k

    def check_served(self) -> None:
        """Raises ValueError for settings that the loss cannot have with a server. Here it is the
        server itself: a recipe whose loss reads `served` of the examples overrides this."""
        raise ValueError(
            f"teacher.url: got {self.config.teacher.url} with objective.name "
            f"{self.config.objective.name!r}, whose loss needs the teacher's hidden states, which "
            "no server sends; leave it out, or use --objective.name paint or sampled_token"
        )

    def check_groups(self) -> None:
        """Raises ValueError for a batch that does not consist of whole groups. Called for a context
        that needs groups; a recipe that has groups of its own overrides this."""
        batch_size, teacher = self.config.train.batch_size, self.config.teacher
        if batch_size % teacher.group_size:
            raise ValueError(
                f"train.batch_size: got {batch_size} with teacher.group_size {teacher.group_size} "
                f"and teacher.context {teacher.context!r}; needs a multiple of it, because a batch "
                "consists of whole groups; change one of them"
            )

    def check(self) -> None:
        """Raises ValueError for settings of the teacher that contradict each other."""
        super().check()
        load_weighting(self.config.objective.token_weights)
        assert self.context is not None
        self.context.check()
        if self.context.needs_group:
            self.check_groups()
        check_teacher(self.config)
        teacher = self.config.teacher
        if teacher.reason_first and self.config.rollout.ahead:
            raise ValueError(
                "rollout.ahead: got 1 with teacher.reason_first true; the engine that samples the "
                "next batch also writes the rationales, so training would wait for both; use only "
                "one of them"
            )
        if teacher.url is not None:
            self.check_served()

    def notes(self) -> list[str]:
        """Returns the context's notes."""
        assert self.context is not None
        return self.context.notes()

    def prepare(
        self, context: StepContext, examples: Sequence[TrainExample]
    ) -> Sequence[TrainExample]:
        """Adds the teacher view to each of this rank's examples for which the context has something
        to show."""
        from paint_engine.recipes.teacher_view import add_rationales, add_teacher_view

        shows = self.context
        assert shows is not None
        pairs = zip(examples, context.requests, strict=True)
        viewed = [add_teacher_view(shows, context, example, request) for example, request in pairs]
        if self.config.teacher.reason_first:
            return add_rationales(shows, context, viewed)
        return viewed

    @property
    def chooses(self) -> bool:
        """Whether the teacher may leave some rollouts untaught: by `objective.on`, or because its
        context has nothing to show for them."""
        assert self.context is not None
        return self.config.objective.on != "all" or self.context.is_optional

    def teaches(self, example: TrainExample) -> bool:
        """Returns whether the teacher trains this rollout: its context has something to show for
        it, and `objective.on` lets it. A rollout without a verdict is neither right nor wrong."""
        on, verdict = self.config.objective.on, example.verdict
        is_chosen = on == "all" or (verdict is not None and verdict.correct == (on == "right"))
        assert self.context is not None
        return is_chosen and (example.teacher_view is not None or not self.context.is_optional)

    def trained(self, examples: Sequence[TrainExample]) -> Sequence[TrainExample]:
        """Returns the examples that the teacher trains. The others still count in the means."""
        return [example for example in examples if self.teaches(example)]

    @property
    def leaves_out(self) -> bool:
        """The rollouts that the teacher does not train."""
        return self.chooses

    def weighs(self, examples: Sequence[TrainExample]) -> bool:
        """Returns whether tokens of these examples count differently: then `token_weights` has
        their weights, else each counts 1."""
        uniform = load_weighting(self.config.objective.token_weights) is None
        return not uniform or not all(map(self.teaches, examples))

    def token_weights(
        self,
        inputs: LossInputs,
        *,
        student_entropy: Float[Tensor, " N"],
        teacher_entropy: Float[Tensor, " N"] | None,
        divergence: Float[Tensor, " N"],
    ) -> Float[Tensor, " N"]:
        """Returns the weights of `objective.token_weights`, (N,), and 0 for rollouts that the
        teacher does not train. Constants for the gradient.

        teacher_entropy: None if it is not known.
        divergence: of each token to the teacher, without clip and weights, in nats.
        """
        import torch

        from paint_engine.recipes.tokens import rollout_of_token

        name = self.config.objective.token_weights
        weighting, taught = load_weighting(name), [self.teaches(e) for e in inputs.examples]
        if weighting is None:
            rows = rollout_of_token(inputs.cu_seqlens)
            return torch.tensor(taught, dtype=torch.bool)[rows].to(divergence)
        return weights_of(
            name,
            weighting,
            inputs,
            student_entropy=student_entropy,
            teacher_entropy=teacher_entropy,
            divergence=divergence,
            taught=taught,
        )

    def metrics(self, examples: Sequence[TrainExample]) -> dict[str, float]:
        """Returns the rollouts' means and the teacher views' means."""
        metrics, shows = super().metrics(examples), self.context
        assert shows is not None
        views = [e.teacher_view for e in examples if e.teacher_view is not None]
        if shows.is_optional:
            metrics["context_share"] = len(views) / len(examples)
        if shows.is_masked:
            metrics["mask_ratio"] = mean(view.mask_ratio for view in views)
        if shows.shows_text:
            metrics["shortened_solutions"] = mean(view.shortened for view in views)
        if self.config.objective.on != "all":
            metrics["taught_share"] = mean(map(self.teaches, examples))
        return metrics
