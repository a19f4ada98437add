"""`objective.on`: the rollouts that the teacher trains."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hand_cases import KL_0, KL_1, hand_examples, loss_of, recipe

from paint_engine.config.command_line import load_config
from paint_engine.files import read_jsonl
from paint_engine.recipes import recipe_of

Main = Callable[[Sequence[str]], int]
VERDICTS = (True, False, None, False)


@pytest.mark.parametrize("name", ["paint", "sampled_token"])
@pytest.mark.parametrize(("on", "kept"), [("all", [0, 1, 2, 3]), ("wrong", [1, 3]), ("right", [0])])
def test_the_others_are_left_out_of_the_passes(name: str, on: str, kept: list[int]) -> None:
    examples = [hand_examples((verdict, True))[0] for verdict in VERDICTS]
    found = recipe(name, on=on)
    trained = found.trained(examples)
    assert [id(e) for e in trained] == [id(examples[place]) for place in kept]
    # Without an answer there is no verdict to choose by.
    assert found.needs_answer == (on != "all")
    share = found.metrics(examples).get("taught_share")
    assert share == (None if on == "all" else len(kept) / 4)


def test_the_wrong_rollouts_alone_by_hand() -> None:
    found = recipe("paint", on="wrong")
    examples = found.trained(hand_examples())
    output, gradient = loss_of(found, examples)
    # The right one still counts among the two rollouts.
    assert output.loss.item() == pytest.approx((KL_0 + KL_1) / 4, rel=1e-12)
    assert gradient == [pytest.approx([-1 / 16, 1 / 16]), pytest.approx([1 / 8, -1 / 8])]
    found = recipe("paint", on="wrong", reduction="token_mean")
    output, _ = loss_of(found, examples)
    assert output.loss.item() == pytest.approx((KL_0 + KL_1) / 3, rel=1e-12)
    # Among rollouts that all count, each token counts 1: nothing but the fused loss runs.
    assert "token_weight" not in output.per_token


def test_a_rollout_of_the_other_kind_weighs_nothing() -> None:
    """As the one that a rank without rollouts runs."""
    for on, zero in (("wrong", (2,)), ("right", (0, 1))):
        output, gradient = loss_of(recipe("paint", on=on), hand_examples())
        weights = output.per_token["token_weight"].tolist()
        assert weights == [0.0 if token in zero else 1.0 for token in range(3)]
        assert [row == [0.0, 0.0] for row in gradient] == [weight == 0 for weight in weights]


@pytest.mark.parametrize("name", ["grpo", "sft"])
def test_a_recipe_without_a_teacher_refuses_the_choice(name: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_config(["--objective.name", name, "--objective.on", "wrong"])
    assert str(caught.value) == (
        f"objective.on: got 'wrong' with objective.name '{name}', which does not read it; set "
        "--objective.on all, or use --objective.name grpo_paint or paint or sampled_token"
    )


LENGTH = """
from paint_engine.types import Verdict


def judge(problem, text):
    return Verdict(0.25, len(text) % 2 == 0)
"""


def test_a_users_verdict_chooses(
    run_main: Main, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "length_reward.py").write_text(LENGTH)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    kept, place = {}, command.index("--run.dir")
    for on in ("wrong", "right"):
        options = {
            "reward.function": "length_reward:judge",
            "objective.on": on,
            "train.num_steps": "1",
            "eval.enabled": "false",
            "run.samples_per_step": "3",
            "run.dir": str(tmp_path / on),
        }
        argv = command[:place] + command[place + 2 :]
        argv += [part for key, value in options.items() for part in (f"--{key}", value)]
        assert recipe_of(load_config(argv).config).needs_answer
        assert run_main(argv) == 0
        (step,) = read_jsonl(tmp_path / on / "metrics.jsonl")
        kept[on] = read_jsonl(tmp_path / on / "samples.jsonl")
        assert {sample["correct"] for sample in kept[on]} <= {on == "right"}
        assert step["taught_share"] == len(kept[on]) / 3
        share = step["accuracy"] if on == "right" else 1 - step["accuracy"]
        assert step["taught_share"] == pytest.approx(share)
        trained = sum(len(sample["tokens"]) for sample in kept[on])
        assert (step["grad_norm"] > 0) == (trained > 0) and step["num_loss_tokens"] >= trained
    assert len(kept["wrong"]) + len(kept["right"]) == 3
