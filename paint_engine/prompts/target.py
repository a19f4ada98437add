"""The target of supervised training: a reference solution as the student would write it, as token
ids."""

from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from paint_engine.config.sections import PromptsSection
from paint_engine.prompts.control import THOUGHT_MARKS, DataTexts
from paint_engine.prompts.template import after_question, end_of_turn, thought_state

Thought = Literal["dropped", "unclosed"] | None


class TargetText(NamedTuple):
    """A solution as a target before it is encoded.

    text: with placeholders of `data` for the control tokens that are text.
    thought: "dropped" if the prompt closes the thought that the solution has, so that only what
        follows it is trained on; "unclosed" if the prompt opens a thought that the solution does
        not close; else None.
    """

    text: str
    data: DataTexts
    thought: Thought


def stop_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Returns the token that ends a target: the template's end of turn, else the tokenizer's EOS
    token, else None."""
    end = end_of_turn(tokenizer)
    eos = tokenizer.eos_token_id
    return end if end is not None else eos if isinstance(eos, int) else None


def target_text(
    tokenizer: PreTrainedTokenizerBase, solution: str, prompts: PromptsSection
) -> TargetText:
    """Returns a solution as the completion of the student's prompt.

    A thought at the solution's beginning keeps its two marks, of which the first is left out if the
    prompt ends with it. All other control tokens that the solution spells are text.
    """
    tail = after_question(tokenizer, thinking=prompts.student_thinking, date=prompts.date)
    data = DataTexts(tokenizer)
    text, thought = _with_thought(solution, tail, data)
    return TargetText(text, data, thought)


def encode_target(
    tokenizer: PreTrainedTokenizerBase, solution: str, prompts: PromptsSection
) -> tuple[int, ...]:
    """Returns the token ids of `target_text`, then the token that ends a turn, once."""
    stop = stop_token(tokenizer)
    assert stop is not None, "a tokenizer without one is refused before training"
    target = target_text(tokenizer, solution, prompts)
    return (*target.data.encode(target.text), stop)


def _with_thought(solution: str, tail: str, data: DataTexts) -> tuple[str, Thought]:
    """Returns the solution with only the marks of its thought as control tokens.

    tail: the end of the prompt.
    """
    marks, is_open = thought_state(tail)
    begin, end = marks or next(
        (pair for pair in THOUGHT_MARKS if solution.startswith(pair[0])), THOUGHT_MARKS[0]
    )
    begins = solution.startswith(begin)
    inside, closing, answer = solution.removeprefix(begin).partition(end)
    if not closing:
        if is_open and begins:
            return data.hide(inside.lstrip()), "unclosed"
        return data.hide(solution), "unclosed" if is_open else None
    if is_open:
        # The prompt has the mark, and the white space behind it.
        space = tail[tail.rfind(begin) + len(begin) :]
        inside = inside.removeprefix(space) if begins else inside
        return f"{data.hide(inside)}{end}{data.hide(answer)}", None
    if begins and marks is not None:
        return data.hide(answer.strip()), "dropped"
    if begins:
        return f"{begin}{data.hide(inside)}{end}{data.hide(answer)}", None
    return data.hide(solution), None
