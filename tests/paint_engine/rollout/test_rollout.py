"""Requests: seeds, stop tokens, sampling settings, and rollouts that keep the sampled ids."""

import copy
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

import paint_engine
from paint_engine.config.sections import EvalSection, RolloutSection
from paint_engine.model.forward import lm_head_weight
from paint_engine.rollout.builtin import BuiltinEngine
from paint_engine.rollout.engine import (
    Completion,
    sampling_params,
    stop_notes,
    stop_token_ids,
)
from paint_engine.rollout.sampler import to_rollout
from paint_engine.types import Problem

PROBLEM = Problem("p:0", "How many?", "It is $\\boxed{3}$.", "3")


def test_two_files_alone_know_vllm() -> None:
    """Its releases move names often, and a laptop has none of it."""
    files = Path(str(paint_engine.__file__)).parent.rglob("*.py")
    importing = re.compile(r"^\s*(from|import) vllm\b", re.MULTILINE)
    found = {file.name for file in files if importing.search(file.read_text())}
    assert found == {"vllm_engine.py", "vllm_core.py"}


def test_every_declared_stop_token_ends_an_answer(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    im_end, endoftext = tokenizer.encode("<|im_end|><|endoftext|>")
    for declared, expected in (
        (7, {im_end, endoftext, 7}),
        ([7, im_end, 9], {im_end, endoftext, 7, 9}),
        (None, {im_end, endoftext}),
    ):
        base.generation_config = GenerationConfig(eos_token_id=declared)
        stops = stop_token_ids(base, tokenizer)
        assert set(stops) == expected
        assert list(stops) == sorted(stops)
    monkeypatch.setattr(base, "generation_config", None)
    assert set(stop_token_ids(base, tokenizer)) == {im_end, endoftext}


def test_the_template_s_end_of_turn_ends_an_answer_and_a_mismatch_is_told(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """As in base models, whose EOS token is not the one that their template writes."""
    im_end, endoftext = tokenizer.encode("<|im_end|><|endoftext|>")
    base.generation_config = GenerationConfig(eos_token_id=[im_end, endoftext])
    assert stop_notes(base, tokenizer) == []
    base.generation_config = GenerationConfig(eos_token_id=endoftext)
    (note,) = stop_notes(base, tokenizer)
    assert "the generation configuration's is '<|endoftext|>'" in note
    other = copy.deepcopy(tokenizer)
    other.eos_token, other.pad_token = "<|endoftext|>", None
    (note,) = stop_notes(base, other)
    assert note == (
        "stop tokens differ: the tokenizer's eos_token is '<|endoftext|>', the generation "
        "configuration's is '<|endoftext|>', the chat template's end of turn is '<|im_end|>'; each "
        "of them ends a completion"
    )
    assert set(stop_token_ids(base, other)) == {im_end, endoftext}
    other.chat_template = "{{ messages[0].content }}"
    assert stop_notes(base, other) == []
    assert set(stop_token_ids(base, other)) == {endoftext}


@pytest.mark.parametrize(
    "section",
    [
        RolloutSection(temperature=0.7, top_p=0.8, top_k=5, max_new_tokens=9),
        EvalSection(temperature=0.6, top_p=0.5, top_k=-1, max_new_tokens=11),
    ],
)
def test_the_sections_settings_reach_the_sampler(
    section: RolloutSection | EvalSection,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    params = sampling_params(section, base, tokenizer)
    for name in ("temperature", "top_p", "top_k", "max_new_tokens"):
        assert getattr(params, name) == getattr(section, name), name
    assert params.vocab_size == len(tokenizer)
    assert lm_head_weight(base).shape[0] > params.vocab_size


def test_a_rollout_keeps_the_sampled_ids_even_where_text_would_encode_otherwise(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    (stop,) = tokenizer.encode("<|im_end|>")
    # "apples" letter by letter: encoding the text again would give other, fewer ids.
    spelled = [tokenizer.encode(letter)[0] for letter in "apples"]
    assert tokenizer.encode("apples") != spelled
    ids = (*spelled, stop)
    rollout = to_rollout(tokenizer, PROBLEM, (1, 2), Completion(ids, (-0.5,) * 7, False))
    assert rollout.completion_ids == ids
    assert rollout.prompt_ids == (1, 2)
    assert rollout.rollout_logprobs == (-0.5,) * 7
    assert rollout.text == "apples"
    assert not rollout.truncated


def test_text_shows_thinking_but_no_special_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tuple(tokenizer.encode("<think>\nso\n</think>\n\n3<|im_end|>"))
    rollout = to_rollout(tokenizer, PROBLEM, (1,), Completion(ids, (0.0,) * len(ids), False))
    assert rollout.text == "<think>\nso\n</think>\n\n3"


def test_completions_come_in_the_order_of_their_prompts(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    # The longest first: decoding groups by length, and the order must come back.
    prompts = [tuple(range(20 - 4 * i, 40 - 5 * i)) for i in range(5)]
    params = sampling_params(RolloutSection(max_new_tokens=6, temperature=1.0), base, tokenizer)
    engine = BuiltinEngine(base, lambda: nullcontext(base), max_sequences=2)
    together = engine.generate(prompts, [3, 4, 5, 6, 7], params)
    for i, completion in enumerate(together):
        (alone,) = engine.generate(prompts[i : i + 1], [3 + i], params)
        assert alone.token_ids == completion.token_ids
