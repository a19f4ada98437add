"""`objective.token_weights`: what weights tokens have, and what they do to loss and gradient."""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hand_cases import KL_0, KL_1, hand_examples, loss_of, recipe
from torch import Tensor

from paint_engine.config.command_line import load_config
from paint_engine.config.plugins import plugin_names
from paint_engine.files import read_jsonl
from paint_engine.recipes.token_weights import RolloutTokens, load_weighting
from paint_engine.recipes.token_weights.base import ATTRIBUTE, PACKAGE

Main = Callable[[Sequence[str]], int]
H_0, H_1 = math.log(2), 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
# Of the first rollout's two tokens; the one token of the second has 1.
ENTROPY = (2 * H_0 / (H_0 + H_1), 2 * H_1 / (H_0 + H_1))


def raw_position(place: float) -> float:
    return 0.25 + 0.75 / (1 + math.exp(-(place - 0.3) / 0.1))


EARLY, LATE = raw_position(0.25), raw_position(0.75)
POSITION = (2 * EARLY / (EARLY + LATE), 2 * LATE / (EARLY + LATE))
WEIGHTS = {"entropy": ENTROPY, "position": POSITION}


def rollout_tokens(entropies: Sequence[float]) -> RolloutTokens:
    entropy, length = torch.tensor(entropies, dtype=torch.float64), len(entropies)
    example, position = hand_examples()[0], torch.arange(length)
    return RolloutTokens(position, position, length, entropy, entropy, entropy, None, example)


def weights_for(name: str, entropies: Sequence[float]) -> list[float]:
    weighting = load_weighting(name)
    assert weighting is not None
    return weighting(rollout_tokens(entropies)).tolist()


def test_the_weightings_are_found_by_their_files_names() -> None:
    assert plugin_names(PACKAGE, ATTRIBUTE) == ("entropy", "position", "uniform")
    assert load_weighting("uniform") is None


def test_entropy_weights_are_proportional_with_mean_1() -> None:
    assert weights_for("entropy", [0.5, 1.0, 1.5, 0.0]) == pytest.approx([2 / 3, 4 / 3, 2.0, 0.0])
    assert weights_for("entropy", [0.7]) == [1.0]
    # A student that is certain throughout.
    assert weights_for("entropy", [0.0, 0.0]) == [1.0, 1.0]


@pytest.mark.parametrize("length", [1, 2, 7, 300])
def test_position_weights_rise_from_a_quarter_with_mean_1(length: int) -> None:
    weights = weights_for("position", [0.0] * length)
    raw = [raw_position((t + 0.5) / length) for t in range(length)]
    assert weights == pytest.approx([value * length / sum(raw) for value in raw], rel=1e-12)
    assert sum(weights) == pytest.approx(length) and weights == sorted(weights)
    assert length < 300 or weights[-1] / weights[0] == pytest.approx(1 / 0.285, rel=0.01)


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_the_weighted_divergence_by_hand(name: str, reduction: str) -> None:
    first, second = WEIGHTS[name]
    output, gradient = loss_of(
        recipe("paint", token_weights=name, reduction=reduction), hand_examples()
    )
    token_losses = [first * KL_0, second * KL_1, KL_0]
    share = [1 / 4, 1 / 4, 1 / 2] if reduction == "sequence_mean" else [1 / 3] * 3
    by_hand = sum(s * loss for s, loss in zip(share, token_losses, strict=True))
    assert output.loss.item() == pytest.approx(by_hand, rel=1e-12)
    # p_S - p_T of each token. The weights are constants, though they come from the student.
    factors = [-first / 4, second / 2, 1 / 4]
    for row, factor, part in zip(gradient, factors, share, strict=True):
        assert row == pytest.approx([factor * part, -factor * part], rel=1e-12)
    assert output.per_token["token_loss"].tolist() == pytest.approx(token_losses, rel=1e-12)
    assert output.per_token["token_weight"].tolist() == pytest.approx([first, second, 1.0])
    # What is measured is not weighted.
    assert output.per_token["token_kl"].tolist() == pytest.approx([KL_0, KL_1, KL_0], rel=1e-12)


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_weighted_log_ratio_by_hand(name: str) -> None:
    first, second = WEIGHTS[name]
    output, gradient = loss_of(recipe("sampled_token", token_weights=name), hand_examples())
    ratios = [math.log(2 / 3), math.log(1 / 3), math.log(2)]
    by_hand = (first * ratios[0] + second * ratios[1]) / 4 + ratios[2] / 2
    assert output.loss.item() == pytest.approx(by_hand, rel=1e-12)
    # The log-ratio times the gradient of log p_S: 1/2, -3/4 and 1/2 for the first entry.
    factors = [first * ratios[0] / 8, -second * ratios[1] * 3 / 16, ratios[2] / 4]
    for row, factor in zip(gradient, factors, strict=True):
        assert row == pytest.approx([factor, -factor], rel=1e-12)
    assert output.per_token["token_weight"].tolist() == pytest.approx([first, second, 1.0])
    assert output.per_token["sampled_kl"].tolist() == pytest.approx(ratios, rel=1e-12)


def test_uniform_weights_leave_the_fused_loss_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    import paint_kernels

    reductions: list[str] = []
    fused = paint_kernels.paint_loss

    def seen(*args: object, reduction: str, **options: object) -> object:
        reductions.append(reduction)
        return fused(*args, reduction=reduction, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(paint_kernels, "paint_loss", seen)
    output, _ = loss_of(recipe("paint"), hand_examples())
    assert "token_weight" not in output.per_token
    loss_of(recipe("paint", token_weights="entropy"), hand_examples())
    assert reductions == ["sequence_mean", "none"]


def test_the_divergence_that_recipes_derive_from_is_weighted_too() -> None:
    from paint_engine.recipes.paint import Paint

    class Doubled(Paint):
        def loss(self, inputs):  # type: ignore[no-untyped-def]
            from paint_engine.recipes import LossOutput

            output = self.divergence(inputs, reduction="none")
            return LossOutput(2 * output.loss.sum(), {"token_loss": output.token_loss})

    config = recipe("paint", token_weights="position").config
    output, _ = loss_of(Doubled(config), hand_examples())
    by_hand = [POSITION[0] * KL_0, POSITION[1] * KL_1, KL_0]
    assert output.loss.item() == pytest.approx(2 * sum(by_hand), rel=1e-12)
    assert output.per_token["token_loss"].tolist() == pytest.approx(by_hand, rel=1e-12)


OWN = """
import torch

given = []


def late(tokens):
    given.append(tokens)
    return tokens.position + 1


def scalar(tokens):
    return 1.0


def too_few(tokens):
    return torch.ones(1)


def broken(tokens):
    return tokens.student_entropy.log() * torch.inf


number = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The name of a module with `OWN`, another one for each test: a module is imported once."""
    name = "weights_" + re.sub(r"\W", "_", request.node.name)
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_a_users_function_gets_the_tokens_of_each_rollout(module: str) -> None:
    output, _ = loss_of(recipe("paint", token_weights=f"{module}:late"), hand_examples())
    # They are used as they are: 1 and 2, and 1.
    assert output.loss.item() == pytest.approx((KL_0 + 2 * KL_1) / 4 + KL_0 / 2, rel=1e-12)
    first, second = __import__(module).given
    assert (first.length, second.length) == (2, 1)
    assert first.token_ids.tolist() == [0, 1] and first.position.tolist() == [0, 1]
    assert first.student_entropy.tolist() == pytest.approx([H_0, H_1], rel=1e-12)
    assert first.teacher_entropy.tolist() == pytest.approx([H_1, H_1], rel=1e-12)
    assert first.divergence.tolist() == pytest.approx([KL_0, KL_1], rel=1e-12)
    assert (first.correct, second.correct) == (False, True)
    assert second.example.rollout.problem.problem_id == "p:1"
    tensors = [value for value in vars(first).values() if isinstance(value, Tensor)]
    assert len(tensors) == 5 and not any(tensor.requires_grad for tensor in tensors)


def test_a_users_function_sees_no_rollout_that_the_teacher_does_not_train(module: str) -> None:
    found = recipe("paint", token_weights=f"{module}:late", on="wrong")
    output, gradient = loss_of(found, hand_examples())
    assert [tokens.length for tokens in __import__(module).given] == [2]
    assert output.per_token["token_weight"].tolist() == [1.0, 2.0, 0.0]
    assert gradient[2] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            "scalar",
            "returned 1.0, of type float for the 2 tokens of the rollout for p:0; needs a tensor "
            "of shape (2,); correct the function",
        ),
        (
            "too_few",
            "returned a tensor of shape (1,) for the 2 tokens of the rollout for p:0; needs a "
            "tensor of shape (2,); correct the function",
        ),
        (
            "broken",
            "gave -inf to a token of the rollout for p:0; needs finite weights; correct the "
            "function",
        ),
    ],
)
def test_other_weights_are_refused(function: str, message: str, module: str) -> None:
    name = f"{module}:{function}"
    with pytest.raises(ValueError) as caught:
        loss_of(recipe("paint", token_weights=name), hand_examples())
    assert str(caught.value) == f"objective.token_weights: '{name}' {message}"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("entropi", "needs one of entropy, position, uniform, or module:attribute of your own; "),
        ("MODULE:number", "which is 3; needs a function of "),
        ("MODULE:lat", "which has no 'lat'; did you mean late?"),
    ],
)
def test_what_is_no_function_is_refused_at_the_start(name: str, message: str, module: str) -> None:
    name = name.replace("MODULE", module)
    with pytest.raises(ValueError) as caught:
        load_config(["--objective.token_weights", name])
    assert str(caught.value).startswith(f"objective.token_weights: got '{name}'")
    assert message in str(caught.value)


def test_a_run_with_weights_of_a_users_own(
    module: str, run_main: Main, command: list[str], tmp_path: Path
) -> None:
    options = {
        "objective.token_weights": f"{module}:late",
        "train.num_steps": "1",
        "eval.enabled": "false",
        "run.samples_per_step": "3",
    }
    argv = [*command, *(part for key, value in options.items() for part in (f"--{key}", value))]
    assert run_main(argv) == 0
    samples = read_jsonl(tmp_path / "run" / "samples.jsonl")
    assert len(samples) == 3
    for sample in samples:
        length = len(sample["tokens"])
        assert sample["token_weight"] == [float(place + 1) for place in range(length)]
    assert "token weight 2" in (tmp_path / "run" / "report.html").read_text()
