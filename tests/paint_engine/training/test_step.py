"""Which weights the losses of a step compare, by hand from the models' own logits."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from paint_engine.config.command_line import load_config
from paint_engine.distributed import World
from paint_engine.model.forward import causal_lm
from paint_engine.training import step as step_module
from paint_engine.training.build import build_run
from paint_engine.training.rollouts import sample_step
from paint_engine.training.run import Run
from paint_engine.training.step import train_step
from paint_engine.types import TrainExample, Verdict

Logits = Callable[[PreTrainedModel, Sequence[int]], Tensor]
WORLD = World(0, 1, 0, torch.device("cpu"))
GRPO = {
    "objective.name": "grpo",
    "grpo.group_size": "3",
    "grpo.kl_weight": "0.04",
    "train.batch_size": "6",
    "rollout.top_p": "1.0",
    "rollout.top_k": "-1",
}


def sampled_logprobs(run: Run, items: Sequence[TrainExample], logits: Logits) -> Tensor:
    """Log-probabilities of all the rollouts' tokens at the loss's temperature, in float64."""
    model, found = causal_lm(run.model), []
    for rollout in (item.rollout for item in items):
        with torch.no_grad():
            rows = logits(model, rollout.prompt_ids + rollout.completion_ids).double()
        # A row predicts the next token; padding rows of the head are none.
        rows = rows[len(rollout.prompt_ids) - 1 : -1, : len(run.tokenizer)]
        logprobs = (rows / run.config.objective.temperature).log_softmax(-1)
        found.append(logprobs.gather(1, torch.tensor(rollout.completion_ids)[:, None])[:, 0])
    return torch.cat(found)


def test_the_kl_of_grpo_is_to_the_model_before_training(
    command: list[str], monkeypatch: pytest.MonkeyPatch, naive_logits: Logits
) -> None:
    flags = [part for key, value in GRPO.items() for part in (f"--{key}", value)]
    run = build_run(load_config([*command, *flags]), WORLD)
    assert isinstance(run.model, PeftModel)

    # Answers of random weights are never right.
    def rewarded(step: int) -> list[TrainExample]:
        items, rewards = sample_step(run, step)[0], (1.0, 0.0, 0.0, 1.0, 1.0, 0.0)
        judged = [
            replace(item, verdict=Verdict(reward, reward > 0))
            for item, reward in zip(items, rewards, strict=True)
        ]
        return list(run.recipe.prepare_batch(judged))

    steps = []
    for step in range(2):
        items = rewarded(step)
        student = sampled_logprobs(run, items, naive_logits)
        with run.model.disable_adapter():
            base = sampled_logprobs(run, items, naive_logits)
        monkeypatch.setattr(step_module, "sample_step", lambda run, step, items=items: (items, 0))
        metrics, _ = train_step(run, step)
        # The k3 estimate: r - log r - 1 with r = p_base / p_S, at the tokens that were sampled.
        expected = (torch.exp(base - student) - (base - student) - 1).mean().item()
        assert metrics["base_kl"] == pytest.approx(expected, rel=1e-4, abs=1e-9)
        steps.append(metrics["base_kl"])
    assert steps[0] < 1e-9 and steps[1] > 0.01
