"""The built-in sampler: its distribution, its seeds, its stops."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from paint_engine.model.forward import causal_lm, lm_head_weight
from paint_engine.model.teachers import FixedTeacher
from paint_engine.rollout import builtin as rollout_hf
from paint_engine.rollout.builtin import generate, sample_tokens
from paint_engine.rollout.engine import Completion, SamplingParams

VOCAB_SIZE = 340
PARAMS = SamplingParams(1.0, 1.0, -1, 24, (), VOCAB_SIZE)
fuzz = settings(deadline=None, derandomize=True, max_examples=60)


def naive_distribution(logits: Sequence[float], params: SamplingParams) -> np.ndarray:
    """Temperature, then top-k, then the smallest set of likeliest tokens with mass top_p."""
    scaled = np.array(logits[: params.vocab_size], dtype=np.float64) / params.temperature
    order = sorted(range(len(scaled)), key=lambda i: (-scaled[i], i))
    if params.top_k > 0:
        order = order[: params.top_k]
    probabilities = np.exp(scaled[order] - scaled[order].max())
    probabilities /= probabilities.sum()
    kept, mass = [], 0.0
    for index, probability in zip(order, probabilities, strict=True):
        if params.top_p < 1 and kept and mass >= params.top_p:
            break
        kept.append((index, probability))
        mass += probability
    result = np.zeros(len(scaled))
    for index, probability in kept:
        result[index] = probability / mass
    return result


@fuzz
@given(
    logits=st.lists(st.integers(-40, 40), min_size=2, max_size=12),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.sampled_from([-1, 1, 3, 50]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    padding=st.integers(0, 3),
)
def test_tokens_follow_the_naive_distribution(logits, temperature, top_k, top_p, padding) -> None:
    # A sixteenth apart and shifted by place: no ties, nothing within rounding of top_p's edge.
    values = [value / 16 + 0.001 * place for place, value in enumerate(logits)]
    params = SamplingParams(temperature, top_p, top_k, 1, (), len(values))
    expected = naive_distribution(values, params)
    row = torch.tensor([*values, *[99.0] * padding])
    # The grid's midpoints draw every token in proportion to its probability.
    grid = (torch.arange(2000) + 0.5) / 2000
    tokens, logprobs = sample_tokens(row.expand(2000, -1), grid, params)
    counts = np.bincount(tokens.numpy(), minlength=len(values)) / 2000
    assert len(counts) == len(values), "a padding row of the head was drawn"
    assert np.abs(counts - expected).max() < 2 / 2000
    assert np.allclose(logprobs.double().exp(), expected[tokens.numpy()], rtol=1e-5, atol=0)


def test_draws_pass_a_chi_square_test() -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(1, 12, generator=generator) * 1.5
    params = SamplingParams(1.3, 0.9, 8, 1, (), 12)
    expected = naive_distribution(logits[0].tolist(), params)
    uniforms = torch.rand(40_000, generator=generator)
    tokens, _ = sample_tokens(logits.expand(40_000, -1), uniforms, params)
    counts = np.bincount(tokens.numpy(), minlength=12)
    possible = expected > 0
    assert 4 <= possible.sum() <= 8
    assert counts[~possible].sum() == 0
    expected_counts = expected[possible] * 40_000
    statistic = ((counts[possible] - expected_counts) ** 2 / expected_counts).sum()
    # The 99.9% quantile of chi-square with 7 degrees of freedom; fewer degrees have lower ones.
    assert statistic < 24.3


def test_the_ends_of_the_unit_interval_draw_the_first_and_the_last_token_with_mass() -> None:
    logits = torch.tensor([[0.0, 5.0, -200.0, 3.0]])
    just_below_one = torch.tensor([1.0 - 2**-24])
    assert sample_tokens(logits, torch.tensor([0.0]), PARAMS)[0].tolist() == [1]
    # -200 has no mass in float32: it is never drawn, even where rounding reaches the total.
    for uniform in (just_below_one, torch.tensor([1.0])):
        token, logprob = sample_tokens(logits, uniform, PARAMS)
        assert token.tolist() == [0]
        assert torch.isfinite(logprob).all()
    # The first token alone has more mass than top_p: it stays.
    narrow = replace(PARAMS, top_p=0.01)
    assert sample_tokens(logits, torch.tensor([0.999]), narrow)[0].tolist() == [1]


def test_masked_logits_are_never_drawn() -> None:
    logits = torch.full((200, 6), float("-inf"))
    logits[:, 2] = 0.0
    logits[:, 4] = 1.0
    tokens, logprobs = sample_tokens(logits, torch.rand(200), PARAMS)
    assert set(tokens.tolist()) <= {2, 4}
    assert torch.isfinite(logprobs).all()


def _prompts(count: int, longest: int = 14) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(11)
    lengths = [1 + i * (longest - 1) // (count - 1) for i in range(count)]
    return [tuple(rng.integers(VOCAB_SIZE, size=n).tolist()) for n in lengths]


def _same(actual: Sequence[Completion], expected: Sequence[Completion]) -> None:
    assert [c.token_ids for c in actual] == [c.token_ids for c in expected]
    assert [c.truncated for c in actual] == [c.truncated for c in expected]
    for a, b in zip(actual, expected, strict=True):
        # Logits are rounded to float32 before the draw.
        assert a.logprobs == pytest.approx(b.logprobs, rel=1e-5, abs=1e-6)


def test_a_completion_does_not_depend_on_what_it_is_batched_with(base: PreTrainedModel) -> None:
    prompts, seeds = _prompts(9), list(range(100, 109))
    # Stops that are met at different steps, so that rows finish and the batch is compacted.
    params = replace(PARAMS, stop_token_ids=tuple(range(0, VOCAB_SIZE, 12)))
    together = generate(base, prompts, seeds, params, max_sequences=9)
    assert {c.truncated for c in together} == {True, False}
    alone = [
        generate(base, [p], [s], params, max_sequences=1)[0]
        for p, s in zip(prompts, seeds, strict=True)
    ]
    _same(together, alone)
    _same(generate(base, prompts, seeds, params, max_sequences=4), alone)
    order = [3, 0, 8, 5, 1, 7, 2, 6, 4]
    shuffled = generate(
        base, [prompts[i] for i in order], [seeds[i] for i in order], params, max_sequences=5
    )
    _same(shuffled, [alone[i] for i in order])


def test_seeds_alone_tell_requests_of_one_prompt_apart(base: PreTrainedModel) -> None:
    prompt = _prompts(2)[1]
    first, second, third = generate(base, [prompt] * 3, [7, 8, 7], PARAMS, max_sequences=3)
    assert first.token_ids == third.token_ids
    assert first.token_ids != second.token_ids


def test_a_lower_length_limit_only_cuts_the_completion(base: PreTrainedModel) -> None:
    prompts, seeds = _prompts(4), [1, 2, 3, 4]
    long = generate(base, prompts, seeds, PARAMS, max_sequences=4)
    short = generate(base, prompts, seeds, replace(PARAMS, max_new_tokens=9), max_sequences=4)
    assert [c.token_ids[:9] for c in long] == [c.token_ids for c in short]


def test_greedy_decoding_is_that_of_transformers(base: PreTrainedModel) -> None:
    stop = 11
    prompts = _prompts(5)
    params = replace(PARAMS, top_k=1, stop_token_ids=(stop,))
    completions = generate(base, prompts, [0] * 5, params, max_sequences=5)
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            generate_by_transformers: Any = base.generate
            expected = generate_by_transformers(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=24,
                eos_token_id=stop,
                pad_token_id=0,
                # Its head has padding rows that ours never draws.
                suppress_tokens=list(range(VOCAB_SIZE, base.config.vocab_size)),
            )[0, len(prompt) :]
        assert completion.token_ids == tuple(expected.tolist())
        assert completion.logprobs == (0.0,) * len(completion.token_ids)


def test_logprobs_are_those_of_the_processed_distribution(
    base: PreTrainedModel, naive_logits: Callable[[PreTrainedModel, Sequence[int]], Tensor]
) -> None:
    params = replace(PARAMS, temperature=1.1, top_p=0.9, top_k=20)
    prompts = _prompts(3)
    completions = generate(base, prompts, [4, 5, 6], params, max_sequences=3)
    for prompt, completion in zip(prompts, completions, strict=True):
        with torch.no_grad():
            logits = naive_logits(base, (*prompt, *completion.token_ids))
        for i, token in enumerate(completion.token_ids):
            distribution = naive_distribution(logits[len(prompt) - 1 + i].tolist(), params)
            assert distribution[token] > 0
            assert completion.logprobs[i] == pytest.approx(np.log(distribution[token]), abs=2e-6)


def test_stop_tokens_stay_and_nothing_follows_them(base: PreTrainedModel) -> None:
    prompts, seeds = _prompts(12), list(range(12))
    free = generate(base, prompts, seeds, PARAMS, max_sequences=12)
    assert all(c.truncated and len(c.token_ids) == 24 for c in free)
    # One that some completions hold, one of them as its very last token.
    stops = (free[0].token_ids[-1], free[1].token_ids[3], free[2].token_ids[0])
    completions = generate(
        base, prompts, seeds, replace(PARAMS, stop_token_ids=stops), max_sequences=12
    )
    for completion, unstopped in zip(completions, free, strict=True):
        met = [i for i, token in enumerate(unstopped.token_ids) if token in stops]
        length = met[0] + 1 if met else 24
        assert completion.token_ids == unstopped.token_ids[:length]
        assert len(completion.logprobs) == length
        assert completion.truncated == (not met)
    assert len(completions[2].token_ids) == 1
    assert not completions[0].truncated


def test_finished_rows_leave_the_batch_and_the_cache(
    base: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first call asks the model whether rows may leave.
    generate(base, [(1,)], [0], replace(PARAMS, max_new_tokens=1), max_sequences=1)
    sizes: list[int] = []
    original = DynamicCache.reorder_cache

    def spy(cache: Any, indices: Tensor) -> None:
        original(cache, indices)
        sizes.append(cache.layers[0].keys.shape[0])

    monkeypatch.setattr(DynamicCache, "reorder_cache", spy)
    params = replace(PARAMS, stop_token_ids=tuple(range(0, VOCAB_SIZE, 8)))
    prompts, seeds = _prompts(12), list(range(12))
    compacted = generate(base, prompts, seeds, params, max_sequences=12)
    assert len(sizes) >= 2
    assert sizes == sorted(sizes, reverse=True)
    sizes.clear()
    monkeypatch.setattr(rollout_hf, "COMPACTION_SHARE", 1.1)
    _same(generate(base, prompts, seeds, params, max_sequences=12), compacted)
    assert not sizes


def test_padding_rows_of_the_head_are_never_drawn(base: PreTrainedModel) -> None:
    with torch.no_grad():
        # Rows above the tokenizer's size with by far the largest logits.
        lm_head_weight(base)[VOCAB_SIZE:] *= 50.0
    completions = generate(base, _prompts(6), list(range(6)), PARAMS, max_sequences=6)
    assert max(max(c.token_ids) for c in completions) < VOCAB_SIZE


def test_groups_are_reported_once_each_with_their_own_indices(base: PreTrainedModel) -> None:
    prompts = list(reversed(_prompts(7)))
    seen: dict[int, Completion] = {}
    sizes = []

    def on_batch(indices: list[int], completions: list[Completion]) -> None:
        assert not set(indices) & set(seen)
        seen.update(zip(indices, completions, strict=True))
        sizes.append(len(indices))

    completions = generate(
        base, prompts, list(range(7)), PARAMS, max_sequences=3, on_batch=on_batch
    )
    assert sizes == [3, 3, 1]
    assert [seen[i] for i in range(7)] == completions


@pytest.mark.parametrize("training", [True, False])
def test_sampling_leaves_mode_and_gradients_as_they_were(
    training: bool, lora_model: torch.nn.Module
) -> None:
    inner = causal_lm(lora_model)
    inner.train(training)
    completions = generate(inner, _prompts(2), [0, 1], PARAMS, max_sequences=2)
    assert len(completions) == 2
    assert inner.training == training
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in inner.parameters())


def test_adapters_are_part_of_what_is_sampled(lora_model: torch.nn.Module) -> None:
    prompts = _prompts(3)
    inner = causal_lm(lora_model)
    with_adapters = generate(inner, prompts, [0, 1, 2], PARAMS, max_sequences=3)
    with FixedTeacher(lora_model).scoring():
        without = generate(inner, prompts, [0, 1, 2], PARAMS, max_sequences=3)
    assert [c.token_ids for c in with_adapters] != [c.token_ids for c in without]


def test_no_requests_are_no_completions(base: PreTrainedModel) -> None:
    assert generate(base, [], [], PARAMS, max_sequences=4) == []
