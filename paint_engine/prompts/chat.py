"""Chat prompts of student and teacher (Fig. 2) as token ids, from the configured templates.

With the default templates, both roles get the same question and the same final instruction. The
teacher's prompt also shows what its context gives: by default the verified solution, or the part of
it that the mask leaves. If the mask leaves nothing and the marker is empty, nothing is between the
fences. With a reasoning teacher, the prompt also shows the teacher's rationale of the text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from paint_engine.config.sections import PromptsSection
from paint_engine.config.templates import PART_OF, fill
from paint_engine.prompts.control import DataTexts
from paint_engine.prompts.masking import mask_solution
from paint_engine.prompts.template import render_each
from paint_engine.types import Problem


def student_text(problem: str, prompts: PromptsSection) -> str:
    """Returns the user message of the student, for training and for evaluation."""
    values = {"problem": problem, "instruction": prompts.instruction}
    return fill(prompts.student_template, values)


def reference_values(
    problem: str, shown: str, prompts: PromptsSection, *, whole: bool
) -> dict[str, str]:
    """Returns the values of the names in the teacher's templates, except the rationale.

    shown: the value of {solution}.
    whole: nothing of it is hidden, and the message does not call it a part.
    """
    return {
        "problem": problem,
        "solution": shown,
        "part_of": "" if whole else PART_OF,
        "instruction": prompts.instruction,
    }


def teacher_text(
    problem: str,
    shown: str,
    prompts: PromptsSection,
    *,
    whole: bool,
    rationale: str = "",
) -> str:
    """Returns the user message of the teacher.

    shown: the solution or other text of the teacher's context, or what the mask leaves of it.
    whole: nothing of it is hidden, and the message does not call it a part.
    rationale: the teacher's own explanation of it, shown below it; "" for none.
    """
    section = fill(prompts.rationale_template, {"rationale": rationale}) if rationale else ""
    values = reference_values(problem, shown, prompts, whole=whole)
    return fill(prompts.teacher_template, values | {"rationale": section})


@dataclass(frozen=True)
class UserMessage:
    """The text of a user's message.

    data: has hidden the texts in it that come from data.
    """

    text: str
    data: DataTexts


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    user_text: str,
    data: DataTexts | None = None,
    *,
    thinking: bool,
    date: str | None = None,
    suffix: str = "",
) -> tuple[int, ...]:
    """Returns the token ids of one user message, the generation prompt and `suffix`.

    data: has hidden the texts in `user_text` that come from data; None if there are none.
    thinking: the chat template's `enable_thinking`; templates without the switch ignore it.
    date: `prompts.date`.

    Raises ValueError if the chat template fails or drops the message.
    """
    message = UserMessage(user_text, data or DataTexts(tokenizer))
    (ids,) = encode_chats(tokenizer, [message], thinking=thinking, date=date, suffix=suffix)
    return ids


def encode_chats(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[UserMessage],
    *,
    thinking: bool,
    date: str | None = None,
    suffix: str = "",
) -> list[tuple[int, ...]]:
    """Returns what `encode_chat` returns for each message, sooner."""
    conversations = [[{"role": "user", "content": message.text}] for message in messages]
    texts = render_each(tokenizer, conversations, thinking=thinking, date=date)
    return [
        message.data.encode(text + suffix) for message, text in zip(messages, texts, strict=True)
    ]


def encode_student_prompt(
    tokenizer: PreTrainedTokenizerBase, problem: Problem, prompts: PromptsSection, *, thinking: bool
) -> tuple[int, ...]:
    """Returns the token ids of the student's prompt for one problem; see
    `encode_student_prompts`."""
    (ids,) = encode_student_prompts(tokenizer, [problem], prompts, thinking=thinking)
    return ids


def encode_student_prompts(
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    prompts: PromptsSection,
    *,
    thinking: bool,
) -> list[tuple[int, ...]]:
    """Returns the token ids of the student's prompt for each problem.

    thinking: whether the student thinks; `prompts.student_thinking` in training, `eval.thinking` in
        evaluation.
    """
    messages = []
    for problem in problems:
        data = DataTexts(tokenizer)
        messages.append(UserMessage(student_text(data.hide(problem.problem), prompts), data))
    return encode_chats(tokenizer, messages, thinking=thinking, date=prompts.date)


def hide_end(text: str, num_hidden: int, marker: str) -> str:
    """Replaces the last `num_hidden` characters of the text with the marker."""
    return mask_solution(text, num_hidden / len(text) if text else 0.0, marker=marker)


def shorten_to_fit(
    encode: Callable[[int], tuple[tuple[int, ...], str]],
    num_characters: int,
    max_tokens: int | None,
) -> tuple[tuple[int, ...], str] | None:
    """Returns the prompt that hides the fewest characters and has at most `max_tokens` tokens.

    encode: maps the number of hidden characters, up to `num_characters`, to the token ids and the
        shown text.
    max_tokens: None means no limit.

    Returns None if the prompt is too long with all characters hidden.
    """
    uncut = encode(0)
    if max_tokens is None or len(uncut[0]) <= max_tokens:
        return uncut
    if len(encode(num_characters)[0]) > max_tokens:
        return None
    fewest, most = 1, num_characters
    while fewest < most:
        middle = (fewest + most) // 2
        if len(encode(middle)[0]) <= max_tokens:
            most = middle
        else:
            fewest = middle + 1
    return encode(most)


def _teacher_message(
    tokenizer: PreTrainedTokenizerBase,
    problem: Problem,
    shown: str,
    prompts: PromptsSection,
    *,
    whole: bool,
    rationale: str = "",
) -> UserMessage:
    data = DataTexts(tokenizer)
    question, part = data.hide(problem.problem), data.hide(shown)
    explained = data.hide(rationale)
    return UserMessage(
        teacher_text(question, part, prompts, whole=whole, rationale=explained), data
    )


def _encode_teacher_messages(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[UserMessage], prompts: PromptsSection
) -> list[tuple[int, ...]]:
    return encode_chats(
        tokenizer,
        messages,
        thinking=prompts.teacher_thinking,
        date=prompts.date,
        suffix=prompts.teacher_suffix,
    )


def encode_hidden_teacher_prompts(
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    prompts: PromptsSection,
    *,
    marker: str,
) -> list[tuple[int, ...]]:
    """Returns the token ids of the teacher's prompt for each problem with the whole shown text
    hidden and no rationale, about the shortest that `encode_teacher_prompt` returns."""
    messages = [
        _teacher_message(tokenizer, problem, marker, prompts, whole=False) for problem in problems
    ]
    return _encode_teacher_messages(tokenizer, messages, prompts)


def encode_teacher_prompt(
    tokenizer: PreTrainedTokenizerBase,
    problem: Problem,
    shown: str,
    prompts: PromptsSection,
    *,
    text: str | None = None,
    max_tokens: int | None = None,
    marker: str,
    rationale: str | None = None,
) -> tuple[tuple[int, ...], str]:
    """Returns the token ids of the teacher's prompt for one problem, and the shown text as the
    prompt has it.

    shown: what the mask leaves of the text that the teacher is shown.
    text: that text before the mask; None means the problem's solution.
    rationale: the teacher's explanation of what it was shown; None or "" for none.

    A prompt above `max_tokens` is shortened. The rationale is cut first, from its end, and the
    marker replaces the cut text; if nothing of it remains, its section is left out. Then the
    shown text is cut, also from its end. The question and the end of the template are never cut.

    Raises ValueError if the prompt does not fit without both.
    """
    whole = shown == (problem.solution if text is None else text)
    explained = rationale or ""

    def encode(text_hidden: int, rationale_hidden: int) -> tuple[tuple[int, ...], str]:
        kept = hide_end(shown, text_hidden, marker)
        left = rationale_hidden < len(explained)
        message = _teacher_message(
            tokenizer,
            problem,
            kept,
            prompts,
            whole=whole and text_hidden == 0,
            rationale=hide_end(explained, rationale_hidden, marker) if left else "",
        )
        (ids,) = _encode_teacher_messages(tokenizer, [message], prompts)
        return ids, kept

    found = shorten_to_fit(lambda hidden: encode(0, hidden), len(explained), max_tokens)
    if found is None:
        found = shorten_to_fit(
            lambda hidden: encode(hidden, len(explained)), len(shown), max_tokens
        )
    if found is None:
        shortest, _ = encode(len(shown), len(explained))
        raise ValueError(
            f"{problem.problem_id}: the teacher's prompt takes {len(shortest)} tokens with all of "
            f"the shown text hidden, but the completion leaves room for only {max_tokens}; drop "
            "the problem with --data.max_prompt_tokens or lower --rollout.max_new_tokens"
        )
    return found
