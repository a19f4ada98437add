"""One vLLM engine, in this process or in one of its own. Token ids go in and come out; nothing is
decoded.

Only this file and `rollout_vllm` import vLLM, and not before an engine is built.
"""

import atexit
import gc
import math
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from paint_engine.rollout import EngineDied
from paint_engine.rollout_hf import Completion, SamplingParams
from paint_engine.rollout_weights import WrittenWeights

# vLLM takes at most this many biased tokens a request (its second model runner's buffer).
_MAX_BIASES = 1024
# The ranks that vLLM reserves room for; an adapter may be smaller.
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# What a start of vLLM fails with, for it has no exception of its own: settings and memory, CUDA,
# files, its own checks of the memory, libraries.
_START_FAILURES = (ValueError, RuntimeError, OSError, AssertionError, ImportError)
# How long an engine's process may take to end when it is asked to.
_EXIT_TIMEOUT_S = 10.0
# Between two looks of an engine's process at whether its trainer still lives.
_WATCH_S = 1.0
# What torchrun tells its processes: an engine that read it would take itself for one of the ranks.
_TORCHRUN_PREFIXES = ("RANK", "LOCAL_", "WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC")


def biased_tokens(params: SamplingParams, head_size: int, bias: float) -> dict[int, float]:
    """The head's rows above the tokenizer's size (padding), each with `bias`, so that they are
    never drawn.

    A list of the tokens that are allowed would say the same in 150,000 entries a request.

    Raises ValueError where there are more of them than vLLM takes.
    """
    padding = range(params.vocab_size, head_size)
    if len(padding) > _MAX_BIASES:
        raise ValueError(
            f"the model's head has {head_size} rows and its tokenizer {params.vocab_size} tokens; "
            f"vLLM can leave out at most {_MAX_BIASES} rows; cut the head and the embeddings to "
            "the tokenizer's size, or use --rollout.engine builtin"
        )
    return dict.fromkeys(padding, bias)


def reserved_lora_rank(model: PeftModel) -> int:
    """The smallest of the ranks that vLLM offers with room for the model's adapters.

    Raises ValueError where there is none.
    """
    rank = model.peft_config["default"].r  # pyright: ignore[reportAttributeAccessIssue]
    if rank > _LORA_RANKS[-1]:
        raise ValueError(
            f"lora.rank is {rank}; vLLM takes at most {_LORA_RANKS[-1]}; lower it, or use "
            "--rollout.engine builtin"
        )
    return next(size for size in _LORA_RANKS if size >= rank)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """vLLM seeds and uses the process's random numbers, which dropout in training draws from."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    on_gpu = torch.cuda.is_initialized()
    with torch.random.fork_rng([torch.cuda.current_device()] if on_gpu else []):
        yield
    random.setstate(python_state)
    np.random.set_state(numpy_state)


class Core:
    """One vLLM engine in this process.

    llm_args: of vllm.LLM.
    head_size: rows of the model's head.

    Raises EngineDied where vLLM does not start.
    """

    def __init__(self, llm_args: Mapping[str, Any], head_size: int) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        self._base_path = llm_args["model"]
        self._head_size = head_size
        self._has_adapters = llm_args["enable_lora"]
        self._adapter: Any = None
        # Without adapters: where the weights in the engine came from, and where the student's are.
        self._in_place = self._student_path = self._base_path
        self._llm: Any = None
        try:
            from vllm import LLM  # pyright: ignore[reportMissingImports]

            with _random_state_kept():
                self._llm = LLM(**llm_args)
        except _START_FAILURES as error:
            raise EngineDied(f"{type(error).__name__}: {error}") from error

    def load(self, written: WrittenWeights) -> None:
        """Makes these weights the student's."""
        if not self._has_adapters:
            self._student_path = str(written.directory)
            self._put_in_place(self._student_path)
            return
        from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

        if self._adapter is not None:
            self._llm.llm_engine.remove_lora(self._adapter.lora_int_id)
        self._adapter = LoRARequest(written.name, written.serial, str(written.directory))
        self._llm.llm_engine.add_lora(self._adapter)

    def _put_in_place(self, path: str) -> None:
        from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

        self._llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
        if current_platform.is_cpu():
            self._llm.apply_model(_repack_tied_head)
        self._llm.reset_prefix_cache()
        self._in_place = path

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        params: SamplingParams,
        base: bool,
    ) -> list[Completion]:
        """One completion a prompt. The trainer's random numbers stay as they are. Raises EngineDied
        after `close`."""
        if self._llm is None:
            raise EngineDied("vLLM has been closed")
        wanted = self._base_path if base else self._student_path
        with _random_state_kept():
            if not self._has_adapters and wanted != self._in_place:
                self._put_in_place(wanted)
            outputs = self._llm.generate(
                [{"prompt_token_ids": list(prompt)} for prompt in prompts],
                [self._request(params, seed) for seed in seeds],
                lora_request=None if base else self._adapter,
                use_tqdm=False,
            )
        assert len(outputs) == len(prompts), "requests of an earlier call were left in the engine"
        for prompt, output in zip(prompts, outputs, strict=True):
            assert output.prompt_token_ids == list(prompt), "vLLM changed a prompt's token ids"
        return [_completion(output.outputs[0]) for output in outputs]

    def _request(self, params: SamplingParams, seed: int) -> Any:
        """Our sampling, with every field said, in vLLM's terms."""
        import vllm  # pyright: ignore[reportMissingImports]

        return vllm.SamplingParams(
            n=1,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=max(params.top_k, 0),
            min_p=0.0,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            repetition_penalty=1.0,
            seed=seed,
            max_tokens=params.max_new_tokens,
            min_tokens=0,
            # Exactly our stop tokens end an answer; the model's own list does not count.
            stop_token_ids=list(params.stop_token_ids),
            ignore_eos=True,
            # No alternatives: the drawn token's own comes in any case.
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            skip_special_tokens=False,
            logit_bias=biased_tokens(params, self._head_size, -math.inf) or None,
        )

    def close(self) -> None:
        """Frees the engine's memory; a second time does nothing."""
        llm, self._llm = self._llm, None
        if llm is None:
            return
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def _repack_tied_head(model: Any) -> None:
    """On CPUs vLLM multiplies by a packed copy of the head, which a reload of embeddings that are
    tied to it leaves as it was."""
    head = model.lm_head
    head.quant_method.process_weights_after_loading(head)


def _completion(output: Any) -> Completion:
    if output.finish_reason not in ("stop", "length"):
        raise EngineDied(f"vLLM ended a completion with {output.finish_reason!r}")
    token_ids, flat = tuple(output.token_ids), output.logprobs
    # One entry a position, for logprobs = 0 asks for no other token than the drawn one.
    assert tuple(flat.token_ids) == token_ids, "log-probabilities of other tokens than the drawn"
    return Completion(token_ids, tuple(flat.logprobs), output.finish_reason == "length")


@contextmanager
def deaths() -> Iterator[None]:
    """What an engine in this process raises when it cannot go on."""
    from vllm.v1.engine.exceptions import (  # pyright: ignore[reportMissingImports]
        EngineDeadError,
    )

    try:
        yield
    except (EngineDeadError, RuntimeError) as error:
        raise EngineDied(f"{type(error).__name__}: {error}") from error


def _serve(
    connection: Any, llm_args: Mapping[str, Any], head_size: int, environment: Mapping[str, str]
) -> None:
    """The main function of an engine's own process: answers calls until the trainer is gone."""
    # Ctrl-C reaches every process of a terminal, and torchrun's SIGTERM every process of a rank's
    # group; the trainer decides when this one ends.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    for name in [n for n in os.environ if n.startswith(_TORCHRUN_PREFIXES)]:
        del os.environ[name]
    os.environ.update(environment)
    threading.Thread(target=_end_with_the_trainer, daemon=True).start()
    try:
        core = Core(llm_args, head_size)
    except EngineDied as death:
        connection.send(death)
        raise
    connection.send(None)
    while True:
        try:
            method, args = connection.recv()
        except EOFError:
            return
        try:
            answer = getattr(core, method)(*args)
        except ValueError as error:
            # Those of vLLM and pydantic do not all survive the way through a pipe.
            answer = ValueError(str(error))
        connection.send(answer)


def _end_with_the_trainer() -> None:
    """A trainer that is killed by SIGKILL tells nobody, and one that generates hears nothing."""
    trainer = multiprocessing.parent_process()
    assert trainer is not None
    while os.getppid() == trainer.pid:
        time.sleep(_WATCH_S)
    os._exit(1)


class OwnProcess:
    """A `Core` in a process of its own: generation overlaps with training, and its death leaves
    the trainer alive.

    environment: its own environment variables, beside the trainer's.

    Raises EngineDied where the engine cannot be built.
    """

    def __init__(
        self, llm_args: Mapping[str, Any], head_size: int, environment: Mapping[str, str]
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve,
            args=(theirs, llm_args, head_size, environment),
            name="paint-vllm",
            daemon=True,
        )
        self._process.start()
        # multiprocessing would end it with the signal that it ignores, and wait for ever.
        atexit.register(self._process.kill)
        # Else this process would hold the other end open, and a death would not be noticed.
        theirs.close()
        try:
            self._answer()
        except EngineDied:
            self.close()
            raise

    def load(self, written: WrittenWeights) -> None:
        """See `Core`."""
        self._call("load", written)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        params: SamplingParams,
        base: bool,
    ) -> list[Completion]:
        """See `Core`."""
        return self._call("generate", prompts, seeds, params, base)

    def close(self) -> None:
        """Ends the process, in the middle of a batch if need be: it keeps nothing of its own."""
        self._process.kill()
        self._process.join()
        self._connection.close()
        atexit.unregister(self._process.kill)

    def _call(self, method: str, *args: Any) -> Any:
        try:
            self._connection.send((method, args))
        except OSError as error:
            raise self._death() from error
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._death() from error
        if isinstance(answer, ValueError | EngineDied):
            raise answer
        return answer

    def _death(self) -> EngineDied:
        self._process.join(_EXIT_TIMEOUT_S)
        return EngineDied(f"vLLM's process ended with exit code {self._process.exitcode}")
