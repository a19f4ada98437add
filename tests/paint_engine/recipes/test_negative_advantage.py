"""`grpo.advantage` "negative": a fixed advantage on the least likely tokens, without a teacher."""

import math

import pytest
import torch
from hand_cases import hand_examples, judged, loss_of, recipe

from paint_engine.config.command_line import load_config
from paint_engine.recipes.grpo import NEGATIVE_ADVANTAGE

HALF = {"group_size": 2, "advantage": "negative", "negative_fraction": 0.5}


def test_the_least_likely_tokens_are_suppressed_by_hand() -> None:
    found = recipe("grpo", grpo=HALF)
    examples = found.prepare_batch(hand_examples())
    assert [example.advantage for example in examples] == [NEGATIVE_ADVANTAGE] * 2 == [-0.5] * 2
    output, gradient = loss_of(found, examples)
    # p_S is 1/2 and 1/4 in the first rollout: of its two tokens the second is chosen, and the one
    # of the other rollout. Their losses are 1/2; the means are over all tokens.
    assert output.per_token["suppressed_share"].tolist() == [False, True, True]
    assert output.loss.item() == pytest.approx((0.5 / 2 + 0.5) / 2, rel=1e-12)
    # 1/2 ((0, 1) - (3/4, 1/4)) / 4 and 1/2 ((1, 0) - (1/2, 1/2)) / 2.
    assert gradient == [
        [0.0, 0.0],
        pytest.approx([-3 / 32, 3 / 32], rel=1e-12),
        pytest.approx([1 / 8, -1 / 8], rel=1e-12),
    ]


def test_rewards_do_not_matter_and_are_still_measured() -> None:
    found = recipe("grpo", grpo=HALF)
    losses = []
    for correct in (True, False):
        examples = found.prepare_batch(judged(hand_examples(), correct))
        assert found.trained(examples) == examples
        losses.append(loss_of(found, examples))
        metrics = found.metrics(examples)
        assert metrics["reward"] == metrics["accuracy"] == float(correct)
        assert "zero_variance_groups" not in metrics
    assert losses[0][0].loss == losses[1][0].loss and losses[0][1] == losses[1][1]
    titles = [quantity.title for quantity in found.display.curves]
    assert "Reward" in titles and "Groups without a signal" not in titles
    assert "advantages are fixed" in found.display.flat_loss_note


def test_further_updates_keep_the_tokens_and_have_the_clip() -> None:
    found = recipe("grpo", grpo=HALF)
    # Before the updates token 0 was the less likely of the first rollout, with 1/8: the ratio is 4.
    # Token 2 had 3/4: its ratio, 2/3, is below 0.8, where the clip stops the gradient.
    old = torch.tensor([1 / 8, 1 / 2, 3 / 4], dtype=torch.float64).log()
    output, gradient = loss_of(found, found.prepare_batch(hand_examples()), old)
    assert output.per_token["suppressed_share"].tolist() == [True, False, True]
    assert output.per_token["ratio_clipped_share"].tolist() == [False, False, True]
    assert output.loss.item() == pytest.approx((0.5 * 4 / 2 + 0.5 * 0.8) / 2, rel=1e-12)
    assert gradient == [pytest.approx([0.25, -0.25], rel=1e-12), [0.0, 0.0], [0.0, 0.0]]


def test_the_whole_rollout_and_the_default_fifth() -> None:
    found = recipe("grpo", grpo=HALF | {"negative_fraction": 1.0})
    output, _ = loss_of(found, found.prepare_batch(hand_examples()))
    assert output.per_token["suppressed_share"].all()
    # ceil(0.2 * 2) and ceil(0.2 * 1).
    found = recipe("grpo", grpo={"group_size": 2, "advantage": "negative"})
    output, _ = loss_of(found, found.prepare_batch(hand_examples()))
    assert output.per_token["suppressed_share"].tolist() == [False, True, True]
    assert math.isfinite(output.loss.item())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--grpo.negative_fraction 0.5",
            "grpo.negative_fraction: got 0.5 with grpo.advantage 'group', which is the same for a "
            "rollout's tokens; leave it out, or use --grpo.advantage negative",
        ),
        (
            "--grpo.advantage negative --grpo.scale_by_std false",
            "grpo.scale_by_std: got False with grpo.advantage 'negative', which compares no "
            "rewards; leave it out, or use --grpo.advantage group",
        ),
    ],
)
@pytest.mark.parametrize("name", ["grpo", "grpo_paint"])
def test_settings_of_the_other_advantage_are_refused(name: str, options: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_config(["--objective.name", name, *options.split()])
    assert str(caught.value) == message
