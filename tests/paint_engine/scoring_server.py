"""A stand-in for a vLLM server that scores: the log-probabilities are a real model's, and a test
switches faults on."""

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen3ForCausalLM

Json = dict[str, Any]


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], stand_in: "ScoringServer") -> None:
        self.stand_in = stand_in
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The client may hang up at any time."""


class ScoringServer:
    """Serves one model on loopback, from `start` to `kill`, on one port.

    max_logprobs: as of `vllm serve`. fault: the name of a fault, or None. applies: whether a
    request gets it. dies_at: the number of the request during which the server is killed, to be
    started again `down_s` later. num_scored: requests that were answered. asked: all bodies.
    """

    def __init__(self, model_dir: Path, *, max_logprobs: int = 1000) -> None:
        self.model: PreTrainedModel = Qwen3ForCausalLM.from_pretrained(model_dir).eval()
        self.name = str(model_dir)
        self.max_model_len = 1024
        self.max_logprobs = max_logprobs
        self.fault: str | None = None
        self.applies: Callable[[Json], bool] = lambda request: True
        self.dies_at: int | None = None
        self.down_s = 0.2
        self.num_scored = self.num_deaths = 0
        self.asked: list[Json] = []
        self.headers: list[dict[str, str]] = []
        # The model, and the counts.
        self.lock = threading.Lock()
        self._port = 0
        self._http: _Http | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        self._http = _Http(("127.0.0.1", self._port), self)
        self._port = self._http.server_port
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        self._thread.start()

    def kill(self) -> None:
        if self._http is not None and self._thread is not None:
            self._http.shutdown()
            self._http.server_close()
            self._thread.join()
            self._http = None

    def die_and_return(self) -> None:
        """From a thread of its own, because a request cannot end the server that serves it."""

        def run() -> None:
            self.kill()
            time.sleep(self.down_s)
            self.start()

        self.num_deaths += 1
        assert self._http is not None
        # Nobody is served from here on, also not a question for its health.
        self._http.socket.close()
        threading.Thread(target=run).start()

    @torch.no_grad()
    def choice(self, request: Json) -> Json:
        """What vLLM replies: at each position but the first the likeliest tokens, and the prompt's
        own with its rank."""
        ids, k = request["prompt"], request["prompt_logprobs"]
        logits = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        rows: list[Json | None] = [None]
        for place, token in enumerate(ids[1:]):
            values, order = logprobs[place].topk(k)
            own = logprobs[place, token]
            rank = int((logprobs[place] >= own).sum())
            row = {str(token): {"logprob": own.item(), "rank": rank, "decoded_token": "x"}}
            pairs = zip(order.tolist(), values.tolist(), strict=True)
            for number, (listed, value) in enumerate(pairs, start=1):
                row[str(listed)] = {"logprob": value, "rank": number, "decoded_token": "x"}
            rows.append(row)
        return {
            "index": 0,
            "text": "",
            "prompt_token_ids": ids,
            "token_ids": [0],
            "logprobs": None,
            "prompt_logprobs": rows,
            "finish_reason": "length",
        }


def _last(change: Callable[[Json], object]) -> Callable[[Json, Json], object]:
    """A fault of the last position's log-probabilities."""
    return lambda choice, request: change(choice["prompt_logprobs"][-1])


def _value(value: object) -> Callable[[Json, Json], object]:
    """A log-probability of the last position's own token."""

    def change(choice: Json, request: Json) -> None:
        token = str(request["prompt"][-1])
        choice["prompt_logprobs"][-1][token]["logprob"] = value

    return change


def _renamed(name: str) -> Callable[[Json, Json], object]:
    """Another id in place of the first of the last position that is not the position's own."""

    def change(choice: Json, request: Json) -> None:
        row = choice["prompt_logprobs"][-1]
        other = next(key for key in row if key != str(request["prompt"][-1]))
        row[name] = row.pop(other)

    return change


def _padding(choice: Json, request: Json) -> None:
    """Nearly all of the probability for an id that is no token."""
    row = choice["prompt_logprobs"][-1]
    for entry in row.values():
        entry["logprob"] = -20.0
    other = next(key for key in row if key != str(request["prompt"][-1]))
    row["345"] = row.pop(other) | {"logprob": -1e-5}


# Faults of a choice, by name.
CHOICES: dict[str, Callable[[Json, Json], object]] = {
    "NaN": _value(float("nan")),
    "null": _value(None),
    "minus infinity": _value(-float("inf")),
    "vLLM's minus infinity": _value(-9999.0),
    "a positive log-probability": _value(0.5),
    "a text for a log-probability": _value("-0.5"),
    "true for a log-probability": _value(True),
    "a number beyond float": _value(10**400),
    "too much probability": _last(lambda row: [e.update(logprob=-0.1) for e in row.values()]),
    "an id out of range": _renamed("346"),
    "a negative id": _renamed("-1"),
    "an id with a zero before it": _renamed("007"),
    "an id that is a word": _renamed("seven"),
    "an id of 400 digits": _renamed("1" * 400),
    "probability for padding": _padding,
    "fewer tokens": _last(lambda row: [row.popitem() for _ in range(3)]),
    "more tokens": _last(lambda row: row.update({str(k): {"logprob": -30.0} for k in range(99)})),
    "not its own token": lambda choice, request: choice["prompt_logprobs"][-1].pop(
        str(request["prompt"][-1])
    ),
    "an entry that is a number": _last(lambda row: row.update({next(iter(row)): -0.5})),
    "null for a position": lambda choice, request: choice["prompt_logprobs"].__setitem__(-1, None),
    "a list for a position": lambda choice, request: choice["prompt_logprobs"].__setitem__(-1, []),
    "a position less": lambda choice, request: choice["prompt_logprobs"].pop(),
    "a position more": lambda choice, request: choice["prompt_logprobs"].append({}),
    "no scores": lambda choice, request: choice.pop("prompt_logprobs"),
    "null for the scores": lambda choice, request: choice.update(prompt_logprobs=None),
    "changed prompt": lambda choice, request: choice["prompt_token_ids"].append(1),
    "no echo": lambda choice, request: choice.pop("prompt_token_ids"),
}
# Faults of the body, by name.
BODIES: dict[str, bytes] = {
    "no JSON": b"<html>\x1b[31m",
    "nothing": b"",
    "no choices": b'{"choices": []}',
    "two choices": b'{"choices": [{}, {}]}',
    "nested too deep": b"[" * 100_000,
    "longer than asked for": b" " * (32 << 20),
}


class _Handler(BaseHTTPRequestHandler):
    server: _Http  # pyright: ignore[reportIncompatibleVariableOverride]

    def _send(self, body: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        stand_in = self.server.stand_in
        card = {"id": stand_in.name, "root": stand_in.name, "parent": None}
        card["max_model_len"] = stand_in.max_model_len
        self._send(json.dumps({"data": [card]}).encode() if "models" in self.path else b"")

    def do_POST(self) -> None:
        stand_in = self.server.stand_in
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with stand_in.lock:
            stand_in.asked.append(request)
            stand_in.headers.append(dict(self.headers))
            if stand_in.dies_at == len(stand_in.asked):
                stand_in.die_and_return()
                self.close_connection = True
                return
            refusal = self._refusal(request)
            choice = {} if refusal else stand_in.choice(request)
            stand_in.num_scored += 1
            fault = stand_in.fault if stand_in.fault and stand_in.applies(request) else None
        if refusal:
            self._send(json.dumps({"error": {"message": refusal}}).encode(), 400)
            return
        if fault in BODIES:
            self._send(BODIES[fault])
            return
        if fault is not None:
            CHOICES[fault](choice, request)
        self._send(json.dumps({"choices": [choice]}).encode())

    def _refusal(self, request: Json) -> str | None:
        stand_in, k = self.server.stand_in, request["prompt_logprobs"]
        if request["model"] != stand_in.name:
            return f"The model `{request['model']}` does not exist."
        if k > stand_in.max_logprobs:
            return (
                f"Requested prompt logprobs of {k}, which is greater than max allowed: "
                f"{stand_in.max_logprobs}"
            )
        if len(request["prompt"]) + request["max_tokens"] > stand_in.max_model_len:
            return f"maximum context length is {stand_in.max_model_len} tokens"
        if max(request["prompt"]) >= stand_in.model.config.vocab_size:
            return f"Token id {max(request['prompt'])} is out of vocabulary"
        return None

    def log_message(self, format: str, *args: object) -> None:
        pass
