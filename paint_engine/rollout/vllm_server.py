"""Rollouts from vLLM's OpenAI-compatible server, on machines other than the trainer's.

Requests and answers contain token ids, so the server's tokenizer and chat template are not used.
"""

import http.client
import json
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

from peft import PeftModel
from torch import nn

from paint_engine.distributed import World, gather_objects, raise_together
from paint_engine.model import lm_head_weight
from paint_engine.rollout.adapter_files import WeightFiles, WrittenWeights
from paint_engine.rollout.engine import Completion, EngineDied, SamplingParams
from paint_engine.rollout.vllm_core import biased_tokens, reserved_lora_rank

# Time after which a silent server counts as dead, for requests that need no engine,
_CONTROL_TIMEOUT_S = 10.0
# for loading an adapter, which waits for the running requests and may read a shared disk,
_LOAD_TIMEOUT_S = 600.0
# and for a completion, which may wait for those of other ranks: this, plus a time per token.
_ANSWER_TIMEOUT_S = 600.0
_TOKEN_TIMEOUT_S = 0.5
# Interval between checks of a server that is starting.
_POLL_S = 1.0
# The lowest value that the protocol allows. It makes a token e^100 times less likely, so it is
# never sampled.
_BIAS = -100.0


class ServerEngine:
    """A running `vllm serve`; see `rollout.engine.RolloutEngine`.

    url: address of the server, such as "http://node7:8000". VLLM_API_KEY is sent if it is set.
    model: the student, a PeftModel, because a server loads only adapters.
    model_path: the path or name that the student was loaded from; the server must serve the same
        model.
    max_sequences: number of requests that each rank sends at once, also in evaluations.
    adapter_dir: a directory that the server sees under the same path; None = shared memory, for a
        server on this machine.
    restart_timeout_s: how long `restart` waits for a server to return.

    The constructor and `sync` are collective calls. The constructor raises ValueError, with the
    command that starts the server, if no server answers or if it was started with other settings.
    """

    def __init__(
        self,
        url: str,
        model: nn.Module,
        model_path: str,
        world: World,
        *,
        max_sequences: int,
        adapter_dir: str | None = None,
        restart_timeout_s: float = 600.0,
    ) -> None:
        if not isinstance(model, PeftModel):
            raise ValueError(
                "rollout.url names a server, but the run trains all weights; a server loads only "
                "adapters; leave out rollout.url, or set lora.enabled to true"
            )
        self._server = _Server(url)
        self._world = world
        self._max_sequences = max_sequences
        self._restart_timeout_s = restart_timeout_s
        self._head_size = lm_head_weight(model).shape[0]
        self._command = (
            f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve {model_path} --enable-lora "
            f"--max-lora-rank {reserved_lora_rank(model)} --logprobs-mode processed_logprobs "
            "--generation-config vllm"
        )
        raise_together(self._unfit(model_path))
        self._base_name = self._server.base_model()[0]
        self._calls = _Calls()
        self._closed = False
        self._files = WeightFiles(model, world, adapter_dir, per_node=False)
        self._written: WrittenWeights | None = None

    def _unfit(self, model_path: str) -> str | None:
        """Returns the reason why this server cannot provide rollouts, or None."""
        try:
            self._server.get("/health")
            names = self._server.base_model()
            if not {os.path.basename(name.rstrip("/")) for name in names} & {
                os.path.basename(model_path.rstrip("/"))
            }:
                fault = f"serves {' from '.join(names)}, but the student is {model_path}"
            # A request without a name: refused if adapters can be loaded, unknown (404) otherwise.
            elif self._server.load("", "", _CONTROL_TIMEOUT_S)[0] == 404:
                fault = "does not load adapters while it runs"
            else:
                fault = self._probe(names[0])
        except (OSError, http.client.HTTPException, _Refused) as error:
            fault = f"does not answer as a vLLM server ({error})"
        if fault is None:
            return None
        return f"the server at {self._server.url} {fault}; start it with: {self._command}"

    def _probe(self, name: str) -> str | None:
        # With one candidate the processed log-probability is 0. The raw one hardly ever is.
        params = SamplingParams(1.0, 1.0, 1, 1, (), self._head_size)
        answer = self._server.complete(self._request(name, (0,), 0, params), _Calls())
        choice = answer["choices"][0]
        if choice.get("token_ids") is None:
            return "does not return token ids (return_token_ids): it is too old"
        if choice["logprobs"]["token_logprobs"] != [0.0]:
            return "returns raw log-probabilities, not those of the sampled distribution"
        return None

    def sync(self, weights_version: int) -> None:
        """Writes the student's current weights to files and has the server load them. A collective
        call."""
        previous, self._written = self._written, self._files.write(weights_version)
        failure = None
        if self._world.is_main:
            try:
                self._load(self._written, _LOAD_TIMEOUT_S)
                if previous is not None:
                    self._server.unload(previous.name)
            except (EngineDied, ValueError) as error:
                failure = error
        for error in gather_objects(failure):
            if error is not None:
                raise error

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        params: SamplingParams,
        *,
        base: bool = False,
        on_batch: Callable[[list[int], list[Completion]], None] | None = None,
    ) -> list[Completion]:
        """Returns one completion per prompt, in their order; `on_batch` gets each as it finishes.

        Raises EngineDied if the server does not answer a request within ten minutes plus half a
        second per token of its limit.
        """
        assert len(prompts) == len(seeds)
        assert base or self._written is not None, "sync comes before generate"
        name = self._base_name if base or self._written is None else self._written.name

        calls = self._calls = _Calls()

        def complete(index: int) -> Completion:
            request = self._request(name, prompts[index], seeds[index], params)
            return _completion(self._ask(request, calls), prompts[index])

        # Checked only now: an earlier `close` did not see these calls, and a later one ends them.
        if self._closed:
            calls.hang_up()
        pool = ThreadPoolExecutor(self._max_sequences, thread_name_prefix="completions")
        completions: dict[int, Completion] = {}
        try:
            places = {pool.submit(complete, index): index for index in range(len(prompts))}
            for future in as_completed(places):
                index = places[future]
                completions[index] = future.result()
                if on_batch is not None:
                    on_batch([index], [completions[index]])
        finally:
            # After a failure the other answers are not needed.
            pool.shutdown(wait=False, cancel_futures=True)
            calls.hang_up()
        return [completions[index] for index in range(len(prompts))]

    @property
    def can_restart(self) -> bool:
        """True: whoever started the server can start it again."""
        return True

    def restart(self) -> None:
        """Waits for the server to return (whoever started it must restart it), and has it load the
        weights of the last `sync`. Raises EngineDied if it does not return in time."""
        deadline = time.monotonic() + self._restart_timeout_s
        while (left := deadline - time.monotonic()) > 0:
            if self._server.is_healthy(min(left, _CONTROL_TIMEOUT_S)):
                if self._written is not None:
                    self._load(self._written, max(deadline - time.monotonic(), _POLL_S))
                return
            time.sleep(min(left, _POLL_S))
        raise EngineDied(
            f"the server at {self._server.url} has not returned within "
            f"{self._restart_timeout_s:.0f} s"
        )

    def close(self) -> None:
        """Aborts the running requests, unloads the adapter if the server still answers, and deletes
        its files."""
        self._closed = True
        self._calls.hang_up()
        if self._world.is_main and self._written is not None:
            self._server.unload(self._written.name)
        self._files.close()

    def _load(self, written: WrittenWeights, timeout_s: float) -> None:
        status, text = self._reach(
            lambda: self._server.load(written.name, str(written.directory), timeout_s)
        )
        # Every rank restarts on its own, so another may have loaded the adapter already.
        if status == 200 or "already been loaded" in text:
            return
        raise ValueError(
            f"the server at {self._server.url} did not load the adapter in {written.directory} "
            f"({status}: {text}); it must see that directory under the same path; name one that "
            f"both see with --rollout.adapter_dir, and start the server with: {self._command}"
        )

    def _ask(self, request: dict[str, Any], calls: "_Calls") -> dict[str, Any]:
        try:
            return self._reach(lambda: self._server.complete(request, calls))
        except _Refused as refusal:
            # A restarted server does not know the adapter's name: 404.
            if refusal.status == 404 or refusal.status >= 500:
                raise EngineDied(str(refusal)) from refusal
            raise ValueError(f"the server at {self._server.url}: {refusal}") from refusal

    def _reach(self, send: Callable[[], Any]) -> Any:
        try:
            return send()
        except (OSError, http.client.HTTPException) as error:
            message = f"the server at {self._server.url} is gone ({type(error).__name__}: {error})"
            raise EngineDied(message) from error

    def _request(
        self, name: str, prompt: Sequence[int], seed: int, params: SamplingParams
    ) -> dict[str, Any]:
        """Builds the request's fields of the protocol from our sampling parameters, with every
        field set."""
        biases = biased_tokens(params, self._head_size, _BIAS)
        return {
            "model": name,
            "prompt": list(prompt),
            "n": 1,
            "echo": False,
            "stream": False,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": max(params.top_k, 0),
            "min_p": 0.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "repetition_penalty": 1.0,
            "seed": seed,
            "max_tokens": params.max_new_tokens,
            "min_tokens": 0,
            # Exactly our stop tokens end an answer; the model's own list is ignored.
            "stop_token_ids": list(params.stop_token_ids),
            "ignore_eos": True,
            "logprobs": 0,
            "return_token_ids": True,
            "add_special_tokens": False,
            "skip_special_tokens": False,
            "logit_bias": {str(token): bias for token, bias in biases.items()} or None,
        }


def _completion(answer: dict[str, Any], prompt: Sequence[int]) -> Completion:
    choice = answer["choices"][0]
    assert choice["prompt_token_ids"] == list(prompt), "the server changed a prompt's token ids"
    if choice["finish_reason"] not in ("stop", "length"):
        raise EngineDied(f"the server ended a completion with {choice['finish_reason']!r}")
    token_ids = tuple(choice["token_ids"])
    # JSON has no NaN: the server gives null.
    values = choice["logprobs"]["token_logprobs"]
    logprobs = tuple(math.nan if value is None else value for value in values)
    assert len(token_ids) == len(logprobs), (len(token_ids), len(logprobs))
    return Completion(token_ids, logprobs, choice["finish_reason"] == "length")


class _Refused(Exception):
    """An answer with an error status."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"status {status}: {text}")
        self.status = status


class _Calls:
    """Running requests that can be aborted together, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lines: set[socket.socket] = set()
        self._over = False

    @contextmanager
    def counted(self, line: socket.socket) -> Iterator[None]:
        """Returns a context in which the connection waits for its answer. Raises OSError once these
        calls are aborted."""
        with self._lock:
            if self._over:
                raise ConnectionAbortedError("this request was aborted")
            self._lines.add(line)
        try:
            yield
        finally:
            with self._lock:
                self._lines.remove(line)

    def hang_up(self) -> None:
        """Ends all of these requests, and any later ones, with an OSError."""
        with self._lock:
            self._over = True
            for line in self._lines:
                # The server may have closed the connection first.
                with suppress(OSError):
                    line.shutdown(socket.SHUT_RDWR)


class _Server:
    """JSON over HTTP with one connection per request. It can be used from several threads."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                f"rollout.url is {url!r}; needs a server's address, such as http://node7:8000"
            )
        self.url = url.rstrip("/")
        self._parts = parts
        self._headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY"):
            self._headers["Authorization"] = f"Bearer {key}"

    def _send(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        timeout_s: float,
        calls: _Calls | None = None,
    ) -> tuple[int, str]:
        """Returns status and body. Raises OSError if nothing answers for `timeout_s`."""
        secure = self._parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        assert self._parts.hostname is not None
        # The request bypasses proxies of the environment: the server is one of the run's own
        # machines.
        connection = kind(
            self._parts.hostname, self._parts.port, timeout=min(timeout_s, _CONTROL_TIMEOUT_S)
        )
        data = None if body is None else json.dumps(body)
        with closing(connection):
            connection.connect()
            connection.sock.settimeout(timeout_s)
            with (calls or _Calls()).counted(connection.sock):
                connection.request(method, self._parts.path.rstrip("/") + path, data, self._headers)
                response = connection.getresponse()
                return response.status, response.read().decode()

    def get(self, path: str) -> str:
        """Returns the body of a success. Raises _Refused for any other status, and OSError if
        nothing answers."""
        status, text = self._send("GET", path, None, _CONTROL_TIMEOUT_S)
        if status != 200:
            raise _Refused(status, text)
        return text

    def load(self, name: str, directory: str, timeout_s: float) -> tuple[int, str]:
        """Has the server load an adapter. Returns status and body, whatever the status. Raises
        OSError."""
        body = {"lora_name": name, "lora_path": directory}
        return self._send("POST", "/v1/load_lora_adapter", body, timeout_s)

    def unload(self, name: str) -> None:
        """Unloads an adapter from the server. A server that does not answer is ignored."""
        with suppress(OSError, http.client.HTTPException):
            body = {"lora_name": name}
            self._send("POST", "/v1/unload_lora_adapter", body, _CONTROL_TIMEOUT_S)

    def complete(self, request: dict[str, Any], calls: _Calls) -> dict[str, Any]:
        """Returns the answer to a request for a completion. Raises _Refused, or OSError."""
        timeout_s = _ANSWER_TIMEOUT_S + _TOKEN_TIMEOUT_S * request["max_tokens"]
        status, text = self._send("POST", "/v1/completions", request, timeout_s, calls)
        if status != 200:
            raise _Refused(status, text)
        return json.loads(text)

    def base_model(self) -> list[str]:
        """Returns the name of the served model without adapters, and the path or name that it was
        loaded from."""
        cards = json.loads(self.get("/v1/models"))["data"]
        base = next(card for card in cards if card.get("parent") is None)
        return list(dict.fromkeys([base["id"], base.get("root") or base["id"]]))

    def is_healthy(self, timeout_s: float) -> bool:
        """Returns whether the server answers and its engine is alive."""
        try:
            return self._send("GET", "/health", None, timeout_s)[0] == 200
        except (OSError, http.client.HTTPException):
            return False
