"""GRPO's policy gradient and PAINT's divergence in one loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from paint_engine.config.toml import LEAVES
from paint_engine.recipes.base import HeadWork, LossInputs, LossOutput, reads
from paint_engine.recipes.display import Display, Quantity
from paint_engine.recipes.grpo import Grpo
from paint_engine.recipes.paint import Paint

if TYPE_CHECKING:
    from paint_engine.types import TrainExample

_PARTS = Quantity(
    "Loss by part",
    "per token",
    (
        ("policy_loss", "policy gradient"),
        ("distill_loss", "divergence, before its weight"),
    ),
)


class GrpoPaint(Paint, Grpo):
    """A recipe of both kinds. Its loss is Grpo's plus `objective.distill_weight` times Paint's.

    Each part is what its own recipe computes: advantages within the group for one, the clipped and
    weighted divergence for the other, and `objective.reduction` for each. A rollout for which the
    teacher's context has nothing to show has the policy gradient alone. The KL to the base
    (`grpo.kl_weight`) would need a third pass, which a step does not have.
    """

    keys = (
        *Paint.keys,
        *(key for key in LEAVES if reads(Grpo, key) and key != "grpo.kl_weight"),
        "objective.distill_weight",
    )
    loss_parts = ("policy_loss", "distill_loss")
    recorded_as = "distill_loss"

    @property
    def needs_solution(self) -> bool:
        """The need of the teacher's context."""
        assert self.context is not None
        return self.context.needs_solution

    @property
    def second_pass(self) -> Literal["teacher", "base"] | None:
        """The teacher's, unless a server scores the rollouts."""
        return "teacher" if self.served_top_k is None else None

    @property
    def group_size(self) -> int:
        """Number of rollouts of one problem, whose rewards are compared."""
        return self.config.grpo.group_size

    def check_groups(self) -> None:
        """Raises ValueError for `teacher.group_size`: a rollout's siblings are those whose rewards
        it is compared with."""
        size = self.config.teacher.group_size
        if size != LEAVES["teacher.group_size"].default:
            raise ValueError(
                f"teacher.group_size: got {size} with objective.name 'grpo_paint', whose groups "
                f"are those of the rewards; leave it out, and set --grpo.group_size {size}"
            )

    def notes(self) -> list[str]:
        """Returns the notes of both recipes."""
        return Grpo.notes(self) + Paint.notes(self)

    @property
    def display(self) -> Display:
        """Paint's, with GRPO's numbers and curves before its own, and the parts of the loss."""
        policy, distilled = Grpo(self.config).display, Paint(self.config).display
        of_policy = [q for q in policy.curves if q not in distilled.curves]
        after_loss = 1 + [q.title for q in of_policy].index("Loss")
        of_policy.insert(after_loss, _PARTS)
        of_teacher = [q for q in distilled.curves if q.title != "Loss"]
        return replace(
            distilled,
            console=(
                *(field for field in policy.console if field not in distilled.console),
                *distilled.console,
            ),
            curves=(*of_policy, *of_teacher),
            # The loss of a token has the reward's part, too.
            kinds_note="",
        )

    def trained(self, examples: Sequence[TrainExample]) -> Sequence[TrainExample]:
        """Returns the examples that at least one of the two parts trains."""
        kept = {id(e) for part in (Grpo, Paint) for e in part.trained(self, examples)}
        return [example for example in examples if id(example) in kept]

    @property
    def leaves_out(self) -> bool:
        """Those that neither of the two parts trains."""
        return self._skips and self.chooses

    @property
    def takes_token_losses(self) -> bool:
        """Also where the teacher chooses: the policy gradient trains the other rollouts in the same
        micro-batches."""
        return super().takes_token_losses or self.chooses

    def head_work(self, num_passes: int) -> HeadWork:
        """Returns the work of both losses. The policy gradient has no second pass."""
        policy, distilled = Grpo.head_work(self, 0), Paint.head_work(self, num_passes)
        student = policy.student + distilled.student
        return replace(distilled, student=student, losses=policy.losses + distilled.losses)

    def loss(self, inputs: LossInputs) -> LossOutput:
        """Computes both losses and adds them."""
        policy, distilled = Grpo.loss(self, inputs), Paint.loss(self, inputs)
        weight = self.config.objective.distill_weight
        token_loss = policy.per_token["token_loss"] + weight * distilled.per_token["token_loss"]
        per_token = {**distilled.per_token, **policy.per_token, "token_loss": token_loss}
        if self.chooses and "token_weight" not in per_token:
            # Each token counts 1 here, but not in other micro-batches of the step.
            per_token["token_weight"] = token_loss.new_ones(len(token_loss))
        return LossOutput(
            policy.loss + weight * distilled.loss,
            per_token,
            {"policy_loss": policy.loss.detach(), "distill_loss": distilled.loss.detach()},
        )


RECIPE = GrpoPaint
