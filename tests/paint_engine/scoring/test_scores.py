"""What a server's scores are read as, by hand, and what a message shows of them."""

import json
import math
from typing import Any

import pytest
import torch

from paint_engine.rollout.http import BadReply
from paint_engine.scoring.replies import Asked, read_card, read_scores

# Ids 0 to 9 are tokens, 10 and 11 are padding rows of the head.
ASKED = Asked(top_k=2, num_tokens=10, num_rows=12)
PROMPT, COMPLETION = (5, 6), (7, 3)


def entry(probability: float) -> dict[str, Any]:
    return {"logprob": math.log(probability), "rank": 1, "decoded_token": "x"}


def body(*rows: Any) -> bytes:
    """Rows of the completion's positions; nobody reads those of the prompt."""
    choice = {"prompt_token_ids": [5, 6, 7, 3], "prompt_logprobs": [None, {"9": 1}, *rows]}
    return json.dumps({"choices": [choice]}).encode()


def test_the_likeliest_tokens_and_the_completion_s_own() -> None:
    rows = {"7": entry(0.5), "1": entry(0.25)}, {"2": entry(0.5), "1": entry(0.25), "3": entry(0.1)}
    found = read_scores(body(*rows), PROMPT, COMPLETION, ASKED)
    assert found.token_ids.dtype == torch.int32 and found.logprobs.dtype == torch.float32
    assert found.token_ids.tolist() == [[7, 1, -1], [2, 1, 3]]
    expected = [[0.5, 0.25, 0.0], [0.5, 0.25, 0.1]]
    assert torch.allclose(found.logprobs.exp(), torch.tensor(expected))
    assert found.logprobs[0, 2] == -math.inf


def test_rows_of_the_head_that_are_no_tokens_are_taken_out() -> None:
    """Half of the first position's probability is padding's: the rest of it counts twice."""
    rows = (
        {"7": entry(0.25), "10": entry(0.5)},
        {"3": entry(0.3), "11": entry(0.2), "1": entry(0.4)},
    )
    found = read_scores(body(*rows), PROMPT, COMPLETION, ASKED)
    assert found.token_ids.tolist() == [[7, -1, -1], [3, 1, -1]]
    expected = [[0.5, 0.0, 0.0], [0.375, 0.5, 0.0]]
    assert torch.allclose(found.logprobs.exp(), torch.tensor(expected))


def test_the_sampled_token_alone() -> None:
    asked = Asked(top_k=0, num_tokens=10, num_rows=12)
    found = read_scores(body({"7": entry(0.5)}, {"3": entry(1.0)}), PROMPT, COMPLETION, asked)
    assert found.token_ids.tolist() == [[7], [3]]
    assert torch.allclose(found.logprobs, torch.tensor([[math.log(0.5)], [0.0]]))


def test_rounding_above_0_is_cut() -> None:
    row = {"3": {"logprob": 5e-5}, "1": {"logprob": -12.0}}
    found = read_scores(body({"7": entry(0.5), "1": entry(0.25)}, row), PROMPT, COMPLETION, ASKED)
    assert found.logprobs[1, 0] == 0.0


# Where the key of a server may stand in its reply.
KEY = "s3cret-abcdefghijklmnopqrstuvwxyz-0123456789-ABCDEFGHIJKLMNOPQRSTUVWXYZ-end"
GOOD = {"7": entry(0.5), "1": entry(0.25)}
ECHOES = {
    "a position": (GOOD, KEY),
    "positions": (GOOD, [KEY, {KEY: KEY}]),
    "an id": (GOOD, {"3": entry(0.5), KEY: entry(0.1)}),
    "a value": (GOOD, {"3": {"logprob": KEY}, "1": entry(0.1)}),
    "beside a value": (GOOD, {"3": {KEY: KEY}, "1": entry(0.1)}),
    "an entry": (GOOD, {"3": KEY, "1": entry(0.1)}),
    "one position more": (GOOD, {"3": entry(0.5), "1": entry(0.1)}, KEY),
}


@pytest.mark.parametrize("echo", ECHOES)
def test_no_part_of_a_key_is_shown(echo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    with pytest.raises(BadReply, match="got ") as caught:
        read_scores(body(*ECHOES[echo]), PROMPT, COMPLETION, ASKED)
    message = str(caught.value)
    assert not any(KEY[start : start + 8] in message for start in range(len(KEY) - 7))
    assert len(message) < 1000 and message.isprintable()


@pytest.mark.parametrize("name", ["", "None", "\x1b[31m", "x" * 2000])
def test_a_model_without_a_name_that_can_be_recorded(name: str) -> None:
    with pytest.raises(BadReply, match=r"got the model .*; needs a name that can be shown"):
        read_card(json.dumps({"data": [{"id": name}]}).encode())


def test_the_served_model_is_the_one_without_a_parent() -> None:
    cards = [
        {"id": "adapter", "parent": "base"},
        {"id": "base", "root": "/models/base", "parent": None, "max_model_len": 4096},
    ]
    assert read_card(json.dumps({"data": cards}).encode()) == (["base", "/models/base"], 4096)
    assert read_card(b'{"data": [{"id": "base"}]}') == (["base"], None)
    with pytest.raises(BadReply, match="got no model without a parent"):
        read_card(b'{"data": []}')
