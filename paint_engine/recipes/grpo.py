"""GRPO: groups of rollouts of one problem, with a reward for each rollout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Literal

from paint_engine.config.sections import GrpoSection
from paint_engine.recipes.base import LossInputs, LossOutput, Recipe, mean, stale_rollouts_note
from paint_engine.recipes.display import (
    ACCURACY,
    LOSS,
    OVERLAP,
    SAMPLING_CURVES,
    TOKEN_WEIGHTS,
    TOKENS_PER_S,
    ConsoleField,
    Display,
    Quantity,
    TokenColor,
)

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

    from paint_engine.types import TrainExample

_REWARD = Quantity("Reward", "mean over rollouts", (("reward", "reward"),), smooth=True)
_EQUAL_GROUPS = Quantity(
    "Groups without a signal",
    "groups per step",
    (("zero_variance_groups", "all rewards equal"),),
    smooth=True,
)
_BASE_KL = Quantity(
    "KL to the base",
    "nats per token",
    (("base_kl", "KL(student, base), k3"),),
    optional=True,
)
_RATIO_CLIP = Quantity(
    "Ratio clip",
    "share",
    (("ratio_clipped_share", "clipped tokens, no gradient"),),
    percent=True,
)
# Of the least likely tokens, with grpo.advantage "negative" (arXiv 2608.31046, section 3.2).
NEGATIVE_ADVANTAGE = -0.5
# Keeps the division finite if the rewards of a group are almost equal, as in TRL's GRPO.
_STD_FLOOR = 1e-4


class Grpo(Recipe):
    """GRPO. r_t = p_S / p_old is the probability ratio of token t, and A is the advantage of its
    rollout. A token's loss is

        -w_t min(r_t A, clip(r_t, 1 - low, 1 + high) A) + kl_weight (exp(d_t) - d_t - 1),

    with d_t = log p_base - log p_S and w_t = min(p_old / p_sampler, importance_cap), or 1 without a
    cap. p_S is the student's probability, p_old the student's before the updates on this batch,
    p_sampler the one that the sampler recorded, and p_base that of the base.

    With `grpo.advantage` "negative", A does not depend on rewards: it is -1/2 on the
    ceil(negative_fraction n) tokens of a rollout of n that are the least likely by p_old, with ties
    to the lower position, and 0 on the others. It is the teacher-free control of arXiv 2608.31046.
    """

    keys = ("grpo.*", "objective.importance_cap")
    recorded_as = "reward"

    @property
    def needs_solution(self) -> bool:
        """No solution is shown to anyone."""
        return False

    @property
    def needs_answer(self) -> bool:
        """The rewards need one."""
        return True

    @property
    def second_pass(self) -> Literal["teacher", "base"] | None:
        """The base, for the KL to it; None if the KL has no weight."""
        return "base" if self.config.grpo.kl_weight > 0 else None

    @property
    def group_size(self) -> int:
        """Number of rollouts of one problem, whose rewards are compared."""
        return self.config.grpo.group_size

    @property
    def num_updates(self) -> int:
        """Number of optimizer steps on each batch of rollouts."""
        return self.config.grpo.num_updates

    def check(self) -> None:
        """Raises ValueError for a batch that does not consist of whole groups, and for settings of
        an advantage that is not chosen."""
        super().check()
        _check_advantage(self.config.grpo)
        batch_size, size = self.config.train.batch_size, self.config.grpo.group_size
        if batch_size % size:
            raise ValueError(
                f"train.batch_size: got {batch_size} with grpo.group_size {size}; needs a multiple "
                "of it, because a batch consists of whole groups; change one of them"
            )

    def notes(self) -> list[str]:
        """Returns a note on rollouts that are one step old."""
        return stale_rollouts_note(self.config)

    @property
    def display(self) -> Display:
        """The reward first, the loss if it is meaningful, and tokens coloured by entropy."""
        compares = self.config.grpo.advantage == "group"
        return Display(
            console=(
                ConsoleField("reward", "reward", "{:.2f}"),
                ConsoleField("zero_variance_groups", "groups without a signal", "{:.0f}"),
                LOSS,
                ConsoleField("base_kl", "base KL", "{:.4f} nats"),
                OVERLAP,
                ACCURACY,
                TOKENS_PER_S,
            ),
            curves=(
                _REWARD,
                *((_EQUAL_GROUPS,) if compares else ()),
                Quantity("Loss", "per token", (("loss", "loss"),)),
                _BASE_KL,
                _RATIO_CLIP,
                TOKEN_WEIGHTS,
                *SAMPLING_CURVES,
            ),
            token_color=TokenColor("student_entropy", "entropy", "entropy"),
            columns="The left column shows the problem and its verified solution; the right column "
            "shows the student's completion",
            absent="GRPO has no teacher: there is no KL to a teacher, and no solution is shown or "
            "masked.",
            loss_is_flat=loss_is_flat,
            flat_loss_note="with one update per batch each ratio is 1 and a group's advantages "
            "cancel out, so the value stays near zero regardless of learning; see the reward"
            if compares
            else "with one update per batch each ratio is 1 and the advantages are fixed, so the "
            "value stays the same regardless of learning; see the reward",
        )

    def prepare_batch(self, examples: Sequence[TrainExample]) -> Sequence[TrainExample]:
        """Adds to each example the advantage of its rollout within its group."""
        section = self.config.grpo
        if section.advantage == "negative":
            return [replace(example, advantage=NEGATIVE_ADVANTAGE) for example in examples]
        advantages = group_advantages(
            [_reward(e) for e in examples], section.group_size, scale_by_std=section.scale_by_std
        )
        return [replace(e, advantage=a) for e, a in zip(examples, advantages, strict=True)]

    def trained(self, examples: Sequence[TrainExample]) -> Sequence[TrainExample]:
        """Returns the examples that have a gradient, or all without `skip_zero_variance`: an
        advantage of 0 has none."""
        if not self._skips:
            return examples
        kept = [group for group in self._groups(examples) if not has_equal_rewards(group)]
        return [example for group in kept for example in group]

    @property
    def _skips(self) -> bool:
        """Whether the policy gradient has no use for groups of equal rewards. A KL to the base has
        a gradient there too, and so has an advantage that does not depend on rewards."""
        section = self.config.grpo
        compares = section.advantage == "group"
        return section.skip_zero_variance and compares and section.kl_weight == 0

    @property
    def leaves_out(self) -> bool:
        """Those of groups of equal rewards, with `skip_zero_variance`."""
        return self._skips

    def metrics(self, examples: Sequence[TrainExample]) -> dict[str, float]:
        """Returns the rollouts' means, the mean reward and the number of groups without a
        signal."""
        metrics = super().metrics(examples) | {"reward": mean(map(_reward, examples))}
        if self.config.grpo.advantage == "negative":
            return metrics
        return metrics | {
            "zero_variance_groups": sum(map(has_equal_rewards, self._groups(examples)))
        }

    def _groups(self, examples: Sequence[TrainExample]) -> list[Sequence[TrainExample]]:
        size = self.config.grpo.group_size
        return [examples[start : start + size] for start in range(0, len(examples), size)]

    def loss(self, inputs: LossInputs) -> LossOutput:
        """Computes the clipped policy gradient, and the KL to the base by the k3 estimate."""
        import torch

        from paint_engine.recipes import tokens

        section, grpo = self.config.objective, self.config.grpo
        student = tokens.student_logprobs(inputs, section.temperature)
        present = student.logprobs.detach()
        old = present if inputs.old_logprobs is None else inputs.old_logprobs
        ratio = torch.exp(student.logprobs - old)
        advantages = self._token_advantages(inputs, old)
        gain, clipped = clipped_gain(ratio, advantages, grpo)
        weight = tokens.importance_weight(old, inputs, section.importance_cap)
        token_loss = -weight * gain
        per_token = {
            "logprobs": present,
            "ratio": ratio.detach(),
            "ratio_clipped_share": clipped,
            "importance_weight": weight,
            "student_entropy": student.entropy,
        }
        if grpo.kl_weight > 0:
            base = tokens.second_logprobs(inputs, section.temperature)
            difference = base.logprobs - student.logprobs
            base_kl = torch.expm1(difference) - difference
            token_loss = token_loss + grpo.kl_weight * base_kl
            per_token["base_kl"] = base_kl.detach()
        if grpo.advantage == "negative":
            per_token["suppressed_share"] = advantages < 0
        per_token["token_loss"] = token_loss.detach()
        loss = tokens.reduced(token_loss, inputs.cu_seqlens, section.reduction, inputs.denominator)
        return LossOutput(loss, per_token)

    def _token_advantages(self, inputs: LossInputs, old: Float[Tensor, " N"]) -> Tensor:
        """Returns the advantage of each token, (N,): its rollout's, or 0 on the tokens that a
        negative one leaves alone. `old` are the tokens' log-probabilities before the updates."""
        import torch

        from paint_engine.recipes import tokens
        from paint_kernels import select_top_fraction

        section = self.config.grpo
        advantages = torch.tensor([e.advantage for e in inputs.examples], dtype=torch.float64)
        rows = tokens.rollout_of_token(inputs.cu_seqlens).to(old.device)
        by_token = advantages.to(old)[rows]
        if section.advantage == "group":
            return by_token
        bounds = inputs.cu_seqlens.to(old.device)
        return by_token * select_top_fraction(-old, bounds, section.negative_fraction)


def _check_advantage(section: GrpoSection) -> None:
    """Raises ValueError for a setting that the advantage has no use for."""
    if section.advantage == "group":
        idle, why, other = ("negative_fraction",), "is the same for a rollout's tokens", "negative"
    else:
        idle, why, other = ("scale_by_std",), "compares no rewards", "group"
    for name in idle:
        value = getattr(section, name)
        if value != GrpoSection.model_fields[name].default:
            raise ValueError(
                f"grpo.{name}: got {value} with grpo.advantage {section.advantage!r}, which {why}; "
                f"leave it out, or use --grpo.advantage {other}"
            )


def group_advantages(
    rewards: Sequence[float], group_size: int, *, scale_by_std: bool
) -> list[float]:
    """Returns each reward minus its group's mean, divided by the group's sample standard deviation
    (n - 1) plus 1e-4 if requested. Groups are consecutive. A group of equal rewards has exact
    zeros."""
    assert group_size >= 2 and len(rewards) % group_size == 0, (len(rewards), group_size)
    advantages: list[float] = []
    for start in range(0, len(rewards), group_size):
        group = rewards[start : start + group_size]
        if len(set(group)) == 1:
            advantages += [0.0] * group_size
            continue
        center, scale = fmean(group), stdev(group) + _STD_FLOOR if scale_by_std else 1.0
        advantages += [(reward - center) / scale for reward in group]
    return advantages


def has_equal_rewards(group: Sequence[TrainExample]) -> bool:
    """Returns whether a group has no signal about which of its rollouts are better."""
    return len({_reward(example) for example in group}) == 1


def loss_is_flat(metrics: Mapping[str, float]) -> bool:
    """Returns whether the step had one update without a KL. The ratios are then 1, and a group's
    advantages cancel out regardless of learning. A step without a ratio did not train."""
    return "reward" in metrics and "base_kl" not in metrics and metrics.get("ratio", 1.0) == 1.0


def clipped_gain(
    ratio: Float[Tensor, " N"], advantage: Float[Tensor, " N"], section: GrpoSection
) -> tuple[Float[Tensor, " N"], Bool[Tensor, " N"]]:
    """Returns min(r A, clip(r) A), and where the clip decides; there the gain has no gradient."""
    import torch

    low, high = 1 - section.ratio_clip_low, 1 + section.ratio_clip_high
    gain = torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
    clipped = ((ratio > high) & (advantage > 0)) | ((ratio < low) & (advantage < 0))
    return gain, clipped


def _reward(example: TrainExample) -> float:
    assert example.verdict is not None
    return example.verdict.reward


RECIPE = Grpo
