"""Rollouts from vLLM's OpenAI-compatible server, on machines other than the trainer's.

Requests and answers contain token ids, so the server's tokenizer and chat template are not used.
"""

import http.client
import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from typing import Any
from urllib.parse import urlsplit

from peft import PeftModel
from torch import nn

from paint_engine.distributed import World, gather_objects, raise_together
from paint_engine.keys import with_key
from paint_engine.model import lm_head_weight
from paint_engine.rollout.adapter_files import WeightFiles, WrittenWeights
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

# Time that a whole exchange may take, for requests that need no engine,
_CONTROL_TIMEOUT_S = 10.0
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


class ServerEngine:
    """A running `vllm serve`; see `rollout.engine.RolloutEngine`.

    url: address of the server, as in `rollout.url`. VLLM_API_KEY is sent if it is set.
    model: the student, a PeftModel, because a server loads only adapters.
    model_path: the path or name that the student was loaded from; the server must serve the same
        model.
    max_sequences: number of requests that each rank sends at once, also in evaluations.
    adapter_dir: a directory that the server sees under the same path; None = shared memory, for a
        server on this machine.
    restart_timeout_s: how long `restart` waits for a server to return.

    The constructor and `sync` are collective calls. The constructor raises ValueError, with the
    command that starts the server, if no server answers or if it was started with other settings.
    Later, EngineDied means that the server is gone, refused a request or sent a wrong reply.
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
        self._server = Server(url)
        self._world = world
        self._max_sequences = max_sequences
        self._restart_timeout_s = restart_timeout_s
        self._head_size = lm_head_weight(model).shape[0]
        self._command = serve_command(url, model_path, reserved_lora_rank(model))
        self._base_name = ""
        raise_together(self._unfit(model_path))
        self._requests = Requests()
        self._closed = False
        self._files = WeightFiles(model, world, adapter_dir, per_node=False)
        self._written: WrittenWeights | None = None

    def _unfit(self, model_path: str) -> str | None:
        """Returns the reason why this server cannot provide rollouts, or None. Sets the name of the
        served model."""
        try:
            self._server.request("GET", "/health", timeout_s=_CONTROL_TIMEOUT_S)
            models = self._server.request("GET", "/v1/models", timeout_s=_CONTROL_TIMEOUT_S)
            names = read_models(models)
            self._base_name = names[0]
            if not {os.path.basename(name.rstrip("/")) for name in names} & {
                os.path.basename(model_path.rstrip("/"))
            }:
                served = " from ".join(map(quoted, names))
                fault = f"serves {served}, but the student is {model_path}"
            # A request without a name: refused if adapters can be loaded, unknown (404) otherwise.
            elif self._load_adapter("", "", _CONTROL_TIMEOUT_S)[0] == 404:
                fault = "does not load adapters while it runs"
            else:
                fault = self._probe()
        except (OSError, http.client.HTTPException, Refused, BadReply) as error:
            fault = f"does not answer as a vLLM server ({quoted(str(error))})"
        if fault is None:
            return None
        return f"the server at {self._server.url} {fault}; start it with: {self._command}"

    def _probe(self) -> str | None:
        # With one candidate the processed log-probability is 0. The raw one hardly ever is.
        params = SamplingParams(1.0, 1.0, 1, 1, (), self._head_size)
        completion = self._complete(self._base_name, (0,), 0, params, Requests())
        if completion.logprobs != (0.0,):
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
                    self._unload(previous.name)
            except EngineDied as error:
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

        Raises EngineDied if the server refuses a request, sends a wrong reply, or none within ten
        minutes plus half a second per token of the limit.
        """
        assert len(prompts) == len(seeds)
        assert base or self._written is not None, "sync comes before generate"
        name = self._base_name if base or self._written is None else self._written.name

        requests = self._requests = Requests()

        def complete(index: int) -> Completion:
            with engine_faults(self._server.url):
                return self._complete(name, prompts[index], seeds[index], params, requests)

        # Checked only now: an earlier `close` did not see these calls, and a later one ends them.
        if self._closed:
            requests.abort()
        completions: dict[int, Completion] = {}
        with closing(ask_at_once(complete, len(prompts), self._max_sequences, requests)) as answers:
            for index, completion in answers:
                completions[index] = completion
                if on_batch is not None:
                    on_batch([index], [completion])
        return [completions[index] for index in range(len(prompts))]

    @property
    def can_restart(self) -> bool:
        """True: whoever started the server can start it again."""
        return True

    def restart(self) -> None:
        """Waits for the server to return (whoever started it must restart it), and has it load the
        weights of the last `sync`. Raises EngineDied if it does not return in time."""
        deadline = time.monotonic() + self._restart_timeout_s
        if not returns_in_time(self._is_healthy, deadline, _CONTROL_TIMEOUT_S):
            raise EngineDied(
                f"the server at {self._server.url} has not returned within "
                f"{self._restart_timeout_s:.0f} s"
            )
        if self._written is not None:
            left = deadline - time.monotonic()
            self._load(self._written, max(left, _LEAST_LOAD_TIMEOUT_S))

    def close(self) -> None:
        """Aborts the running requests, unloads the adapter if the server still answers, and deletes
        its files."""
        self._closed = True
        self._requests.abort()
        if self._world.is_main and self._written is not None:
            self._unload(self._written.name)
        self._files.close()

    def _load(self, written: WrittenWeights, timeout_s: float) -> None:
        with engine_faults(self._server.url):
            status, body = self._load_adapter(written.name, str(written.directory), timeout_s)
        # Every rank restarts on its own, so another may have loaded the adapter already.
        if status == 200 or b"already been loaded" in body:
            return
        raise EngineDied(
            f"the server at {self._server.url} did not load the adapter in {written.directory} "
            f"({status}: {quoted(body)}); it must see that directory under the same path; name one "
            f"that both see with --rollout.adapter_dir, and start the server with: {self._command}"
        )

    def _load_adapter(self, name: str, directory: str, timeout_s: float) -> tuple[int, bytes]:
        body = {"lora_name": name, "lora_path": directory}
        return self._server.send("POST", "/v1/load_lora_adapter", body, timeout_s=timeout_s)

    def _unload(self, name: str) -> None:
        """Unloads an adapter. A server that does not answer is ignored."""
        with suppress(OSError, http.client.HTTPException, BadReply):
            self._server.send(
                "POST",
                "/v1/unload_lora_adapter",
                {"lora_name": name},
                timeout_s=_CONTROL_TIMEOUT_S,
            )

    def _is_healthy(self, timeout_s: float) -> bool:
        """Returns whether the server answers and its engine is alive."""
        return self._server.is_healthy(timeout_s)

    def _complete(
        self,
        name: str,
        prompt: Sequence[int],
        seed: int,
        params: SamplingParams,
        requests: Requests,
    ) -> Completion:
        """Returns the completion by the model or adapter of this name. Raises what
        `engine_faults` converts."""
        body = self._server.request(
            "POST",
            "/v1/completions",
            self._request(name, prompt, seed, params),
            timeout_s=_ANSWER_TIMEOUT_S + _TOKEN_TIMEOUT_S * params.max_new_tokens,
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
            "logprobs": 0,
            "return_token_ids": True,
            "add_special_tokens": False,
            "skip_special_tokens": False,
            "logit_bias": {str(token): bias for token, bias in biases.items()} or None,
        }


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
