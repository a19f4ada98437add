"""Rollouts from vLLM's OpenAI-compatible servers, on machines other than the trainer's.

Requests and answers contain token ids, so the server's tokenizer and chat template are not used.
"""

import http.client
import os
import shlex
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from typing import Any, TypeVar
from urllib.parse import urlsplit

from peft import PeftModel
from torch import nn

from paint_engine.distributed import World, gather_objects, raise_together
from paint_engine.keys import with_key
from paint_engine.model import lm_head_weight
from paint_engine.rollout.engine import Completion, EngineDied, SamplingParams
from paint_engine.rollout.http import (
    MAX_BODY_BYTES,
    BadReply,
    Refused,
    Requests,
    Server,
    ask_at_once,
    quoted,
    returns_in_time,
)
from paint_engine.rollout.replies import engine_faults, read_completion, read_models
from paint_engine.rollout.vllm_core import biased_tokens, reserved_lora_rank
from paint_engine.rollout.weights import WeightFiles, WrittenWeights

# Time that a whole exchange may take, for requests that need no engine,
_CONTROL_TIMEOUT_S = 10.0
_POLL_S = 1.0
# for loading an adapter, which waits for the running requests and may read a shared disk,
_LOAD_TIMEOUT_S = 600.0
# and for a completion, which may wait for those of other ranks: this, plus a time per token.
_ANSWER_TIMEOUT_S = 600.0
_TOKEN_TIMEOUT_S = 0.5
# Bytes of a reply per token: of a completion its id, its log-probability and its text, thrice, for
# which some tokens have hundreds of characters; of the prompt its id.
_TOKEN_BYTES = 1024
_PROMPT_TOKEN_BYTES = 16
# What is left at least for loading an adapter into a server that has returned.
_LEAST_LOAD_TIMEOUT_S = 1.0
# The lowest value that the protocol allows. It makes a token e^100 times less likely, so it is
# never sampled.
_BIAS = -100.0

T = TypeVar("T")


class Replica:
    """One of a run's servers.

    url: as one of `rollout.url`.
    model_path: the path or name of the model that it must serve.
    lora_rank: the rank that it must reserve memory for.
    head_size: number of rows of the model's head.
    """

    def __init__(self, url: str, model_path: str, lora_rank: int, head_size: int) -> None:
        self._server = Server(url)
        self.url = self._server.url
        self._model_path = model_path
        self._head_size = head_size
        self._command = serve_command(url, model_path, lora_rank)
        self._base_name = ""
        self._loaded: str | None = None

    def unfit(self, answer_s: float | None = None) -> str | None:
        """Returns the reason why this server cannot provide rollouts, or None. Sets the name of the
        served model.

        answer_s: how long it may take to sample a token; None = as long as any reply.
        """
        try:
            self._server.request("GET", "/health", timeout_s=_CONTROL_TIMEOUT_S)
            models = self._server.request("GET", "/v1/models", timeout_s=_CONTROL_TIMEOUT_S)
            names = read_models(models)
            self._base_name = names[0]
            if not {os.path.basename(name.rstrip("/")) for name in names} & {
                os.path.basename(self._model_path.rstrip("/"))
            }:
                served = " from ".join(map(quoted, names))
                fault = f"serves {served}, but the student is {self._model_path}"
            # A request without a name: refused if adapters can be loaded, unknown (404) otherwise.
            elif self._load_adapter("", "", _CONTROL_TIMEOUT_S)[0] == 404:
                fault = "does not load adapters while it runs"
            else:
                fault = self._probe(answer_s)
        except (OSError, http.client.HTTPException, Refused, BadReply) as error:
            fault = f"does not answer as a vLLM server ({quoted(str(error))})"
        if fault is None:
            return None
        return f"the server at {self.url} {fault}; start it with: {self._command}"

    def _probe(self, answer_s: float | None) -> str | None:
        # With one candidate the processed log-probability is 0. The raw one hardly ever is.
        params = SamplingParams(1.0, 1.0, 1, 1, (), self._head_size)
        completion = self.complete(None, (0,), 0, params, Requests(), answer_s)
        if completion.logprobs != (0.0,):
            return "returns raw log-probabilities, not those of the sampled distribution"
        return None

    def is_healthy(self, timeout_s: float) -> bool:
        """Returns whether the server answers and its engine is alive."""
        return self._server.is_healthy(timeout_s)

    def load(self, written: WrittenWeights, timeout_s: float) -> None:
        """Has the server load an adapter, then unload the one that this rank had it load before.
        Raises EngineDied."""
        with engine_faults(self.url):
            status, body = self._load_adapter(written.name, str(written.directory), timeout_s)
        # Every rank restarts on its own, so another may have loaded the adapter already.
        if status != 200 and b"already been loaded" not in body:
            raise EngineDied(
                f"the server at {self.url} did not load the adapter in {written.directory} "
                f"({status}: {quoted(body)}); it must see that directory under the same path; name "
                "one that both see with --rollout.adapter_dir, and start the server with: "
                f"{self._command}"
            )
        if self._loaded != written.name:
            self.unload()
            self._loaded = written.name

    def unload(self) -> None:
        """Unloads the adapter that this rank had it load. A server that does not answer is
        ignored."""
        if self._loaded is None:
            return
        with suppress(OSError, http.client.HTTPException, BadReply):
            self._server.send(
                "POST",
                "/v1/unload_lora_adapter",
                {"lora_name": self._loaded},
                timeout_s=_CONTROL_TIMEOUT_S,
            )

    def _load_adapter(self, name: str, directory: str, timeout_s: float) -> tuple[int, bytes]:
        body = {"lora_name": name, "lora_path": directory}
        return self._server.send("POST", "/v1/load_lora_adapter", body, timeout_s=timeout_s)

    def complete(
        self,
        adapter: str | None,
        prompt: Sequence[int],
        seed: int,
        params: SamplingParams,
        requests: Requests,
        answer_s: float | None = None,
    ) -> Completion:
        """Returns the completion by the adapter of this name; None = by the base. Raises what
        `engine_faults` converts.

        answer_s: how long the reply may take, beside the time of its tokens; None = ten minutes.
        """
        body = self._server.request(
            "POST",
            "/v1/completions",
            self._request(adapter or self._base_name, prompt, seed, params),
            timeout_s=(answer_s or _ANSWER_TIMEOUT_S) + _TOKEN_TIMEOUT_S * params.max_new_tokens,
            max_bytes=MAX_BODY_BYTES
            + _TOKEN_BYTES * params.max_new_tokens
            + _PROMPT_TOKEN_BYTES * len(prompt),
            requests=requests,
        )
        return read_completion(body, prompt, params)

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
            "logprobs": 0 if params.logprobs else None,
            "return_token_ids": True,
            "add_special_tokens": False,
            "skip_special_tokens": False,
            "logit_bias": {str(token): bias for token, bias in biases.items()} or None,
        }


class _Spread:
    """Says which server gets the next request of a batch: the one that has had the fewest.

    replicas: the servers; between equals, the first.
    requests: of the whole batch.
    """

    def __init__(self, replicas: Iterable[Replica], requests: Requests) -> None:
        self._lock = threading.Lock()
        self._parts = {replica: requests.part() for replica in replicas}
        self._num_had = dict.fromkeys(self._parts, 0)

    def next(self) -> tuple[Replica, Requests] | None:
        """Returns a server and the requests that go there; None if all were dropped."""
        with self._lock:
            if not self._num_had:
                return None
            replica = min(self._num_had, key=lambda one: self._num_had[one])
            self._num_had[replica] += 1
            return replica, self._parts[replica]

    def drop(self, replica: Replica) -> None:
        """Gives this server no further requests, and ends those that it has."""
        with self._lock:
            self._num_had.pop(replica, None)
        self._parts[replica].abort()


class ServerEngine:
    """One or several running `vllm serve`; see `rollout.engine.RolloutEngine`.

    Each server has the adapter, and gets as many requests as the others, to within one. What a
    server gets wrong loses it until the next `sync`: its unfinished requests go to the others. A
    completion does not depend on where it was sampled, because each request has its seed.

    urls: addresses of the servers, as in `rollout.url`. VLLM_API_KEY is sent if it is set.
    model: the student, a PeftModel, because a server loads only adapters.
    model_path: the path or name that the student was loaded from; the servers must serve the same
        model.
    max_sequences: number of requests that each rank sends at once to each server, also in
        evaluations.
    adapter_dir: a directory that the servers see under the same path; None = shared memory, for
        servers on this machine.
    restart_timeout_s: how long `restart` waits for a server to return.
    warn: gets a message when a server is lost that is not the last one, and when one returns.

    The constructor and `sync` are collective calls. The constructor raises ValueError, with the
    command that starts the server, if one does not answer or if it was started with other settings.
    Later, EngineDied means that every server is gone, refused a request or sent a wrong reply.
    """

    def __init__(
        self,
        urls: Sequence[str],
        model: nn.Module,
        model_path: str,
        world: World,
        *,
        max_sequences: int,
        adapter_dir: str | None = None,
        restart_timeout_s: float = 600.0,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        if not isinstance(model, PeftModel):
            raise ValueError(
                "rollout.url names a server, but the run trains all weights; a server loads only "
                "adapters; leave out rollout.url, or set lora.enabled to true"
            )
        rank, head_size = reserved_lora_rank(model), lm_head_weight(model).shape[0]
        self._replicas = [Replica(url, model_path, rank, head_size) for url in urls]
        self._world = world
        self._max_sequences = max_sequences
        self._restart_timeout_s = restart_timeout_s
        self._warn = warn
        # By address, why a server gets no requests.
        self._lost: dict[str, str] = {}
        self._lock = threading.Lock()
        faults = self._of_each(Replica.unfit)
        raise_together("; ".join(filter(None, faults)) or None)
        self._requests = Requests()
        self._num_sent = 0
        self._closed = False
        self._files = WeightFiles(model, world, adapter_dir, per_node=False)
        self._written: WrittenWeights | None = None

    def sync(self, weights_version: int) -> None:
        """Writes the student's current weights to files and has the servers load them, also those
        that have returned. A collective call; raises EngineDied if none loads them."""
        self._written = self._files.write(weights_version)
        lost_by_rank = gather_objects(self._lost)
        if self._world.is_main:
            # A server may have been started again while only another rank used it.
            self._lost = {url: why for lost in lost_by_rank[::-1] for url, why in lost.items()}
            self._admit(_LOAD_TIMEOUT_S)
        self._lost = gather_objects(self._lost)[0]
        self._check_any_left()

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

        Raises EngineDied if no server is left: each has refused a request, sent a wrong reply, or
        none within ten minutes plus half a second per token of the limit.
        """
        assert len(prompts) == len(seeds)
        assert base or self._written is not None, "sync comes before generate"
        adapter = None if base or self._written is None else self._written.name

        requests = self._requests = Requests()
        # Where all are lost, they have not been waited for; the reason may be over.
        used = self._in_use() or self._replicas
        # What is left after equal shares goes to another server at each batch and on each rank.
        first = (self._world.rank + self._num_sent) % len(used)
        self._num_sent += len(prompts)
        spread = _Spread((*used[first:], *used[:first]), requests)

        def complete(index: int) -> Completion:
            while (place := spread.next()) is not None:
                replica, part = place
                try:
                    with engine_faults(replica.url):
                        return replica.complete(adapter, prompts[index], seeds[index], params, part)
                except EngineDied as death:
                    if requests.is_over:
                        raise
                    # The other requests of a server that was dropped end by that.
                    if not part.is_over:
                        self._lose(replica, str(death))
                        spread.drop(replica)
            raise EngineDied(self._reasons())

        # Checked only now: an earlier `close` did not see these calls, and a later one ends them.
        if self._closed:
            requests.abort()
        completions: dict[int, Completion] = {}
        num_at_once = self._max_sequences * len(used)
        with closing(ask_at_once(complete, len(prompts), num_at_once, requests)) as answers:
            for index, completion in answers:
                completions[index] = completion
                if on_batch is not None:
                    on_batch([index], [completion])
        return [completions[index] for index in range(len(prompts))]

    @property
    def always_has_logprobs(self) -> bool:
        """False: vLLM computes them in a pass of their own."""
        return False

    @property
    def can_restart(self) -> bool:
        """True: whoever started the servers can start them again."""
        return True

    def pause(self) -> None:
        """Does nothing: the servers' memory is not here."""

    def restart(self) -> None:
        """Waits for a server to return (whoever started it must restart it), and has each that
        answers then load the weights of the last `sync`. Raises EngineDied if none returns in
        time, or if all have and none is fit."""
        deadline = time.monotonic() + self._restart_timeout_s
        while returns_in_time(self._is_healthy, deadline, _CONTROL_TIMEOUT_S):
            self._admit(max(deadline - time.monotonic(), _LEAST_LOAD_TIMEOUT_S))
            if self._in_use():
                return
            # One that is healthy and not fit does not end the wait for the others.
            if all(self._healths(_CONTROL_TIMEOUT_S)):
                raise EngineDied(self._reasons())
            time.sleep(max(0.0, min(deadline - time.monotonic(), _POLL_S)))
        raise EngineDied(
            f"the server at {' and at '.join(one.url for one in self._replicas)} has not "
            f"returned within {self._restart_timeout_s:.0f} s"
            + (f" ({self._reasons()})" if self._lost else "")
        )

    def close(self) -> None:
        """Aborts the running requests, unloads the adapter from the servers that still answer, and
        deletes its files."""
        self._closed = True
        self._requests.abort()
        if self._world.is_main:
            self._of_each(Replica.unload)
        self._files.close()

    def _admit(self, timeout_s: float) -> None:
        """Has every server load the weights of the last `sync`. One that was lost is checked first
        as at the start: another may have been started at its address."""

        def admit(replica: Replica) -> str | None:
            lost = self._lost.get(replica.url)
            if lost is not None and not replica.is_healthy(_CONTROL_TIMEOUT_S):
                return lost
            if lost is not None and (fault := replica.unfit(_CONTROL_TIMEOUT_S)) is not None:
                return fault
            try:
                if self._written is not None:
                    replica.load(self._written, timeout_s)
            except EngineDied as death:
                return str(death)
            return None

        faults = self._of_each(admit)
        for replica, fault in zip(self._replicas, faults, strict=True):
            if fault is not None:
                if self._lost.get(replica.url, fault) != fault:
                    self._warn(f"{fault}; it gets no requests until then")
                self._lose(replica, fault)
            elif self._lost.pop(replica.url, None) is not None and len(self._replicas) > 1:
                self._warn(f"the server at {replica.url} has returned, and gets requests again")

    def _lose(self, replica: Replica, reason: str) -> None:
        """Gives this server no requests until it is admitted again."""
        with self._lock:
            # Its requests fail one by one, each with a reason of its own.
            is_known = replica.url in self._lost
            self._lost[replica.url] = reason
            is_last = not self._in_use()
        # Of the last one the exception tells.
        if not is_known and not is_last:
            self._warn(f"{reason}; its requests go to the other servers until it returns")

    def _in_use(self) -> list[Replica]:
        return [replica for replica in self._replicas if replica.url not in self._lost]

    def _reasons(self) -> str:
        return "; ".join(self._lost.values())

    def _check_any_left(self) -> None:
        if not self._in_use():
            raise EngineDied(self._reasons())

    def _is_healthy(self, timeout_s: float) -> bool:
        """Returns whether a server answers and its engine is alive."""
        return any(self._healths(timeout_s))

    def _healths(self, timeout_s: float) -> list[bool]:
        return self._of_each(lambda replica: replica.is_healthy(timeout_s))

    def _of_each(self, ask: Callable[[Replica], T]) -> list[T]:
        """Returns what is asked of each server, asked at the same time."""
        with ThreadPoolExecutor(len(self._replicas), thread_name_prefix="servers") as pool:
            return list(pool.map(ask, self._replicas))


def serve_command(url: str, model_path: str, lora_rank: int) -> str:
    """Returns the shell command that starts the server of a run: on the address of `url` alone, and
    with the key."""
    settings = {
        "max-lora-rank": lora_rank,
        "logprobs-mode": "processed_logprobs",
        "generation-config": "vllm",
    }
    serve = vllm_serve(url, f"{shlex.quote(model_path)} --enable-lora", settings)
    return f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True {serve}"


def vllm_serve(url: str, served: str, settings: Mapping[str, object]) -> str:
    """Returns the shell command that serves on the address of `url` alone, and with the key.

    served: the model as the shell reads it, and flags without a value.
    settings: further flags, with their values.
    """
    parts = urlsplit(url)
    is_secure = parts.scheme == "https"
    host = "127.0.0.1" if parts.hostname == "localhost" else parts.hostname
    arguments = {"host": host, "port": parts.port or (443 if is_secure else 80), **settings}
    if is_secure:
        arguments |= {"ssl-certfile": "CERTIFICATE.pem", "ssl-keyfile": "KEY.pem"}
    flags = " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in arguments.items())
    return with_key(f"vllm serve {served} {flags}")
