"""`grpo_paint`: GRPO's loss and PAINT's divergence together."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hand_cases import (
    GROUP,
    KL_0,
    KL_1,
    TEACHER,
    hand_examples,
    judged,
    logits,
    loss_of,
    recipe,
)

from paint_engine.config.command_line import load_config
from paint_engine.recipes import Recipe
from paint_engine.types import TeacherView, TopK, TrainExample

DIVERGENCE = ((KL_0 + KL_1) / 2 + KL_0) / 2


# The whole distribution of each of the teacher's rows.
TOP = logits(TEACHER).float().log_softmax(-1)


def mixed(*, grpo: dict[str, object] | None = None, **objective: Any) -> Recipe:
    return recipe("grpo_paint", grpo={**GROUP, **(grpo or {})}, **objective)


def test_both_losses_by_hand() -> None:
    found = mixed(distill_weight=0.5)
    examples = found.prepare_batch(hand_examples())
    assert [example.advantage for example in examples] == [-0.5, 0.5]
    output, gradient = loss_of(found, examples)
    # Each ratio is 1: the policy's losses are 1/2, 1/2 and -1/2.
    assert output.parts["policy_loss"].item() == pytest.approx(0.0, abs=1e-15)
    assert output.parts["distill_loss"].item() == pytest.approx(DIVERGENCE, rel=1e-12)
    assert output.loss.item() == pytest.approx(DIVERGENCE / 2, rel=1e-12)
    # -A times the gradient of log p_S, and half of p_S - p_T; the tokens' shares are 1/4, 1/4, 1/2.
    by_hand = [1 / 16 - 1 / 32, -3 / 32 + 1 / 16, -1 / 8 + 1 / 16]
    for row, first in zip(gradient, by_hand, strict=True):
        assert row == pytest.approx([first, -first], rel=1e-12)
    token_loss = [0.5 + KL_0 / 2, 0.5 + KL_1 / 2, -0.5 + KL_0 / 2]
    assert output.per_token["token_loss"].tolist() == pytest.approx(token_loss, rel=1e-12)


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
def test_each_part_is_its_own_recipe_s(reduction: str) -> None:
    objective = {"reduction": reduction, "pointwise_clip": 0.06, "token_weights": "position"}
    examples = mixed().prepare_batch(hand_examples())
    old = torch.tensor([0.4, 0.6, 0.3], dtype=torch.float64).log()
    output, gradient = loss_of(mixed(distill_weight=0.7, **objective), examples, old)
    policy, of_policy = loss_of(
        recipe("grpo", grpo=GROUP, reduction=reduction, pointwise_clip=None), examples, old
    )
    divergence, of_divergence = loss_of(recipe("paint", **objective), examples)
    assert output.parts["policy_loss"] == policy.loss
    assert output.parts["distill_loss"] == divergence.loss
    assert output.loss.item() == pytest.approx(
        policy.loss.item() + 0.7 * divergence.loss.item(), rel=1e-12
    )
    for row, one, other in zip(gradient, of_policy, of_divergence, strict=True):
        assert row == pytest.approx([a + 0.7 * b for a, b in zip(one, other, strict=True)])
    # The values of both are logged.
    assert output.per_token.keys() == policy.per_token.keys() | divergence.per_token.keys()


def test_a_weight_of_0_is_grpo() -> None:
    found = mixed(distill_weight=0.0)
    examples = found.prepare_batch(hand_examples())
    output, gradient = loss_of(found, examples)
    policy, of_policy = loss_of(recipe("grpo", grpo=GROUP), examples)
    assert output.loss == policy.loss and gradient == of_policy
    assert output.parts["distill_loss"].item() == pytest.approx(DIVERGENCE, rel=1e-12)


@pytest.mark.parametrize(
    ("on", "divergence", "share"),
    [("wrong", (KL_0 + KL_1) / 4, [1, 1, 0]), ("right", KL_0 / 2, [0, 0, 1])],
)
def test_on_leaves_the_policy_alone(on: str, divergence: float, share: list[int]) -> None:
    found = mixed(on=on)
    examples = found.prepare_batch(hand_examples())
    assert [id(e) for e in found.trained(examples)] == [id(e) for e in examples]
    output, gradient = loss_of(found, examples)
    assert output.parts["distill_loss"].item() == pytest.approx(divergence, rel=1e-12)
    assert output.per_token["token_weight"].tolist() == share
    policy, of_teacher = (1 / 16, -3 / 32, -1 / 8), (-1 / 16, 1 / 8, 1 / 8)
    for row, one, other, kept in zip(gradient, policy, of_teacher, share, strict=True):
        assert row == pytest.approx([one + kept * other, -one - kept * other], rel=1e-12)
    # The teacher's numbers are those of all rollouts.
    assert output.per_token["token_kl"].tolist() == pytest.approx([KL_0, KL_1, KL_0], rel=1e-12)


def test_a_group_of_equal_rewards_is_left_out_where_nothing_trains_it() -> None:
    right, wrong, differ = (
        judged(hand_examples(), True),
        judged(hand_examples(), False),
        hand_examples(),
    )
    batch = [*right, *wrong, *differ]
    for on, kept in {
        "all": batch,
        "wrong": [*wrong, *differ],
        "right": [*right, *differ],
    }.items():
        found = mixed(on=on)
        assert [id(e) for e in found.trained(batch)] == [id(e) for e in kept], on
        assert found.metrics(batch)["zero_variance_groups"] == 2
    assert mixed(on="wrong", grpo={"skip_zero_variance": False}).trained(batch) == batch


def test_it_has_the_needs_checks_and_notes_of_both() -> None:
    found = mixed(grpo={"num_updates": 3})
    assert (found.second_pass, found.uses_teacher, found.group_size) == ("teacher", True, 2)
    assert (found.needs_solution, found.needs_answer, found.num_updates) == (True, True, 3)
    note = mixed(divergence="reverse_kl", pointwise_clip=0.06).notes()
    assert len(note) == 1 and "designed for the forward KL" in note[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--train.batch_size 12", "train.batch_size: got 12 with grpo.group_size 8; needs a mult"),
        ("--objective.jsd_weight 0.9", "objective.jsd_weight: got 0.9 with objective.divergence"),
        ("--teacher.ema_decay 0.9", "teacher.ema_decay: got 0.9 with teacher.weights 'fixed'"),
        ("--objective.importance_cap 2", "objective.importance_cap: got 2.0 with rollout.top_p"),
        (
            "--grpo.kl_weight 0.04",
            "grpo.kl_weight: got 0.04 with objective.name 'grpo_paint', which does not read it; "
            "set --grpo.kl_weight 0.0, or use --objective.name grpo",
        ),
    ],
)
def test_what_either_part_refuses_is_refused(options: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_config(["--objective.name", "grpo_paint", *options.split()])
    assert str(caught.value).startswith(message)


def test_a_weight_without_a_second_loss_is_refused() -> None:
    for name in ("paint", "grpo", "sampled_token", "sft"):
        with pytest.raises(ValueError, match=r"or use --objective\.name grpo_paint$"):
            load_config(["--objective.name", name, "--objective.distill_weight", "0.5"])


def test_it_shows_both_and_each_part_of_the_loss() -> None:
    display = mixed().display
    labels = [field.key for field in display.console]
    assert labels[:2] == ["reward", "zero_variance_groups"] and labels[-1] == "tokens_per_s"
    assert {"loss", "token_kl", "overlap", "accuracy"} <= set(labels)
    assert len(labels) == len(set(labels))
    titles = [quantity.title for quantity in display.curves]
    assert titles[:4] == ["Reward", "Groups without a signal", "Loss", "Loss by part"]
    assert {"Unclipped KL", "Context exposure", "Ratio clip"} <= set(titles)
    assert len(titles) == len(set(titles))
    assert not display.loss_is_flat({"reward": 0.5, "ratio": 1.0})


# ---- contexts that may show nothing --------------------------------------------------------------


def viewed(places: Sequence[int], *, served: bool) -> list[TrainExample]:
    """The rollouts, these with a teacher view, and if asked with a server's scores of all tokens of
    the vocabulary."""
    found, rows = hand_examples(), (TOP[:2], TOP[2:])
    for place in places:
        view, scores = TeacherView((0,), "shown", mask_ratio=0.0), rows[place]
        ids = torch.arange(2, dtype=torch.int32).expand(len(scores), 2)
        top = TopK(ids, scores) if served else None
        found[place] = replace(found[place], teacher_view=view, served=top)
    return found


@pytest.mark.parametrize("token_weights", ["uniform", "entropy"])
@pytest.mark.parametrize("served", [False, True])
@pytest.mark.parametrize("places", [(), (0,), (1,), (0, 1)])
def test_a_rollout_without_a_view_has_the_policy_gradient_alone(
    places: tuple[int, ...], served: bool, token_weights: str
) -> None:
    """Its divergence counts 0, and the teacher's numbers of its tokens are 0."""
    teacher = {"context": "sibling", "url": "http://localhost:1" if served else None}
    found = mixed(teacher=teacher, distill_weight=0.5, token_weights=token_weights)
    examples = found.prepare_batch(viewed(places, served=served))
    output, gradient = loss_of(found, examples)
    policy, of_policy = loss_of(recipe("grpo", grpo=GROUP), examples)
    whole = recipe("paint", token_weights=token_weights)
    every, _ = loss_of(whole, examples)
    shown = [float(place in places) for place in (0, 0, 1)]
    kl = [KL_0 * shown[0], KL_1 * shown[1], KL_0 * shown[2]]
    weights = every.per_token.get("token_weight", torch.ones(3)).tolist()
    losses = [k * w for k, w in zip(kl, weights, strict=True)]
    divergence = ((losses[0] + losses[1]) / 2 + losses[2]) / 2
    assert output.parts["distill_loss"].item() == pytest.approx(divergence, rel=1e-6)
    assert output.parts["policy_loss"] == policy.loss
    assert output.per_token["token_kl"].tolist() == pytest.approx(kl, rel=1e-6)
    assert output.per_token["token_weight"].tolist() == pytest.approx(
        [w * share for w, share in zip(weights, shown, strict=True)]
    )
    entropies = (every.per_token["teacher_entropy"] * torch.tensor(shown)).tolist()
    assert output.per_token["teacher_entropy"].tolist() == pytest.approx(entropies, rel=1e-6)
    # p_S - p_T of each token, times its share of the loss.
    of_teacher = (-1 / 16, 1 / 8, 1 / 8)
    for row, one, other, share, weight in zip(
        gradient, of_policy, of_teacher, shown, weights, strict=True
    ):
        part = 0.5 * share * weight * other
        assert row == pytest.approx([one[0] + part, one[1] - part], rel=1e-6)


def test_the_groups_of_siblings_are_those_of_the_rewards() -> None:
    found = mixed(teacher={"context": "sibling"})
    assert found.group_size == 2
    with pytest.raises(ValueError, match=r"teacher\.group_size: got 4 .* set --grpo\.group_size 4"):
        mixed(teacher={"context": "sibling", "group_size": 4})
    # A batch of whole groups of rewards; it need not be one of teacher.group_size.
    command = "--objective.name grpo_paint --teacher.context sibling --grpo.group_size 4"
    load_config([*command.split(), "--train.batch_size", "12"])


def test_groups_without_any_signal_are_left_out() -> None:
    """All wrong, there are no siblings; all right, each has some."""
    found = mixed(teacher={"context": "sibling"})
    right, wrong = judged(viewed((0, 1), served=False), True), judged(hand_examples(), False)
    batch = [*right, *wrong, *hand_examples()]
    assert [id(e) for e in found.trained(batch)] == [id(e) for e in (*right, *batch[4:])]
    assert found.notes() == []
