"""The replies of vLLM's server, checked: types, lengths, ranges, and that they fit the request."""

import http.client
import reprlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError

from paint_engine.rollout.engine import Completion, EngineDied, SamplingParams
from paint_engine.rollout.http import BadReply, Refused, quoted, shown_value

ROUNDING = 1e-4
"""A log-softmax in float32 may end so far above 0."""
IMPOSSIBLE = -9999.0
"""what vLLM writes for minus infinity; a token of probability 0 is not sampled"""


class Reply(BaseModel):
    """Nothing is converted: true is not 1, "3" and 3.0 are not 3. Fields that nobody reads may be
    anything."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Logprobs(Reply):
    token_logprobs: Annotated[list[float], FailFast()]


class _Tokens(Reply):
    finish_reason: Literal["stop", "length"]
    prompt_token_ids: Annotated[list[int], FailFast()]
    token_ids: Annotated[list[int], FailFast()]


class _Choice(_Tokens):
    logprobs: _Logprobs


class _Choices(Reply):
    choices: Annotated[list[_Choice], FailFast(), Field(min_length=1, max_length=1)]


class _Answers(Reply):
    """Completions without log-probabilities."""

    choices: Annotated[list[_Tokens], FailFast(), Field(min_length=1, max_length=1)]


class _Card(Reply):
    id: str
    root: str | None = None
    parent: str | None = None


class _Cards(Reply):
    data: Annotated[list[_Card], FailFast()]


R = TypeVar("R", bound=Reply)


@contextmanager
def engine_faults(url: str) -> Iterator[None]:
    """Returns a context that converts what the server at `url` does wrong to EngineDied. A server
    that was started again does not know an adapter's name, so a refusal is one of these."""
    name = f"the server at {url}"
    try:
        yield
    except (OSError, http.client.HTTPException) as error:
        fault = f"{name} is gone ({type(error).__name__}: {quoted(str(error))})"
        raise EngineDied(fault) from error
    except Refused as refusal:
        raise EngineDied(f"{name} refused a request ({refusal})") from refusal
    except BadReply as error:
        raise EngineDied(f"{name} sent a wrong reply: {error}") from error


def read_reply(kind: type[R], body: bytes) -> R:
    """Returns the reply as this kind. Raises BadReply, with the first place that is wrong."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(map(str, first["loc"])) or "the reply"
    if first["type"] == "missing":
        raise BadReply(f"{place} is missing; the server's vLLM may be too old for it")
    raise BadReply(f"{place}: got {shown_value(first['input'])}; {first['msg']}")


def read_models(body: bytes) -> list[str]:
    """Returns the name of the served model without adapters, and the path or name that it was
    loaded from. Raises BadReply."""
    base = next((card for card in read_reply(_Cards, body).data if card.parent is None), None)
    if base is None:
        raise BadReply("data: got no model without a parent; needs the served model itself")
    return list(dict.fromkeys([base.id, base.root or base.id]))


def read_completion(body: bytes, prompt: Sequence[int], params: SamplingParams) -> Completion:
    """Returns the completion of a prompt.

    prompt, params: as they were sent.

    Raises BadReply, with what came and what was needed.
    """
    if params.logprobs:
        (choice,) = read_reply(_Choices, body).choices
        logprobs = choice.logprobs.token_logprobs
    else:
        (choice,) = read_reply(_Answers, body).choices
        logprobs = []
    check_echo(choice.prompt_token_ids, prompt)
    _check_lengths(choice.token_ids, logprobs, params)
    _check_tokens(choice.token_ids, params.vocab_size)
    _check_logprobs(logprobs)
    _check_end(choice.token_ids, choice.finish_reason, params)
    return Completion(tuple(choice.token_ids), tuple(logprobs), choice.finish_reason == "length")


def _check_lengths(token_ids: list[int], logprobs: list[float], params: SamplingParams) -> None:
    fits = 1 <= len(token_ids) <= params.max_new_tokens
    if not params.logprobs and not fits:
        raise BadReply(
            f"got {len(token_ids)} token_ids; needs from 1 to {params.max_new_tokens} of them"
        )
    if params.logprobs and not (fits and len(token_ids) == len(logprobs)):
        raise BadReply(
            f"got {len(token_ids)} token_ids and {len(logprobs)} token_logprobs; needs as many of "
            f"both, from 1 to {params.max_new_tokens}"
        )


def check_echo(echoed: list[int], prompt: Sequence[int]) -> None:
    """Raises BadReply unless the server had the prompt that was sent."""
    sent = list(prompt)
    if echoed != sent:
        same = takewhile(lambda pair: pair[0] == pair[1], zip(echoed, sent, strict=False))
        raise BadReply(
            f"prompt_token_ids: got {len(echoed)} ids, of which the first {len(list(same))} "
            f"are right; needs the {len(sent)} ids that were sent"
        )


def _check_tokens(token_ids: list[int], vocab_size: int) -> None:
    for place, token in enumerate(token_ids):
        if not 0 <= token < vocab_size:
            raise BadReply(
                f"token_ids.{place}: got {shown_value(token)}; needs an id from 0 to "
                f"{vocab_size - 1}"
            )


def _check_logprobs(logprobs: list[float]) -> None:
    for place, logprob in enumerate(logprobs):
        if not IMPOSSIBLE < logprob <= ROUNDING:
            raise BadReply(
                f"token_logprobs.{place}: got {logprob}; needs the log-probability of a token that "
                f"can be sampled, above {IMPOSSIBLE:g} and at most 0"
            )


def _check_end(token_ids: list[int], finish_reason: str, params: SamplingParams) -> None:
    *inside, last = token_ids
    stops = set(params.stop_token_ids)
    if not stops.isdisjoint(inside):
        raise BadReply(
            f"token_ids: got {shown_value(token_ids)}; needs an end at the first stop token (one "
            f"of {reprlib.repr(sorted(stops))})"
        )
    if finish_reason == "stop" and last not in stops:
        raise BadReply(
            f"finish_reason: got 'stop' after the token {last}; needs one of the stop tokens that "
            f"were sent, {reprlib.repr(sorted(stops))}"
        )
    if finish_reason == "length" and len(token_ids) < params.max_new_tokens:
        raise BadReply(
            f"finish_reason: got 'length' after {len(token_ids)} tokens; needs all "
            f"{params.max_new_tokens} that were asked for; the server's --max-model-len may be too "
            "small for the prompt and them"
        )
