"""The process in which chat templates are rendered, bounded in time, memory and length.

A template is a program of the model's maker. The template engine's sandbox keeps it from files and
from Python, and not from an endless loop or from text of any length.
"""

import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from paint_engine.worker import StartFailed, Worker

# Of the processor's time, which a busy machine does not stretch; a template takes about 0.1 ms.
_RENDER_LIMIT_S = 1.0
# A single operation, such as 9**9**9, does not notice that limit. The process is then killed.
_KILL_LIMIT_S = 10.0
_START_LIMIT_S = 120.0
# Of one exchange with the process, which takes longer than a short conversation.
_MAX_CONVERSATIONS = 256
# A longer exchange is answered in parts, each well within the limit at which the process is killed.
_PART_S = 1.0
# Above what the process takes when it has started: about 0.1 GB of memory, 0.5 GB of addresses.
_MEMORY_LIMIT_BYTES = 2 << 30
# Of what the template adds. System prompts with tools are the longest, at tens of thousands.
_MAX_ADDED_CHARS = 1_000_000
# Some templates write a message more than once.
_MAX_COPIES = 8
_NEEDED = f"that takes at most {_RENDER_LIMIT_S:g} s and {_MEMORY_LIMIT_BYTES >> 30} GB for it"
# Of a template's own words.
_MAX_ERROR_CHARS = 500


class TemplateFailed(Exception):
    """A template does not parse or refuses the messages, in its own words, or exceeds a limit; the
    message is the rest of the sentence `the chat template of NAME ...`."""


class _TooSlow(Exception):
    """A conversation has taken its time."""


def start_renderer() -> None:
    """Starts the process, whose imports then run beside the caller's. Without this call, the first
    `render_template` waits for them."""
    _renderer().begin()


def render_template(
    template: str, conversations: Sequence[Sequence[Mapping[str, str]]], values: Mapping[str, Any]
) -> list[str]:
    """Returns each conversation's messages as the template writes them.

    values: what the template sees beside the messages; JSON values.

    Raises TemplateFailed for the first conversation that has no text.
    """
    texts: list[str] = []
    while len(texts) < len(conversations):
        some = conversations[len(texts) : len(texts) + _MAX_CONVERSATIONS]
        texts += _render_some([template, some, values])
    return texts


def _render_some(question: list[Any]) -> list[str]:
    """Returns the texts of the first conversations of a question, at least one."""
    try:
        reply = _renderer().ask(question)
        if reply.ended:
            # The system may have ended the process for another one's memory.
            reply = _renderer().ask(question)
    except StartFailed as failure:
        raise TemplateFailed(f"was not rendered: {failure}") from failure
    if reply.ended:
        raise TemplateFailed(f"is endless or too large: {reply.error}; needs one {_NEEDED}")
    assert reply.error is None, reply.traceback or reply.error
    texts, failure = reply.value
    if failure is not None:
        raise TemplateFailed(failure)
    return texts


@cache
def _renderer() -> Worker:
    return Worker(
        "paint_engine.prompts.renderer:load_renderer",
        [],
        call="the rendering of a conversation",
        process="the process that renders chat templates",
        timeout_s=_KILL_LIMIT_S,
        start_limit_s=_START_LIMIT_S,
        advice=f'see what this says: {sys.executable} -c "import transformers"',
    )


def load_renderer() -> Callable[[list[Any]], list[Any]]:
    """Builds the function from [template, conversations, values] to [texts, failure]: the texts of
    the first conversations, as many as it has time for, and None; or why there is none for the
    next. The child process calls it."""
    from transformers.utils.chat_template_utils import render_jinja_template

    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_LIMIT_BYTES, _MEMORY_LIMIT_BYTES))

    def stop(*signalled: object) -> None:
        raise _TooSlow

    def render(template: str, messages: list[dict[str, str]], values: dict[str, Any]) -> str:
        signal.setitimer(signal.ITIMER_PROF, _RENDER_LIMIT_S)
        try:
            (text,), _ = render_jinja_template(
                conversations=[messages], chat_template=template, **values
            )
        except Exception as error:
            # A template may raise anything.
            raise TemplateFailed(_failure(error, messages)) from error
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0.0)
        given = sum(len(message["content"]) for message in messages)
        if len(text) > _MAX_COPIES * given + _MAX_ADDED_CHARS:
            raise TemplateFailed(
                f"writes {len(text)} characters for a conversation of {given}; needs one that "
                f"adds at most {_MAX_ADDED_CHARS}"
            )
        return text

    def answer(question: list[Any]) -> list[Any]:
        template, conversations, values = question
        texts, end = [], time.monotonic() + _PART_S
        for messages in conversations:
            try:
                texts.append(render(template, messages, values))
            except TemplateFailed as failure:
                return [[], str(failure)]
            if time.monotonic() > end:
                break
        return [texts, None]

    signal.signal(signal.SIGPROF, stop)
    return answer


def _failure(error: Exception, messages: Sequence[Mapping[str, str]]) -> str:
    from jinja2 import TemplateSyntaxError

    if isinstance(error, TemplateSyntaxError):
        return f"does not parse: {error.message} (line {error.lineno}); needs a Jinja template"
    roles = " and ".join(message["role"] for message in messages)
    if isinstance(error, _TooSlow | MemoryError):
        taken = "too much memory" if isinstance(error, MemoryError) else "too long"
        return f"takes {taken} for a conversation of {roles}; needs one {_NEEDED}"
    words = str(error)[:_MAX_ERROR_CHARS]
    return (
        f"refuses a conversation of {roles}: {words} ({type(error).__name__}); the prompts are one "
        "user message and the generation prompt, so it needs to take these"
    )
