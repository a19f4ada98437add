"""A vLLM server with the teacher: which model it serves, and its scores of given tokens.

Requests contain token ids, so the server's tokenizer and chat template are not used.
"""

import http.client
import os
import shlex
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from paint_engine.config.sections import TeacherSection
from paint_engine.rollout import EngineDied
from paint_engine.rollout.http import (
    MAX_BODY_BYTES,
    BadReply,
    Refused,
    Requests,
    Server,
    quoted,
    returns_in_time,
)
from paint_engine.rollout.vllm_server import vllm_serve
from paint_engine.scoring.replies import Asked, read_card, read_scores
from paint_engine.types import TopK

# Time that a whole exchange may take, for requests that need no engine,
_CONTROL_TIMEOUT_S = 10.0
# and for scores, which may wait for those of other ranks: this, plus a time per token sent.
_ANSWER_TIMEOUT_S = 600.0
_TOKEN_TIMEOUT_S = 0.05
# Bytes of a reply per listed token: id, log-probability, rank and text, of which few have hundreds
# of characters.
_ENTRY_BYTES = 256


class TeacherDied(EngineDied):
    """The teacher's server is gone, refused a request or sent a wrong reply."""

    part = "the teacher's server"


@dataclass(frozen=True)
class ServedModel:
    """The name of a served model, and the most tokens of a sequence; None if the server does not
    say."""

    name: str
    max_model_len: int | None

    def room(self, context: int) -> int:
        """Returns the most tokens of a sequence that is scored.

        context: the student's.
        """
        # vLLM samples a token after those that are sent.
        return context if self.max_model_len is None else min(context, self.max_model_len - 1)


def find_teacher(section: TeacherSection) -> ServedModel:
    """Returns what the server at `teacher.url` serves.

    Raises ValueError, with the command that starts a server, if none answers there or if it serves
    another model than `teacher.served_model`.
    """
    assert section.url is not None
    server, expected = Server(section.url), section.served_model
    try:
        server.request("GET", "/health", timeout_s=_CONTROL_TIMEOUT_S)
        names, longest = read_card(
            server.request("GET", "/v1/models", timeout_s=_CONTROL_TIMEOUT_S)
        )
    except (OSError, http.client.HTTPException, Refused, BadReply) as error:
        fault = f"does not answer as a vLLM server ({quoted(str(error))})"
        raise ValueError(unfit(section, fault)) from error
    # A server says which id it serves, or the directory where it lies on its own machine.
    if expected is not None and _last(expected) not in map(_last, names):
        served = " from ".join(map(quoted, names))
        raise ValueError(unfit(section, f"serves {served}, but the teacher is {expected}"))
    return ServedModel(names[0], longest)


def _last(name: str) -> str:
    return os.path.basename(name.rstrip("/"))


def unfit(section: TeacherSection, fault: str) -> str:
    """Returns a message on a server that cannot be the teacher, with the command that starts one
    that can."""
    assert section.url is not None
    model = "MODEL" if section.served_model is None else shlex.quote(section.served_model)
    settings = {"max-logprobs": section.served_top_k, "logprobs-mode": "raw_logprobs"}
    command = vllm_serve(section.url, model, settings)
    return f"teacher.url: the server at {section.url} {fault}; start it with: {command}"


class TeacherServer:
    """Scores token ids by the model of a server.

    section: its address and the number of tokens that it may be asked for.
    model: what it serves, by `find_teacher`.
    asked: what it is asked for of every token.
    restart_timeout_s: how long `wait` waits for a server to return.
    """

    def __init__(
        self,
        section: TeacherSection,
        model: ServedModel,
        asked: Asked,
        *,
        restart_timeout_s: float = 600.0,
    ) -> None:
        assert section.url is not None
        self.url = section.url
        self.model = model
        self._section = section
        self._server = Server(section.url)
        self._asked = asked
        self._restart_timeout_s = restart_timeout_s
        # A long reply has millions of numbers: one at a time is read.
        self._reading = threading.Lock()

    def unfit(self) -> str | None:
        """Returns the reason why this server cannot be the teacher, or None: it lists fewer tokens,
        has a smaller vocabulary, or sends something else than log-probabilities."""
        top_k, num_rows = self._asked.top_k, self._asked.num_rows
        if top_k > num_rows:
            return (
                f"teacher.served_top_k: got {top_k}; needs at most the {num_rows} rows of the "
                "student's head; lower it"
            )
        try:
            # A server refuses ids beyond its own vocabulary.
            self.score((self._asked.num_tokens - 1,), (0,), Requests())
        except Refused as refusal:
            fault = (
                f"refuses to list {top_k} tokens (teacher.served_top_k), or the id "
                f"{self._asked.num_tokens - 1} ({refusal})"
            )
        except (OSError, http.client.HTTPException, BadReply) as error:
            fault = f"does not score tokens ({quoted(str(error))})"
        else:
            return None
        return unfit(self._section, fault)

    def score(self, prompt: Sequence[int], completion: Sequence[int], requests: Requests) -> TopK:
        """Returns the scores of the completion's tokens after the prompt.

        Raises OSError, HTTPException, Refused and BadReply.
        """
        assert len(prompt) > 0, "the first token of a sequence is not predicted"
        num_sent = len(prompt) + len(completion)
        body = self._server.request(
            "POST",
            "/v1/completions",
            self._request([*prompt, *completion]),
            timeout_s=_ANSWER_TIMEOUT_S + _TOKEN_TIMEOUT_S * num_sent,
            max_bytes=MAX_BODY_BYTES + _ENTRY_BYTES * num_sent * (self._asked.top_k + 2),
            requests=requests,
        )
        with self._reading:
            return read_scores(body, prompt, completion, self._asked)

    def wait(self) -> None:
        """Waits for the server to return: whoever started it must start it again. Raises
        TeacherDied if it does not return in time."""
        deadline = time.monotonic() + self._restart_timeout_s
        if not returns_in_time(self._server.is_healthy, deadline, _CONTROL_TIMEOUT_S):
            raise TeacherDied(
                f"the server at {self.url} has not returned within {self._restart_timeout_s:.0f} s"
            )

    def _request(self, token_ids: list[int]) -> dict[str, Any]:
        """Builds the request, which names the model: another one at this address refuses it."""
        return {
            "model": self.model.name,
            "prompt": token_ids,
            "prompt_logprobs": self._asked.top_k,
            # The least that vLLM allows: it samples a token, which nobody reads.
            "max_tokens": 1,
            "temperature": 0.0,
            "ignore_eos": True,
            "n": 1,
            "echo": False,
            "stream": False,
            "return_token_ids": True,
            "add_special_tokens": False,
        }
