"""Rollouts from vLLM's OpenAI-compatible server, on machines apart from the trainer's.

The server is asked for token ids by token ids, so its tokenizer and chat template play no part.
"""

import http.client
import json
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
from paint_engine.model.forward import lm_head_weight
from paint_engine.rollout.adapter_files import WeightFiles, WrittenWeights
from paint_engine.rollout.engine import Completion, EngineDied, SamplingParams
from paint_engine.rollout.vllm_core import biased_tokens, reserved_lora_rank

# How long a server may be silent before it counts as dead: to what needs no engine,
_CONTROL_TIMEOUT_S = 10.0
# to the loading of an adapter, which waits for the requests under way, and may read a shared disk,
_LOAD_TIMEOUT_S = 600.0
# and to a completion, which may queue behind those of other ranks: this, and so much a token.
_ANSWER_TIMEOUT_S = 600.0
_TOKEN_TIMEOUT_S = 0.5
# Between two looks at a server that is starting.
_POLL_S = 1.0
# The strongest that the protocol allows: it makes a token e^100 times less likely, so that it is
# never drawn.
_BIAS = -100.0


class ServerEngine:
    """A running `vllm serve`; see `rollout.RolloutEngine`.

    url: of the server, such as "http://node7:8000". VLLM_API_KEY is sent where it is set.
    model: the student, a PeftModel: a server takes adapters alone.
    model_path: what the student was loaded from; the server must serve the same.
    max_sequences: the requests that each rank has under way at once, in evaluations too.
    adapter_dir: a directory that the server sees under the same path; none = shared memory, for a
        server on this machine.
    restart_timeout_s: how long `restart` waits for a server that comes back.

    Building it and `sync` are collectives of all ranks. Raises ValueError, with the command to
    start it by, where no server answers or where it was not started as needed.
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
                "rollout.url names a server, but the run trains all weights; a server takes "
                "adapters alone; leave out rollout.url, or set lora.enabled to true"
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
        """Why rollouts cannot come from this server, or None."""
        try:
            self._server.get("/health")
            names = self._server.base_model()
            if not {os.path.basename(name.rstrip("/")) for name in names} & {
                os.path.basename(model_path.rstrip("/"))
            }:
                fault = f"serves {' from '.join(names)}, and the student is {model_path}"
            # A request without a name: refused where adapters can be loaded, unknown elsewhere.
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
        # Of one candidate, the processed log-probability is 0; the raw one hardly ever is.
        params = SamplingParams(1.0, 1.0, 1, 1, (), self._head_size)
        answer = self._server.complete(self._request(name, (0,), 0, params), _Calls())
        choice = answer["choices"][0]
        if choice.get("token_ids") is None:
            return "does not return token ids (return_token_ids): it is too old"
        if choice["logprobs"]["token_logprobs"] != [0.0]:
            return "returns raw log-probabilities, not those of the distribution drawn from"
        return None

    def sync(self, weights_version: int) -> None:
        """Writes the weights of this moment to files and has the server read them."""
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
        """One completion a prompt, in their order; `on_batch` gets each as it is done. Raises
        EngineDied where the server has not answered a request within ten minutes and half a second
        a token that it may draw."""
        assert len(prompts) == len(seeds)
        assert base or self._written is not None, "sync comes before generate"
        name = self._base_name if base or self._written is None else self._written.name

        calls = self._calls = _Calls()

        def complete(index: int) -> Completion:
            request = self._request(name, prompts[index], seeds[index], params)
            return _completion(self._ask(request, calls), prompts[index])

        # Only now: a `close` before has missed these calls, and one from now on ends them.
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
            # After a failure nobody waits for the answers to the others.
            pool.shutdown(wait=False, cancel_futures=True)
            calls.hang_up()
        return [completions[index] for index in range(len(prompts))]

    @property
    def can_restart(self) -> bool:
        """Whoever started the server can start it again."""
        return True

    def restart(self) -> None:
        """Waits for the server to come back (whoever started it must start it again), and has it
        read the weights of the last `sync`. Raises EngineDied where it does not come back."""
        deadline = time.monotonic() + self._restart_timeout_s
        while (left := deadline - time.monotonic()) > 0:
            if self._server.is_healthy(min(left, _CONTROL_TIMEOUT_S)):
                if self._written is not None:
                    self._load(self._written, max(deadline - time.monotonic(), _POLL_S))
                return
            time.sleep(min(left, _POLL_S))
        raise EngineDied(
            f"the server at {self._server.url} has not come back within "
            f"{self._restart_timeout_s:.0f} s"
        )

    def close(self) -> None:
        """Gives up what is under way, takes the adapter off the server, where it still answers, and
        deletes its files."""
        self._closed = True
        self._calls.hang_up()
        if self._world.is_main and self._written is not None:
            self._server.unload(self._written.name)
        self._files.close()

    def _load(self, written: WrittenWeights, timeout_s: float) -> None:
        status, text = self._reach(
            lambda: self._server.load(written.name, str(written.directory), timeout_s)
        )
        # Every rank restarts by itself, so another may have been faster.
        if status == 200 or "already been loaded" in text:
            return
        raise ValueError(
            f"the server at {self._server.url} did not load the adapter in {written.directory} "
            f"({status}: {text}); it must see that directory under the same path: name one that "
            f"both see with --rollout.adapter_dir, and start the server with: {self._command}"
        )

    def _ask(self, request: dict[str, Any], calls: "_Calls") -> dict[str, Any]:
        try:
            return self._reach(lambda: self._server.complete(request, calls))
        except _Refused as refusal:
            # A server that was started again does not know the adapter's name: 404.
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
        """Our sampling, with every field said, in the protocol's terms."""
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
            # Exactly our stop tokens end an answer; the model's own list does not count.
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
    logprobs = tuple(choice["logprobs"]["token_logprobs"])
    assert len(token_ids) == len(logprobs), (len(token_ids), len(logprobs))
    return Completion(token_ids, logprobs, choice["finish_reason"] == "length")


class _Refused(Exception):
    """An answer that is not a success."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"status {status}: {text}")
        self.status = status


class _Calls:
    """Requests under way that can be given up together, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lines: set[socket.socket] = set()
        self._over = False

    @contextmanager
    def counted(self, line: socket.socket) -> Iterator[None]:
        """While the line waits for its answer. Raises OSError once these calls are given up."""
        with self._lock:
            if self._over:
                raise ConnectionAbortedError("this request has been given up")
            self._lines.add(line)
        try:
            yield
        finally:
            with self._lock:
                self._lines.remove(line)

    def hang_up(self) -> None:
        """Every request of these, and of any to come, ends with an OSError."""
        with self._lock:
            self._over = True
            for line in self._lines:
                # The other side may have hung up first.
                with suppress(OSError):
                    line.shutdown(socket.SHUT_RDWR)


class _Server:
    """JSON over HTTP, one connection a request; usable from several threads."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                f"rollout.url is {url!r}; needs a server's address such as http://node7:8000"
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
        """Status and body. Raises OSError where nothing answers for `timeout_s`."""
        secure = self._parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        assert self._parts.hostname is not None
        # Not through a proxy of the environment: the server is one of the run's own machines.
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
        """The body of a success. Raises _Refused for any other status, OSError where nothing
        answers."""
        status, text = self._send("GET", path, None, _CONTROL_TIMEOUT_S)
        if status != 200:
            raise _Refused(status, text)
        return text

    def load(self, name: str, directory: str, timeout_s: float) -> tuple[int, str]:
        """Has the server read an adapter: status and body, whatever the status. Raises OSError."""
        body = {"lora_name": name, "lora_path": directory}
        return self._send("POST", "/v1/load_lora_adapter", body, timeout_s)

    def unload(self, name: str) -> None:
        """Takes an adapter off the server; one that does not answer is left alone."""
        with suppress(OSError, http.client.HTTPException):
            body = {"lora_name": name}
            self._send("POST", "/v1/unload_lora_adapter", body, _CONTROL_TIMEOUT_S)

    def complete(self, request: dict[str, Any], calls: _Calls) -> dict[str, Any]:
        """The answer to a request for a completion. Raises _Refused, or OSError."""
        timeout_s = _ANSWER_TIMEOUT_S + _TOKEN_TIMEOUT_S * request["max_tokens"]
        status, text = self._send("POST", "/v1/completions", request, timeout_s, calls)
        if status != 200:
            raise _Refused(status, text)
        return json.loads(text)

    def base_model(self) -> list[str]:
        """The name of the model that is served without an adapter, and where it was loaded from."""
        cards = json.loads(self.get("/v1/models"))["data"]
        base = next(card for card in cards if card.get("parent") is None)
        return list(dict.fromkeys([base["id"], base.get("root") or base["id"]]))

    def is_healthy(self, timeout_s: float) -> bool:
        """Whether the server answers and its engine is alive."""
        try:
            return self._send("GET", "/health", None, timeout_s)[0] == 200
        except (OSError, http.client.HTTPException):
            return False
