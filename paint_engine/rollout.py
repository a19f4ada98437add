"""The student's rollouts: one completion a problem, each with a seed of its own."""

import hashlib
import random
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedTokenizerBase

from paint_engine.config import EvalSection, RolloutSection
from paint_engine.model import causal_lm
from paint_engine.rollout_hf import Completion, SamplingParams, generate
from paint_engine.types import Problem, Rollout


def request_seed(*parts: object) -> int:
    """A seed below 2^62 that is a pure function of what is asked: (seed, step, problem id, ...)."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2


def request_rng(*parts: object) -> random.Random:
    """A generator of Python's own, seeded like a request."""
    return random.Random(request_seed(*parts))


def stop_token_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every token that ends an answer: the generation settings' (often several) and the
    tokenizer's."""
    settings = causal_lm(model).generation_config
    declared = settings.eos_token_id if settings is not None else None
    own = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    candidates = own + (declared if isinstance(declared, list) else [declared])
    return tuple(sorted({stop for stop in candidates if isinstance(stop, int)}))


def sampling_params(
    section: RolloutSection | EvalSection, model: nn.Module, tokenizer: PreTrainedTokenizerBase
) -> SamplingParams:
    """Every field of the sampler set, from the rollout's or the evaluation's section."""
    return SamplingParams(
        temperature=section.temperature,
        top_p=section.top_p,
        top_k=section.top_k,
        max_new_tokens=section.max_new_tokens,
        stop_token_ids=stop_token_ids(model, tokenizer),
        vocab_size=len(tokenizer),
    )


def to_rollout(
    tokenizer: PreTrainedTokenizerBase,
    problem: Problem,
    prompt_ids: tuple[int, ...],
    completion: Completion,
) -> Rollout:
    """The sampler's completion beside its problem, decoded for the anchors and the answer check."""
    text = tokenizer.decode(list(completion.token_ids), skip_special_tokens=True)
    assert isinstance(text, str)
    return Rollout(
        problem, prompt_ids, completion.token_ids, completion.logprobs, completion.truncated, text
    )


def sample_rollouts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    prompts: Sequence[tuple[int, ...]],
    seeds: Sequence[int],
    params: SamplingParams,
    *,
    max_sequences: int,
) -> list[Rollout]:
    """One rollout a problem from the current student."""
    completions = generate(causal_lm(model), prompts, seeds, params, max_sequences=max_sequences)
    return [
        to_rollout(tokenizer, problem, prompt, completion)
        for problem, prompt, completion in zip(problems, prompts, completions, strict=True)
    ]
