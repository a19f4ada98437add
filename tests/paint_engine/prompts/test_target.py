"""The targets of SFT: one end, one opening of a thought, and text that stays text."""

import copy

import pytest
from transformers import PreTrainedTokenizerBase

from paint_engine.config.sections import PromptsSection
from paint_engine.prompts.chat import encode_student_prompt
from paint_engine.prompts.target import Thought, encode_target, target_text
from paint_engine.types import Problem

TURNS = "{% for m in messages %}{{ '<|im_start|>' + m.content + '<|im_end|>' }}{% endfor %}"
OPENED = (
    TURNS + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)
THOUGHT = "<think>\nTwo and two.\n</think>\n\nIt is \\boxed{4}."
OFF, ON = PromptsSection(student_thinking=False), PromptsSection(student_thinking=True)


def sequence(tokenizer: PreTrainedTokenizerBase, solution: str, prompts: PromptsSection) -> str:
    """Prompt and target as the student reads them."""
    problem = Problem("p", "2+2?", solution, "4")
    thinking = prompts.student_thinking
    prompt = encode_student_prompt(tokenizer, problem, prompts, thinking=thinking)
    text = tokenizer.decode([*prompt, *encode_target(tokenizer, solution, prompts)])
    assert isinstance(text, str)
    return text.partition("assistant\n")[2]


def test_a_solution_without_control_tokens_is_encoded_as_it_is(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    solution = "Add: $2 + 2 = 4$.\nThe answer is \\boxed{4}."
    ids = encode_target(tokenizer, solution, OFF)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids == (*tokenizer.encode(solution, add_special_tokens=False), stop)
    assert target_text(tokenizer, solution, OFF).thought is None


@pytest.mark.parametrize(
    "solution",
    [
        "He has 3.<|im_end|> So \\boxed{3}",
        "It is 3.<|im_end|>",
        "<|endoftext|>",
        "a</think>b<think>",
    ],
)
def test_one_stop_token_at_its_end_and_the_data_s_are_text(
    solution: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    ids = encode_target(tokenizer, solution, OFF)
    control = set(tokenizer.added_tokens_decoder)
    assert [number for number in ids if number in control] == [ids[-1]]
    assert tokenizer.decode([ids[-1]]) == "<|im_end|>"
    assert tokenizer.decode(list(ids)) == f"{solution}<|im_end|>"


@pytest.mark.parametrize(
    ("template", "prompts", "solution", "expected", "thought"),
    [
        # Qwen3's template: the prompt has nothing, or an empty thought.
        (None, ON, THOUGHT, THOUGHT, None),
        (None, ON, "It is 4.", "It is 4.", None),
        (None, OFF, "It is 4.", "<think>\n\n</think>\n\nIt is 4.", None),
        (None, OFF, THOUGHT, "<think>\n\n</think>\n\nIt is \\boxed{4}.", "dropped"),
        # DeepSeek's: the prompt opens the thought.
        (OPENED, OFF, THOUGHT, THOUGHT, None),
        (OPENED, OFF, THOUGHT.removeprefix("<think>\n"), THOUGHT, None),
        (OPENED, OFF, "<think>Two.</think>4", "<think>\nTwo.</think>4", None),
        (OPENED, OFF, "It is 4.", "<think>\nIt is 4.", "unclosed"),
        (OPENED, OFF, "<think>\nIt is 4.", "<think>\nIt is 4.", "unclosed"),
    ],
)
def test_a_thought_is_opened_once(
    template: str | None,
    prompts: PromptsSection,
    solution: str,
    expected: str,
    thought: Thought,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if template is not None:
        monkeypatch.setattr(tokenizer, "chat_template", template)
    assert sequence(tokenizer, solution, prompts) == f"{expected}<|im_end|>"
    ids = encode_target(tokenizer, solution, prompts)
    assert target_text(tokenizer, solution, prompts).thought == thought
    marks = [tokenizer.convert_tokens_to_ids(mark) for mark in ("<think>", "</think>")]
    for mark in marks:
        assert ids.count(mark) <= 1


def test_marks_of_other_models_count_too(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They need not be tokens."""
    monkeypatch.setattr(tokenizer, "chat_template", OPENED.replace("<think>", "[THINK]"))
    assert sequence(tokenizer, "[THINK]\nTwo.[/THINK]4", OFF) == "[THINK]\nTwo.[/THINK]4<|im_end|>"


def test_a_later_thought_is_text(tokenizer: PreTrainedTokenizerBase) -> None:
    solution = f"{THOUGHT} Tags such as <think> and </think> stay."
    ids = encode_target(tokenizer, solution, ON)
    counts = [ids.count(tokenizer.convert_tokens_to_ids(m)) for m in ("<think>", "</think>")]
    assert counts == [1, 1]
    assert tokenizer.decode(list(ids)) == f"{solution}<|im_end|>"


def test_a_target_ends_as_the_template_ends_a_turn(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Base models come with another EOS token; without an end in the template, it is the end."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = "<|endoftext|>"
    assert tokenizer.decode([encode_target(tokenizer, "4", OFF)[-1]]) == "<|im_end|>"
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[-1].content }}")
    assert tokenizer.decode([encode_target(tokenizer, "4", OFF)[-1]]) == "<|endoftext|>"
