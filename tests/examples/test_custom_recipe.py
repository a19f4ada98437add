"""examples/custom_recipe.py: its weights, its loss by hand, and a step by the command."""

import json
from pathlib import Path

import pytest
import torch

from examples.custom_recipe import HALF_LIFE, EarlyTokens, decayed_weights
from paint_engine import train
from paint_engine.config import Config
from paint_engine.config.sections import ObjectiveSection
from paint_engine.recipes import LossInputs, SecondPass
from paint_engine.recipes.paint import Paint

BOUNDS = torch.tensor([0, 3, 3, 80], dtype=torch.int32)


def test_weights_halve_within_a_rollout_and_add_up_to_one() -> None:
    weights = decayed_weights(BOUNDS)
    first, empty, last = weights.split([3, 0, 77])
    assert first.sum().item() == pytest.approx(1) == last.sum().item() and len(empty) == 0
    assert (last[HALF_LIFE] / last[0]).item() == pytest.approx(0.5)
    assert (last[1:] < last[:-1]).all()


def inputs(student: torch.Tensor) -> LossInputs:
    draw = torch.Generator().manual_seed(1)
    teacher, head = (torch.randn(n, 6, generator=draw, dtype=torch.float64) for n in (80, 40))
    return LossInputs(
        student_hidden_states=student,
        lm_head_weight=head,
        second_passes=(SecondPass(teacher),),
        completion_ids=torch.zeros(80, dtype=torch.long),
        cu_seqlens=BOUNDS,
        examples=(),
        old_logprobs=None,
        vocab_size=40,
        denominator=3,
    )


def test_the_loss_and_its_gradient_weight_paints_token_losses() -> None:
    draw = torch.Generator().manual_seed(0)
    student = torch.randn(80, 6, generator=draw, dtype=torch.float64).requires_grad_()
    output = EarlyTokens(Config()).loss(inputs(student))
    (found,) = torch.autograd.grad(output.loss, student)
    # PAINT's gradient of a row is that of its token loss divided by the length and the rollouts.
    plain = Paint(Config()).loss(inputs(student))
    (rows,) = torch.autograd.grad(plain.loss, student)
    weights = decayed_weights(BOUNDS).double()
    lengths = torch.tensor([3.0] * 3 + [77.0] * 77, dtype=torch.float64)
    assert output.loss.item() == pytest.approx(
        (weights * plain.per_token["token_loss"]).sum().item() / 3, rel=1e-6
    )
    torch.testing.assert_close(found, rows * (lengths * weights)[:, None], rtol=1e-5, atol=1e-9)


def test_another_reduction_is_refused() -> None:
    section = ObjectiveSection(name="examples.custom_recipe:EarlyTokens", reduction="token_mean")
    with pytest.raises(ValueError, match="got 'token_mean'; EarlyTokens weights tokens within"):
        Config(objective=section)


def test_a_step_by_the_command(tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = {
        "objective.name": "examples.custom_recipe:EarlyTokens",
        "train.num_steps": 1,
        "train.batch_size": 2,
        "train.device": "cpu",
        "rollout.max_new_tokens": 16,
        "eval.enabled": "false",
        "run.dir": run,
    }
    flags = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    train.main(["--preset", "paint-tiny", *flags])
    (metrics,) = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert metrics["loss"] != 0 and metrics["token_kl"] > 0
    assert (run / "report.html").is_file()
