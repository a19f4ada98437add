"""Prompts of a reasoning teacher, which explains what it sees of the solution and then scores with
that explanation in its prompt."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from paint_engine.config.sections import PromptsSection
from paint_engine.config.templates import fill
from paint_engine.prompts.chat import (
    UserMessage,
    encode_chats,
    hide_end,
    reference_values,
    shorten_to_fit,
)
from paint_engine.prompts.control import THOUGHT_MARKS, DataTexts
from paint_engine.types import Problem

_THINK_BEGIN, _THINK_END = THOUGHT_MARKS[0]


def reason_text(problem: str, shown: str, prompts: PromptsSection, *, whole: bool) -> str:
    """Returns the user message that asks the teacher for a rationale.

    whole: nothing of the shown text is hidden, and the message does not call it a part.
    """
    values = reference_values(problem, shown, prompts, whole=whole)
    return fill(prompts.reason_template, values)


def _message(
    tokenizer: PreTrainedTokenizerBase,
    problem: Problem,
    shown: str,
    prompts: PromptsSection,
    *,
    whole: bool,
) -> UserMessage:
    data = DataTexts(tokenizer)
    question, part = data.hide(problem.problem), data.hide(shown)
    return UserMessage(reason_text(question, part, prompts, whole=whole), data)


def encode_hidden_reason_prompts(
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    prompts: PromptsSection,
    *,
    thinking: bool,
    marker: str,
) -> list[tuple[int, ...]]:
    """Returns the token ids of the prompt that asks for a rationale of what is shown of each
    problem, with all of that hidden."""
    messages = [_message(tokenizer, problem, marker, prompts, whole=False) for problem in problems]
    return encode_chats(tokenizer, messages, thinking=thinking, date=prompts.date)


def encode_reason_prompt(
    tokenizer: PreTrainedTokenizerBase,
    problem: Problem,
    shown: str,
    prompts: PromptsSection,
    *,
    text: str | None = None,
    thinking: bool,
    max_tokens: int | None,
    marker: str,
) -> tuple[tuple[int, ...], str]:
    """Returns the token ids of the prompt that asks for a rationale of what is shown of one
    problem, and the shown text as the prompt has it.

    shown: the text that the teacher is shown, or what the mask leaves of it.
    text: that text before the mask; None means the problem's solution.

    A prompt above `max_tokens` is shortened: the text is cut from its end, and the marker replaces
    the cut part. The question and the request are never cut.

    Raises ValueError if the prompt does not fit without the text.
    """
    whole = shown == (problem.solution if text is None else text)

    def encode(num_hidden: int) -> tuple[tuple[int, ...], str]:
        kept = hide_end(shown, num_hidden, marker)
        asked = _message(tokenizer, problem, kept, prompts, whole=whole and num_hidden == 0)
        (ids,) = encode_chats(tokenizer, [asked], thinking=thinking, date=prompts.date)
        return ids, kept

    found = shorten_to_fit(encode, len(shown), max_tokens)
    if found is None:
        shortest, _ = encode(len(shown))
        raise ValueError(
            f"{problem.problem_id}: the request for a rationale takes {len(shortest)} tokens with "
            f"all of the shown text hidden, but the rationale leaves room for only {max_tokens}; "
            "drop the problem with --data.max_prompt_tokens or lower "
            "--teacher.reason_max_new_tokens"
        )
    return found


def read_rationale(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """Returns the rationale in a completion as the teacher's prompt shows it, or "" if there is
    none.

    It removes thoughts (the text before "</think>", and the text after a "<think>" that is not
    closed), white space at both ends, and special tokens. The special tokens are the one that ends
    the completion and any that the text spells out, which would put turns written by the model into
    the teacher's prompt.
    """
    text = tokenizer.decode(list(token_ids), skip_special_tokens=False)
    assert isinstance(text, str)
    # A template may open the thoughts in the prompt. The completion then has only their end.
    text = text.rpartition(_THINK_END)[2].partition(_THINK_BEGIN)[0]
    special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    for token in sorted(special, key=len, reverse=True):
        text = text.replace(token, "")
    return text.strip()
