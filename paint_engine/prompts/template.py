"""The tokenizer's chat template, a program of the model's maker: renders messages with it, says
where it fails, and reads from it how a turn ends."""

import datetime
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from paint_engine.prompts.control import THOUGHT_MARKS, control_tokens, spelled_tokens
from paint_engine.prompts.renderer import TemplateFailed, render_template

_PROBE_QUESTION, _PROBE_ANSWER = "How much is 23519 + 1?", "It is 23520."
_DATE_FUNCTION = "strftime_now"
# transformers gives templates the clock, and of the caller's values only data. The last line break
# is dropped by the template engine, so that the template behind it begins on a line of its own.
_DATE_MACRO = (
    "{%- macro strftime_now(format) %}{% set written = namespace(text=format) %}"
    "{% for name, value in start_date.items() %}"
    "{% set written.text = written.text | replace(name, value) %}"
    "{% endfor %}{{ written.text }}{% endmacro %}\n"
)
_DIRECTIVES = "aAbBcdDeFgGhHIjklmMnprRsStTuUVwWxXyYzZ"
_PERCENT = "\ufdd0"


class BadTemplate(ValueError):
    """A chat template fails, exceeds a limit, or changes the text of a message."""


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    *,
    thinking: bool,
    date: str | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """Returns the messages as the chat template writes them; see `render_each`."""
    (text,) = render_each(
        tokenizer,
        [messages],
        thinking=thinking,
        date=date,
        add_generation_prompt=add_generation_prompt,
    )
    return text


def render_each(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Mapping[str, str]]],
    *,
    thinking: bool,
    date: str | None = None,
    add_generation_prompt: bool = True,
) -> list[str]:
    """Returns the messages of each conversation as the chat template writes them.

    thinking: the template's `enable_thinking`; templates without the switch ignore it.
    date: what a template that asks for the date gets, YYYY-MM-DD; None = the day of the call.

    Raises BadTemplate, with the template's own words, if it does not parse or refuses the messages,
    if it exceeds a limit of the renderer, and if the last message's text is not in the result.
    """
    template, own = tokenizer.get_chat_template(), dict[str, Any]()
    if date is not None and shows_date(tokenizer):
        template, own = _DATE_MACRO + template, {"start_date": _directives(date)}
    own |= {"add_generation_prompt": add_generation_prompt, "enable_thinking": thinking}
    try:
        texts = _apply(tokenizer, template, conversations, own)
    except TemplateFailed as failure:
        raise BadTemplate(
            f"the chat template of {tokenizer.name_or_path} {failure}; correct "
            "chat_template.jinja (or tokenizer_config.json) there, or use another model"
        ) from failure
    for (*_, last), text in zip(conversations, texts, strict=True):
        if last["content"].strip() not in text:
            raise BadTemplate(
                f"the chat template of {tokenizer.name_or_path} drops or changes the text of a "
                f"{last['role']} message: {last['content'][:60]!r} is not in what it writes, "
                f"{text[-120:]!r}; needs a template that writes a message's content as it is; "
                "correct chat_template.jinja beside the model, or use another model"
            )
    return texts


def _apply(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    conversations: Sequence[Sequence[Mapping[str, str]]],
    own: dict[str, Any],
) -> list[str]:
    """Returns what the tokenizer's `apply_chat_template` does with each conversation, bounded.
    Raises TemplateFailed.

    own: what the template sees beside the messages and the special tokens.
    """
    if type(tokenizer).apply_chat_template is PreTrainedTokenizerBase.apply_chat_template:
        return render_template(template, conversations, tokenizer.special_tokens_map | own)
    # Code that came with the model, and that the user trusts, does it in its own way.
    texts = []
    for messages in conversations:
        plain = [dict(message) for message in messages]
        try:
            text = tokenizer.apply_chat_template(
                plain, chat_template=template, tokenize=False, **own
            )
        except Exception as error:
            raise TemplateFailed(f"failed in the tokenizer's own code: {error!r}") from error
        assert isinstance(text, str)
        texts.append(text)
    return texts


def shows_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Returns whether the chat template asks for the date."""
    return _DATE_FUNCTION in tokenizer.get_chat_template()


def check_date(tokenizer: PreTrainedTokenizerBase, date: str | None, key: str) -> None:
    """Raises ValueError for a date that the chat template would not show.

    key: how the user gave it.
    """
    if date is not None and not shows_date(tokenizer):
        raise ValueError(
            f"{key}: got {date} with a chat template that shows no date (it does not use "
            f"{_DATE_FUNCTION}); leave it out"
        )


def _directives(date: str) -> dict[str, str]:
    """Returns the text of each directive of strftime, with glibc's flags, at the date's
    beginning."""
    start = datetime.datetime.fromisoformat(date)
    names = [f"%{flag}{letter}" for flag in ("", "-", "_", "0", "^") for letter in _DIRECTIVES]
    values = {name: start.strftime(name) for name in names}
    return {"%%": _PERCENT, **values, _PERCENT: "%"}


def after_question(tokenizer: PreTrainedTokenizerBase, *, thinking: bool, date: str | None) -> str:
    """Returns what the template writes after the user's text: the end of the turn and the
    generation prompt."""
    return _after_question(tokenizer, tokenizer.get_chat_template(), thinking, date)


@lru_cache(maxsize=8)
def _after_question(
    tokenizer: PreTrainedTokenizerBase, template: str, thinking: bool, date: str | None
) -> str:
    """template: the chat template, which decides with the tokenizer."""
    message = {"role": "user", "content": _PROBE_QUESTION}
    text = render(tokenizer, [message], thinking=thinking, date=date)
    return text.rpartition(_PROBE_QUESTION)[2]


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Returns the id of the control token with which the template ends an assistant's turn; None
    if the turn ends with none, or the template takes no assistant's turn."""
    return _end_of_turn(tokenizer, tokenizer.get_chat_template())


@lru_cache(maxsize=8)
def _end_of_turn(tokenizer: PreTrainedTokenizerBase, template: str) -> int | None:
    """template: the chat template, which decides with the tokenizer."""
    turns = [
        {"role": "user", "content": _PROBE_QUESTION},
        {"role": "assistant", "content": _PROBE_ANSWER},
    ]
    try:
        text = render(tokenizer, turns, thinking=False, add_generation_prompt=False)
    except ValueError:
        # Prompts need no such turn.
        return None
    after = text.rpartition(_PROBE_ANSWER)[2].lstrip()
    first = next(iter(spelled_tokens(tokenizer, after)), None)
    if first is None or not after.startswith(first):
        return None
    return control_tokens(tokenizer)[first]


def check_template(
    tokenizer: PreTrainedTokenizerBase, thinking: Mapping[str, bool], date: str | None
) -> list[str]:
    """Returns notes on what the template does otherwise than asked.

    thinking: the thinking switch by the name of its key or flag, without those that are on by
        default.

    Raises ValueError if the template fails on a user message, or writes another text each time.
    """

    def tail(value: bool) -> str:
        return after_question(tokenizer, thinking=value, date=date)

    question = [{"role": "user", "content": _PROBE_QUESTION}]
    twice = [render(tokenizer, question, thinking=False, date=date) for _ in range(2)]
    if twice[0] != twice[1]:
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path} writes another text each time: "
            f"{twice[0][-120:]!r} and {twice[1][-120:]!r}; needs the same prompt for the same "
            "message; correct chat_template.jinja there"
        )
    if tail(True) != tail(False):
        return []
    # A template without thoughts does what "false" asks for.
    _, opens = thought_state(tail(False))
    ignored = [f"{key} {str(value).lower()}" for key, value in thinking.items() if value or opens]
    if not ignored:
        return []
    return [
        f"{' and '.join(ignored)}: the chat template of {tokenizer.name_or_path} ignores "
        f"enable_thinking and always ends a prompt with {tail(True)!r}"
    ]


def thought_state(tail: str) -> tuple[tuple[str, str] | None, bool]:
    """Returns the marks of the thought that the prompt's end contains, and whether it is open.

    tail: `after_question`'s.
    """
    for begin, end in THOUGHT_MARKS:
        if begin in tail or end in tail:
            return (begin, end), tail.rfind(begin) > tail.rfind(end)
    return None, False
