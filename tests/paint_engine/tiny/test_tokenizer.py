"""The tiny tokenizer: Qwen3's template, digits and special tokens, and any text there and back."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from paint_engine.tiny.tokenizer import train_tokenizer

Message = dict[str, str]
# Written out by hand from Qwen3's published template, for conversations without tools.
QUESTION = {"role": "user", "content": "What is 2+2?"}
CONVERSATIONS: Sequence[tuple[str, list[Message], dict[str, bool], str]] = (
    (
        "thinking is left to the model",
        [QUESTION],
        {"add_generation_prompt": True, "enable_thinking": True},
        "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n",
    ),
    (
        "thinking is on where the switch is not given",
        [QUESTION],
        {"add_generation_prompt": True},
        "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n",
    ),
    (
        "thinking off opens with an empty think block",
        [QUESTION],
        {"add_generation_prompt": True, "enable_thinking": False},
        "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    (
        "the switch does nothing without a generation prompt",
        [QUESTION],
        {"enable_thinking": False},
        "<|im_start|>user\nWhat is 2+2?<|im_end|>\n",
    ),
    (
        "system message",
        [{"role": "system", "content": "Be brief."}, QUESTION],
        {"add_generation_prompt": True},
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 2+2?<|im_end|>\n"
        "<|im_start|>assistant\n",
    ),
    (
        "the last answer gets a think block even without reasoning",
        [QUESTION, {"role": "assistant", "content": "4"}],
        {},
        "<|im_start|>user\nWhat is 2+2?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n4<|im_end|>\n",
    ),
    (
        "reasoning is dropped in the turns before the last question",
        [
            QUESTION,
            {"role": "assistant", "content": "<think>\ntwo twos\n</think>\n\n4"},
            {"role": "user", "content": "And 3+3?"},
            {"role": "assistant", "content": "<think>\ntwo threes\n</think>\n\n6"},
        ],
        {},
        "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
        "<|im_start|>user\nAnd 3+3?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\ntwo threes\n</think>\n\n6<|im_end|>\n",
    ),
    (
        "reasoning may come apart from the content",
        [QUESTION, {"role": "assistant", "content": "\n4", "reasoning_content": "\ntwo twos\n"}],
        {},
        "<|im_start|>user\nWhat is 2+2?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\ntwo twos\n</think>\n\n4<|im_end|>\n",
    ),
    (
        "an answer before the last answer keeps its reasoning where it has one",
        [
            QUESTION,
            {"role": "assistant", "content": "Wait."},
            {"role": "assistant", "content": "Hm.", "reasoning_content": "two twos"},
            {"role": "assistant", "content": "4"},
        ],
        {},
        "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\nWait.<|im_end|>\n"
        "<|im_start|>assistant\n<think>\ntwo twos\n</think>\n\nHm.<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n4<|im_end|>\n",
    ),
    (
        "reasoning given as empty is not looked for in the content",
        [
            QUESTION,
            {"role": "assistant", "content": "<think>x</think>4", "reasoning_content": ""},
        ],
        {},
        "<|im_start|>user\nWhat is 2+2?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n<think>x</think>4<|im_end|>\n",
    ),
    (
        "without a question no answer gets a think block",
        [{"role": "assistant", "content": "4"}],
        {},
        "<|im_start|>assistant\n4<|im_end|>\n",
    ),
    (
        "line ends of the user's own text stay",
        [{"role": "user", "content": "\n two\n\n"}],
        {"add_generation_prompt": True},
        "<|im_start|>user\n\n two\n\n<|im_end|>\n<|im_start|>assistant\n",
    ),
)


@pytest.mark.parametrize(
    ("messages", "arguments", "expected"),
    [case[1:] for case in CONVERSATIONS],
    ids=[case[0].replace(" ", "-") for case in CONVERSATIONS],
)
def test_the_chat_template_renders_as_qwen3s(
    messages: list[Message],
    arguments: dict[str, Any],
    expected: str,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    assert tokenizer.apply_chat_template(messages, tokenize=False, **arguments) == expected


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.text())
@example("  two  spaces\n\n\nand lines\t\r\n ")
@example("\u00d7÷≤ \\frac{1}{2} 一二三 é e\u0301 👩‍👩‍👧 \u0000 ３٣")
def test_any_text_comes_back_from_its_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    # Nothing is added that was not in the text.
    assert tokenizer.encode(text) == ids


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.from_regex(r"[0-9]{1,9}", fullmatch=True), st.sampled_from(["", " ", "$", "x", "-"]))
def test_every_digit_is_a_token_of_its_own(
    tokenizer: PreTrainedTokenizerBase, digits: str, before: str
) -> None:
    text = f"{before}{digits}. "
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode(text)]
    assert [piece for piece in pieces if any(c.isdigit() for c in piece)] == list(digits)


def test_special_tokens_are_single_ids_and_thinking_stays_readable(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"):
        assert len(tokenizer.encode(token)) == 1, token
        assert len(tokenizer.encode(f"a{token}b")) == 3, token
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    ids = tokenizer.encode("<|im_start|><think>so</think>4<|im_end|><|endoftext|>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>so</think>4"


def test_the_size_counts_the_special_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer) == 340
    assert sorted(tokenizer.get_vocab().values()) == list(range(340))


def test_training_is_deterministic() -> None:
    corpus = ["The number of apples is $4 \\times 12 = 48$.", "What Mia picks."] * 5
    first, second = (train_tokenizer(corpus, 290) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    text = "The number of apples"
    assert first.encode(text) == second.encode(text)


def test_a_saved_tokenizer_is_the_same(tokenizer: PreTrainedTokenizerBase, tmp_path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "Zoë has 12 kites.\n\n  $\\frac{12}{3}$<|im_end|>"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.decode(loaded.encode(text)) == text
    assert loaded.chat_template == tokenizer.chat_template
    assert (loaded.eos_token_id, loaded.pad_token_id) == (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
