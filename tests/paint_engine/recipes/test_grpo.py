"""GRPO against a float64 oracle that holds all logits, and against numbers worked out by hand."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from paint_engine.config.schema import Config
from paint_engine.config.sections import GrpoSection, ObjectiveSection
from paint_engine.recipes import LossInputs, LossOutput, SecondPass
from paint_engine.recipes.grpo import Grpo, group_advantages
from paint_engine.types import Problem, Rollout, TrainExample, Verdict

VOCAB_SIZE, NUM_PADDING_ROWS, HIDDEN_SIZE = 11, 2, 5
# Two groups of three rollouts, one of which has no tokens.
LENGTHS, GROUP_SIZE = (4, 0, 3, 1, 5, 2), 3
REWARDS = (1.0, 0.0, 0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class Batch:
    """Leaves that take gradients, and what is constant beside them."""

    hidden: Tensor
    head: Tensor
    base_hidden: Tensor
    base_head: Tensor
    token_ids: Tensor
    old_logprobs: Tensor
    rollout_logprobs: Tensor


def log_p(hidden: Tensor, head: Tensor, temperature: float) -> Tensor:
    return F.log_softmax((hidden @ head.T)[..., :VOCAB_SIZE] / temperature, dim=-1)


def make_batch(temperature: float) -> Batch:
    """Old log-probabilities around the present ones, on both sides of the clip."""
    draw = torch.Generator().manual_seed(3)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    num_tokens, num_rows = sum(LENGTHS), VOCAB_SIZE + NUM_PADDING_ROWS
    hidden, head = noise(num_tokens, HIDDEN_SIZE), noise(num_rows, HIDDEN_SIZE)
    token_ids = torch.randint(VOCAB_SIZE, (num_tokens,), generator=draw)
    present = log_p(hidden, head, temperature)[torch.arange(num_tokens), token_ids]
    old = present + 0.6 * noise(num_tokens)
    return Batch(
        hidden=hidden.requires_grad_(),
        head=head.requires_grad_(),
        base_hidden=noise(num_tokens, HIDDEN_SIZE),
        base_head=noise(num_rows, HIDDEN_SIZE),
        token_ids=token_ids,
        old_logprobs=old,
        rollout_logprobs=old + 0.5 * noise(num_tokens),
    )


def recipe_of(section: ObjectiveSection, grpo: GrpoSection) -> Grpo:
    """Unchecked: these sections say nothing of how the rollouts were sampled."""
    return Grpo(Config.model_construct(objective=section, grpo=grpo))


def make_example(
    token_ids: Sequence[int], logprobs: Sequence[float], reward: float
) -> TrainExample:
    problem = Problem("p", "", "", "")
    rollout = Rollout(problem, (0,), tuple(token_ids), tuple(logprobs), False, "")
    return TrainExample(rollout, Verdict(reward, reward > 0))


def loss_of(
    recipe: Grpo,
    examples: Sequence[TrainExample],
    hidden: Tensor,
    head: Tensor,
    *,
    base: tuple[Tensor, Tensor | None],
    old_logprobs: Tensor | None,
    vocab_size: int = VOCAB_SIZE,
) -> LossOutput:
    """The loss of a step of one micro-batch. base: its hidden states, and its own head or None."""
    lengths = [len(example.rollout.completion_ids) for example in examples]
    per_rollout = recipe.config.objective.reduction == "sequence_mean"
    inputs = LossInputs(
        student_hidden_states=hidden,
        lm_head_weight=head,
        second_passes=(SecondPass(*base),) if recipe.second_pass == "base" else (),
        completion_ids=torch.tensor([i for e in examples for i in e.rollout.completion_ids]),
        cu_seqlens=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        examples=examples,
        old_logprobs=old_logprobs,
        vocab_size=vocab_size,
        denominator=len(lengths) if per_rollout else sum(lengths),
    )
    return recipe.loss(inputs)


def engine(
    batch: Batch,
    section: ObjectiveSection,
    grpo: GrpoSection,
    *,
    rewards: tuple[float, ...] = REWARDS,
    first_update: bool = False,
) -> LossOutput:
    recipe = recipe_of(section, grpo.model_copy(update={"group_size": GROUP_SIZE}))
    assert recipe.second_pass == ("base" if grpo.kl_weight > 0 else None)
    parts = zip(
        batch.token_ids.split(LENGTHS), batch.rollout_logprobs.split(LENGTHS), rewards, strict=True
    )
    examples = [make_example(ids.tolist(), sampled.tolist(), r) for ids, sampled, r in parts]
    return loss_of(
        recipe,
        recipe.prepare_batch(examples),
        batch.hidden,
        batch.head,
        base=(batch.base_hidden, batch.base_head),
        old_logprobs=None if first_update else batch.old_logprobs,
    )


def advantage_by_hand(rollout: int, *, scale_by_std: bool) -> float:
    first = rollout // GROUP_SIZE * GROUP_SIZE
    group = REWARDS[first : first + GROUP_SIZE]
    mean = sum(group) / GROUP_SIZE
    variance = sum((reward - mean) ** 2 for reward in group) / (GROUP_SIZE - 1)
    return (REWARDS[rollout] - mean) / (math.sqrt(variance) + 1e-4 if scale_by_std else 1.0)


def oracle(
    batch: Batch, section: ObjectiveSection, grpo: GrpoSection, *, first_update: bool
) -> tuple[Tensor, list[str]]:
    """The loss token by token, with the clip as the bound that it is: from above on what a good
    rollout gains, from below on what a bad one loses. And what acted at each token."""
    acted, rollouts = [], []
    for rollout, length in enumerate(LENGTHS):
        advantage = advantage_by_hand(rollout, scale_by_std=grpo.scale_by_std)
        tokens = []
        for t in range(sum(LENGTHS[:rollout]), sum(LENGTHS[:rollout]) + length):
            token = batch.token_ids[t]
            own = log_p(batch.hidden[t], batch.head, section.temperature)[token]
            old = own.detach() if first_update else batch.old_logprobs[t]
            ratio = own.exp() / old.exp()
            bound = 1 + grpo.ratio_clip_high if advantage > 0 else 1 - grpo.ratio_clip_low
            outside = ratio.item() > bound if advantage > 0 else ratio.item() < bound
            weight = 1.0
            if section.importance_cap is not None:
                weight = (old.exp() / batch.rollout_logprobs[t].exp()).item()
                acted += ["capped"] if weight > section.importance_cap else ["weighted"]
                weight = min(weight, section.importance_cap)
            loss = -weight * advantage * (bound if outside else ratio)
            acted.append(("high" if advantage > 0 else "low") if outside else "inside")
            if grpo.kl_weight > 0:
                base = log_p(batch.base_hidden[t], batch.base_head, section.temperature)[token]
                quotient = base.exp() / own.exp()
                loss = loss + grpo.kl_weight * (quotient - quotient.log() - 1)
            tokens.append(torch.as_tensor(loss, dtype=torch.float64))
        rollouts.append(tokens)
    if section.reduction == "token_mean":
        return torch.stack([loss for tokens in rollouts for loss in tokens]).mean(), acted
    means = [torch.stack(tokens).mean() for tokens in rollouts if tokens]
    return torch.stack(means).sum() / len(LENGTHS), acted


def gradients(loss: Tensor, batch: Batch) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, (batch.hidden, batch.head))


@pytest.mark.parametrize("scale_by_std", [True, False])
@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
@pytest.mark.parametrize("cap", [None, 1.2])
def test_loss_and_gradients_against_the_oracle(
    cap: float | None,
    kl_weight: float,
    reduction: str,
    scale_by_std: bool,
    relative_error: Callable[[Tensor, Tensor], float],
) -> None:
    section = ObjectiveSection.model_validate(
        {"name": "grpo", "reduction": reduction, "importance_cap": cap, "temperature": 1.2}
    )
    grpo = GrpoSection(kl_weight=kl_weight, scale_by_std=scale_by_std)
    batch = make_batch(section.temperature)
    expected, acted = oracle(batch, section, grpo, first_update=False)
    output = engine(batch, section, grpo)
    assert {"high", "low", "inside"} <= set(acted)
    assert cap is None or {"capped", "weighted"} <= set(acted)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    pairs = zip(gradients(output.loss, batch), gradients(expected, batch), strict=True)
    for actual, wanted in pairs:
        assert relative_error(actual, wanted) < 1e-12
    clipped = int(output.per_token["ratio_clipped_share"].sum())
    assert clipped == acted.count("high") + acted.count("low")
    assert ("base_kl" in output.per_token) == (kl_weight > 0)


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
def test_first_update_has_the_policy_gradient(
    reduction: str, relative_error: Callable[[Tensor, Tensor], float]
) -> None:
    section = ObjectiveSection.model_validate({"reduction": reduction, "importance_cap": 1.2})
    grpo = GrpoSection(kl_weight=0.3)
    batch = make_batch(section.temperature)
    output = engine(batch, section, grpo, first_update=True)
    expected, _ = oracle(batch, section, grpo, first_update=True)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    pairs = zip(gradients(output.loss, batch), gradients(expected, batch), strict=True)
    for actual, wanted in pairs:
        assert relative_error(actual, wanted) < 1e-12
    assert torch.equal(output.per_token["ratio"], torch.ones(sum(LENGTHS), dtype=torch.float64))
    # What the next update on these rollouts takes as the old ones.
    rows = torch.arange(sum(LENGTHS))
    present = log_p(batch.hidden, batch.head, section.temperature)[rows, batch.token_ids]
    assert torch.allclose(output.per_token["logprobs"], present, rtol=1e-13, atol=0)


def two_tokens(section: ObjectiveSection, grpo: GrpoSection) -> tuple[Tensor, Tensor]:
    """Two rollouts of one token, rewards 1 and 0: loss, and its gradient by the logits.

    The student's distribution is (3/4, 1/4) at both. Token 0 of the first had 1/2 in the old policy
    and 5/8 in the sampler, token 1 of the second 1/5 and 1/10. The base has (3/8, 5/8) at the
    first, and the student's own at the second.
    """
    logits = torch.tensor([[math.log(3), 0.0]] * 2, dtype=torch.float64, requires_grad=True)
    base = torch.tensor([[math.log(3), math.log(5)], [math.log(3), 0.0]], dtype=torch.float64)
    advantages = group_advantages((1.0, 0.0), 2, scale_by_std=False)
    assert advantages == [0.5, -0.5]
    examples = [
        replace(make_example((0,), (math.log(5 / 8),), 1.0), advantage=advantages[0]),
        replace(make_example((1,), (math.log(1 / 10),), 0.0), advantage=advantages[1]),
    ]
    loss = loss_of(
        recipe_of(section, grpo),
        examples,
        logits,
        torch.eye(2, dtype=torch.float64),
        base=(base, None),
        old_logprobs=torch.tensor([1 / 2, 1 / 5], dtype=torch.float64).log(),
        vocab_size=2,
    ).loss
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def test_two_tokens_by_hand() -> None:
    # Ratios 3/2 and 5/4. The first is clipped to 1.28: losses -0.64 and 0.625. Only the second has
    # a gradient, 0.625 ((0, 1) - (3/4, 1/4)); both are halved.
    section = ObjectiveSection(temperature=1.0)
    loss, gradient = two_tokens(section, GrpoSection())
    assert loss.item() == pytest.approx(-0.0075, rel=1e-12)
    assert gradient.tolist() == [[0.0, 0.0], pytest.approx([-0.234375, 0.234375], rel=1e-12)]
    # Weights 4/5 and 2, capped to 3/2. The base has half as much at the first token: a KL of
    # 1/2 + ln 2 - 1, with the gradient (1 - 1/2) ((1, 0) - (3/4, 1/4)).
    section = section.model_copy(update={"importance_cap": 1.5})
    loss, gradient = two_tokens(section, GrpoSection(kl_weight=0.1))
    assert loss.item() == pytest.approx((-0.512 + 0.9375 + 0.1 * 0.19314718056) / 2, rel=1e-11)
    assert gradient[0].tolist() == pytest.approx([0.00625, -0.00625], rel=1e-12)
    assert gradient[1].tolist() == pytest.approx([-0.3515625, 0.3515625], rel=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "clipped"),
    [
        (1.3, 1.0, True),
        (1.27, 1.0, False),
        (0.5, 1.0, False),
        (0.78, -1.0, True),
        (0.82, -1.0, False),
        (1.5, -1.0, False),
        (1.5, 0.0, False),
    ],
)
def test_the_clip_stops_the_gradient_on_one_side(
    ratio: float, advantage: float, clipped: bool
) -> None:
    batch = make_batch(1.0)
    section = ObjectiveSection(temperature=1.0)
    present = log_p(batch.hidden, batch.head, 1.0).detach()[0, batch.token_ids[0]]
    example = make_example((int(batch.token_ids[0]),), (present.item(),), 0.0)
    output = loss_of(
        recipe_of(section, GrpoSection()),
        [replace(example, advantage=advantage)],
        batch.hidden[:1],
        batch.head,
        base=(batch.base_hidden[:1], None),
        old_logprobs=present[None] - math.log(ratio),
    )
    assert output.per_token["ratio_clipped_share"].tolist() == [clipped]
    bounded = min(max(ratio, 0.8), 1.28) if clipped else ratio
    assert output.loss.item() == pytest.approx(-bounded * advantage, rel=1e-12)
    zero = [bool((gradient == 0).all()) for gradient in gradients(output.loss, batch)]
    assert zero == [clipped or advantage == 0] * 2


@pytest.mark.parametrize("rewards", [(0.0,) * 6, (1.0,) * 6, (0.1,) * 3 + (0.7,) * 3])
def test_equal_rewards_give_no_gradient_but_the_kls(rewards: tuple[float, ...]) -> None:
    batch = make_batch(1.1)
    output = engine(batch, ObjectiveSection(), GrpoSection(), rewards=rewards)
    assert output.loss.item() == 0
    assert all(not gradient.any() for gradient in gradients(output.loss, batch))
    with_kl = engine(batch, ObjectiveSection(), GrpoSection(kl_weight=0.1), rewards=rewards)
    assert with_kl.loss.item() > 0
    assert all(gradient.norm() > 1e-3 for gradient in gradients(with_kl.loss, batch))


def test_one_group_of_equal_rewards_has_no_part_in_the_gradient() -> None:
    batch = make_batch(1.1)
    rewards = (1.0, 0.0, 0.0, 1.0, 1.0, 1.0)
    output = engine(batch, ObjectiveSection(), GrpoSection(), rewards=rewards, first_update=True)
    by_hidden, _ = gradients(output.loss, batch)
    first_group = sum(LENGTHS[:GROUP_SIZE])
    assert by_hidden[:first_group].norm() > 1e-3
    assert not by_hidden[first_group:].any()
