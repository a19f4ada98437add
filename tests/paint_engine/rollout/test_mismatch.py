"""Sampler against trainer: the differences that are planted are the differences that are logged."""

import math

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from paint_engine.config.sections import RolloutSection
from paint_engine.model.forward import hidden_states, lm_head_weight
from paint_engine.model.packing import build_batch
from paint_engine.rollout.builtin import generate
from paint_engine.rollout.engine import sampling_params
from paint_engine.rollout.mismatch import logprob_differences, mismatch_metrics
from paint_engine.types import PackedSequences, Problem, Rollout, TrainExample

PROBLEM = Problem("p:0", "How many?", "It is $\\boxed{3}$.", "3")


def sampled_rollouts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, section: RolloutSection
) -> list[Rollout]:
    params = sampling_params(section, model, tokenizer)
    prompts = [tuple(range(20, 24 + i)) for i in range(4)]
    completions = generate(model, prompts, [5, 6, 7, 8], params, max_sequences=4)
    return [
        Rollout(PROBLEM, prompt, c.token_ids, c.logprobs, c.truncated, "")
        for prompt, c in zip(prompts, completions, strict=True)
    ]


def sequences(rollouts: list[Rollout]) -> PackedSequences:
    return build_batch([TrainExample(rollout) for rollout in rollouts]).student


def differences(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, section: RolloutSection
) -> list[float]:
    rollouts = sampled_rollouts(model, tokenizer, section)
    states = hidden_states(
        model,
        sequences(rollouts),
        attention="padded",
    )
    params = sampling_params(section, model, tokenizer)
    (found,) = logprob_differences(states, lm_head_weight(model), rollouts, params)
    return found.tolist()


@pytest.mark.parametrize(
    "section",
    [
        RolloutSection(temperature=0.8, top_p=1.0, top_k=-1, max_new_tokens=9),
        RolloutSection(temperature=1.1, top_p=0.9, top_k=20, max_new_tokens=9),
    ],
    ids=["whole", "truncated"],
)
def test_the_built_in_sampler_agrees_with_the_trainer(
    section: RolloutSection, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    found = differences(base, tokenizer, section)
    assert len(found) >= 20
    assert max(map(abs, found)) < 1e-5


def test_a_model_that_moved_since_it_sampled_is_seen(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    section = RolloutSection(temperature=1.0, top_p=1.0, top_k=-1, max_new_tokens=9)
    rollouts = sampled_rollouts(base, tokenizer, section)
    with torch.no_grad():
        base.get_input_embeddings().weight.mul_(1.1)
    states = hidden_states(
        base,
        sequences(rollouts),
        attention="padded",
    )
    params = sampling_params(section, base, tokenizer)
    (found,) = logprob_differences(states, lm_head_weight(base), rollouts, params)
    metrics = mismatch_metrics([found.tolist()])
    assert metrics["rollout_logprob_diff"] > 0.01
    assert metrics["rollout_ess"] < 0.999


def test_long_micro_batches_are_compared_at_evenly_spaced_tokens(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    section = RolloutSection(temperature=1.0, top_p=1.0, top_k=-1, max_new_tokens=200)
    found = differences(base, tokenizer, section)
    assert len(found) == 128
    assert max(map(abs, found)) < 1e-4


def test_a_micro_batch_without_rollouts_has_no_differences(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    head, params = lm_head_weight(base), sampling_params(RolloutSection(), base, tokenizer)
    assert logprob_differences(torch.zeros(3, head.shape[1]), head, [], params) == []


def test_the_metrics_by_hand() -> None:
    metrics = mismatch_metrics([[0.1, -0.3], [], [0.2, -math.inf]])
    assert metrics["rollout_logprob_diff"] == pytest.approx(0.2)
    assert metrics["rollout_logprob_diff_max"] == pytest.approx(0.3)
    assert metrics["rollout_outside_share"] == 0.25
    weights = [math.exp(d) for d in (0.1, -0.3, 0.2)]
    ess = sum(weights) ** 2 / (4 * sum(w * w for w in weights))
    assert metrics["rollout_ess"] == pytest.approx(ess)
    assert mismatch_metrics([[0.0] * 5])["rollout_ess"] == pytest.approx(1.0)
