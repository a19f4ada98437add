"""What a message shows of a reply: no part of the key, wherever a server repeats it."""

import json

import pytest

from paint_engine.rollout.engine import SamplingParams
from paint_engine.rollout.http import BadReply
from paint_engine.rollout.replies import read_completion, read_models

KEY = "s3cret-abcdefghijklmnopqrstuvwxyz-0123456789-ABCDEFGHIJKLMNOPQRSTUVWXYZ-end"
PARAMS = SamplingParams(1.0, 1.0, -1, 8, (2, 5), 340)
CHOICE = {
    "finish_reason": "stop",
    "prompt_token_ids": [1],
    "token_ids": [2],
    "logprobs": {"token_logprobs": [-1.0]},
}
# Where a value of another type may stand, and what a server may put there.
PLACES = {
    "choices": lambda value: {"choices": value},
    "a choice": lambda value: {"choices": [value]},
    **{
        name: lambda value, name=name: {"choices": [CHOICE | {name: value}]}
        for name in ("finish_reason", "token_ids", "prompt_token_ids", "logprobs")
    },
    "logprobs below": lambda value: {"choices": [CHOICE | {"logprobs": {"token_logprobs": value}}]},
}
ECHOES = {
    "text": KEY,
    "list": [KEY],
    "lists": [[[KEY], [KEY, 3]]],
    "after much": [9 * "long text " + KEY, KEY],
    "value": {"a": {"b": KEY}},
    "name": {KEY: {KEY: [KEY]}},
    "header": ["Authorization: Bearer " + KEY],
}


def refusal(body: object, *, of_models: bool = False) -> str:
    content = json.dumps(body).encode()
    with pytest.raises(BadReply) as caught:
        read_models(content) if of_models else read_completion(content, [1], PARAMS)
    return str(caught.value)


def is_free_of_the_key(message: str, key: str = KEY) -> bool:
    return not any(key[start : start + 8] in message for start in range(len(key) - 7))


@pytest.mark.parametrize("echo", ECHOES)
@pytest.mark.parametrize("place", PLACES)
def test_no_part_of_a_key_in_a_completion_is_shown(
    place: str, echo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    message = refusal(PLACES[place](ECHOES[echo]))
    assert "got " in message or "is missing" in message
    assert is_free_of_the_key(message) and len(message) < 1000


@pytest.mark.parametrize("echo", ECHOES)
def test_no_part_of_a_key_in_a_list_of_models_is_shown(
    echo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    for body in ({"data": ECHOES[echo]}, {"data": [ECHOES[echo]]}, {"data": [{"id": [KEY]}]}):
        assert is_free_of_the_key(refusal(body, of_models=True))


@pytest.mark.parametrize("key", [60 * "7", "it's\\a\"key'" + 50 * "x"])
def test_a_key_of_digits_or_with_quotes_is_not_shown(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", key)
    assert is_free_of_the_key(refusal({"choices": [[key]]}), key)
    if key.isdigit():
        assert is_free_of_the_key(refusal({"choices": [int(key)]}), key)
        ids = CHOICE | {"token_ids": [int(key)]}
        assert is_free_of_the_key(refusal({"choices": [ids]}), key)
