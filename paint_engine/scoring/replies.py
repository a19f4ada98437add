"""The scores that vLLM's server replies, checked: they fit the request, and are probabilities."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import FailFast, Field

from paint_engine.rollout.http import BadReply, shown_value
from paint_engine.rollout.replies import (
    IMPOSSIBLE,
    ROUNDING,
    Reply,
    check_echo,
    read_reply,
)
from paint_engine.types import TopK

# More than the rounding of any server's dtype adds to probabilities; the loss has the same bound.
_MOST_MASS = 1.01
# Below it, a difference of float32 probabilities has no digits.
_LEAST_MASS = 1e-3
# Python reads no more digits at once than this by far, and no vocabulary has as many.
_MAX_ID_DIGITS = 9
_MAX_NAME_CHARS = 1000


class _Choice(Reply):
    prompt_token_ids: Annotated[list[int], FailFast()]
    # The entries are checked one by one below: a wrong reply may have millions of them.
    prompt_logprobs: list[Any]


class _Scores(Reply):
    choices: Annotated[list[_Choice], FailFast(), Field(min_length=1, max_length=1)]


class _Card(Reply):
    id: str
    root: str | None = None
    parent: str | None = None
    max_model_len: Annotated[int, Field(gt=0)] | None = None


class _Cards(Reply):
    data: Annotated[list[_Card], FailFast()]


@dataclass(frozen=True)
class Asked:
    """What a server is asked for of every token.

    top_k: number of the likeliest tokens; 0 for the completion's own token alone.
    num_tokens: the tokenizer's largest id plus 1.
    num_rows: rows of the student's head. Those from `num_tokens` on are padding.
    """

    top_k: int
    num_tokens: int
    num_rows: int


def read_card(body: bytes) -> tuple[list[str], int | None]:
    """Returns the names of the served model without adapters (its own, and what it was loaded
    from), and the most tokens of a sequence if the server says so. Raises BadReply."""
    card = next((c for c in read_reply(_Cards, body).data if c.parent is None), None)
    if card is None:
        raise BadReply("data: got no model without a parent; needs the served model itself")
    # It is recorded in a run's configuration, where "none" stands for no name.
    is_name = 0 < len(card.id) <= _MAX_NAME_CHARS and card.id.isprintable()
    if not is_name or card.id.lower() == "none":
        raise BadReply(
            f"data: got the model {shown_value(card.id)}; needs a name that can be shown"
        )
    return list(dict.fromkeys([card.id, card.root or card.id])), card.max_model_len


def read_scores(
    body: bytes, prompt: Sequence[int], completion: Sequence[int], asked: Asked
) -> TopK:
    """Returns the scores of the completion's tokens.

    prompt, completion: as they were sent, one after the other.

    Raises BadReply, with what came and what was needed.
    """
    (choice,) = read_reply(_Scores, body).choices
    check_echo(choice.prompt_token_ids, [*prompt, *completion])
    rows, start = choice.prompt_logprobs, len(prompt)
    if len(rows) != start + len(completion):
        raise BadReply(
            f"prompt_logprobs: got {len(rows)} positions; needs one for each of the "
            f"{start + len(completion)} tokens that were sent"
        )
    width = asked.top_k + 1
    token_ids = torch.full((len(completion), width), -1, dtype=torch.int32)
    logprobs = torch.full((len(completion), width), -math.inf, dtype=torch.float32)
    for place, token in enumerate(completion):
        found = _read_row(rows[start + place], token, asked, f"prompt_logprobs.{start + place}")
        token_ids[place, : len(found)] = torch.tensor(list(found), dtype=torch.int32)
        logprobs[place, : len(found)] = torch.tensor(list(found.values()), dtype=torch.float32)
    return TopK(token_ids, logprobs)


def _read_row(row: object, token: int, asked: Asked, where: str) -> dict[int, float]:
    """Returns the log-probabilities by id of one position, which lists `token`."""
    if not isinstance(row, dict):
        raise BadReply(f"{where}: got {shown_value(row)}; needs log-probabilities by token id")
    # vLLM adds the position's own token where it is not among the k.
    if not asked.top_k <= len(row) <= asked.top_k + 1:
        raise BadReply(
            f"{where}: got {len(row)} tokens; needs the {asked.top_k} likeliest, and the prompt's "
            "own if it is not one of them"
        )
    found = {}
    for key, entry in row.items():
        token_id = _read_id(key, asked.num_rows, where)
        found[token_id] = _read_logprob(entry, f"{where}.{token_id}")
    if token not in found:
        raise BadReply(
            f"{where}: got no log-probability of the token {token}, which was sent there; needs it "
            "beside the likeliest"
        )
    mass = math.fsum(map(math.exp, found.values()))
    if mass > _MOST_MASS:
        raise BadReply(
            f"{where}: got probabilities with the sum {mass:.6g}; needs at most 1: natural "
            "logarithms of probabilities, not logits (the server's --logprobs-mode)"
        )
    return _without_padding(found, asked.num_tokens, where)


def _read_id(key: str, num_rows: int, where: str) -> int:
    plain = key.isascii() and key.isdigit() and len(key) <= _MAX_ID_DIGITS
    if not plain or str(int(key)) != key or int(key) >= num_rows:
        raise BadReply(
            f"{where}: got the id {shown_value(key)}; needs one from 0 to {num_rows - 1}, the "
            "student's vocabulary"
        )
    return int(key)


def _read_logprob(entry: object, where: str) -> float:
    value = entry.get("logprob") if isinstance(entry, dict) else None
    # Not `isinstance`: true is no number. NaN fails both comparisons.
    if type(value) not in (float, int) or not IMPOSSIBLE < value <= ROUNDING:  # pyright: ignore
        raise BadReply(
            f"{where}: got {shown_value(entry)}; needs a logprob above {IMPOSSIBLE:g} and at most 0"
        )
    return min(float(value), 0.0)  # pyright: ignore[reportArgumentType]


def _without_padding(found: Mapping[int, float], num_tokens: int, where: str) -> dict[int, float]:
    """Takes the ids that are no tokens out: the others get their probability among the tokens. The
    trainer's own distributions leave these rows of the head out too."""
    padding = math.fsum(math.exp(value) for key, value in found.items() if key >= num_tokens)
    if padding == 0.0:
        return {key: value for key, value in found.items() if key < num_tokens}
    if padding > 1 - _LEAST_MASS:
        raise BadReply(
            f"{where}: got a probability of {padding:.6g} for ids from {num_tokens} on, which are "
            "no tokens; needs a model that gives them to the tokenizer's tokens"
        )
    left = math.log1p(-padding)
    return {key: min(v - left, 0.0) for key, v in found.items() if key < num_tokens}
