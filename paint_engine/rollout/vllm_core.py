"""One vLLM engine in this process. Input and output are token ids; nothing is decoded.

Only this file and `vllm_engine` import vLLM, and only when an engine is built.
"""

import gc
import math
import os
import random
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from paint_engine.rollout.engine import Completion, EngineDied, SamplingParams
from paint_engine.rollout.weights import SharedWeights, WrittenWeights

# vLLM's limit of biased tokens per request (a buffer of its second model runner).
_MAX_BIASES = 1024
# The adapter ranks that vLLM can reserve memory for; an adapter may be smaller.
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# vLLM has no exception of its own for a failed start. These come from settings and memory, CUDA,
# files, its own memory checks, and libraries.
_START_FAILURES = (ValueError, RuntimeError, OSError, AssertionError, ImportError)


# The indices of finished requests, and their completions.
Finished = tuple[list[int], list[Completion]]
OnBatch = Callable[[list[int], list[Completion]], None]


def biased_tokens(params: SamplingParams, head_size: int, bias: float) -> dict[int, float]:
    """Returns `bias` for each row of the head above the tokenizer's size (padding), so that those
    rows are never sampled.

    A list of the allowed tokens would have the same effect, with 150,000 entries per request.

    Raises ValueError if there are more such rows than vLLM accepts.
    """
    padding = range(params.vocab_size, head_size)
    if len(padding) > _MAX_BIASES:
        raise ValueError(
            f"the model's head has {head_size} rows and its tokenizer {params.vocab_size} tokens; "
            f"vLLM can exclude at most {_MAX_BIASES} rows; cut the head and the embeddings to "
            "the tokenizer's size, or use --rollout.engine builtin"
        )
    return dict.fromkeys(padding, bias)


def reserved_lora_rank(model: PeftModel) -> int:
    """Returns the smallest rank offered by vLLM that has room for the model's adapters.

    Raises ValueError if there is none.
    """
    return reserved_rank(
        model.peft_config["default"].r  # pyright: ignore[reportAttributeAccessIssue]
    )


def reserved_rank(rank: int) -> int:
    """Returns the smallest rank offered by vLLM that has room for adapters of `rank`.

    Raises ValueError if there is none.
    """
    if rank > _LORA_RANKS[-1]:
        raise ValueError(
            f"lora.rank is {rank}; vLLM takes at most {_LORA_RANKS[-1]}; lower it, or use the "
            "built-in engine (--rollout.engine builtin, or --engine builtin in an evaluation)"
        )
    return next(size for size in _LORA_RANKS if size >= rank)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Returns a context that restores the process's random state. vLLM seeds and uses it, and
    training's dropout draws from it."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    on_gpu = torch.cuda.is_initialized()
    try:
        with torch.random.fork_rng([torch.cuda.current_device()] if on_gpu else []):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


class Core:
    """One vLLM engine in this process.

    llm_args: arguments of vllm.LLM.
    head_size: number of rows of the model's head.

    Raises EngineDied if vLLM does not start.
    """

    def __init__(self, llm_args: Mapping[str, Any], head_size: int) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        self._base_path = llm_args["model"]
        self._head_size = head_size
        self._has_adapters = llm_args["enable_lora"]
        self._adapter: Any = None
        # Without adapters: the weights in the engine, and the student's. None = the base's.
        self._in_place: WrittenWeights | SharedWeights | None = None
        self._student: WrittenWeights | SharedWeights | None = None
        self._llm: Any = None
        try:
            from vllm import LLM  # pyright: ignore[reportMissingImports]

            with _random_state_kept():
                self._llm = LLM(**llm_args)
        except _START_FAILURES as error:
            raise EngineDied(f"{type(error).__name__}: {error}") from error

    def load(self, written: WrittenWeights | SharedWeights) -> None:
        """Loads these weights as the student's."""
        if not self._has_adapters:
            self._student = written
            self._put_in_place(written)
            return
        from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

        assert isinstance(written, WrittenWeights), "adapters are files"
        if self._adapter is not None:
            self._llm.llm_engine.remove_lora(self._adapter.lora_int_id)
        self._adapter = LoRARequest(written.name, written.serial, str(written.directory))
        self._llm.llm_engine.add_lora(self._adapter)

    def _put_in_place(self, weights: WrittenWeights | SharedWeights | None) -> None:
        """Replaces the engine's weights by these; None = by the base's."""
        from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

        if isinstance(weights, SharedWeights):
            # The engine is in this process, so that nothing of it is pickled.
            tensors = weights.tensors()
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors})
        else:
            path = str(weights.directory) if weights else self._base_path
            self._llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
        if current_platform.is_cpu():
            self._llm.apply_model(_repack_tied_head)
        self._llm.reset_prefix_cache()
        self._in_place = weights

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        params: SamplingParams,
        base: bool,
        on_batch: OnBatch,
    ) -> None:
        """Samples one completion per prompt and passes them to `on_batch` as they finish.

        The trainer's random state does not change. An exception from `on_batch` ends the batch and
        leaves nothing of it in the engine. Raises EngineDied after `close`.
        """
        with closing(self.stream(prompts, seeds, params, base)) as steps:
            for indices, completions in steps:
                if indices:
                    on_batch(indices, completions)

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        params: SamplingParams,
        base: bool,
    ) -> Generator[Finished]:
        """Yields what finishes in each step of the engine, which is often nothing. Closing the
        generator aborts the rest."""
        if self._llm is None:
            raise EngineDied("vLLM has been closed")
        wanted = None if base else self._student
        engine = self._llm.llm_engine
        unfinished: set[int] = set()
        with _random_state_kept():
            if not self._has_adapters and wanted != self._in_place:
                self._put_in_place(wanted)
            try:
                rendered = engine.renderer.render_cmpl(
                    [{"prompt_token_ids": list(prompt)} for prompt in prompts]
                )
                for index, (prompt, seed) in enumerate(zip(rendered, seeds, strict=True)):
                    engine.add_request(
                        str(index),
                        prompt,
                        self._request(params, seed),
                        lora_request=None if base else self._adapter,
                    )
                    unfinished.add(index)
                while unfinished:
                    done = [output for output in engine.step() if output.finished]
                    indices = [int(output.request_id) for output in done]
                    unfinished.difference_update(indices)
                    for index, output in zip(indices, done, strict=True):
                        assert output.prompt_token_ids == list(prompts[index]), (
                            "vLLM changed a prompt's token ids"
                        )
                    yield indices, [_completion(output.outputs[0]) for output in done]
            finally:
                if unfinished:
                    engine.abort_request([str(index) for index in unfinished])

    def _request(self, params: SamplingParams, seed: int) -> Any:
        """Builds vLLM's sampling parameters from ours, with every field set."""
        import vllm  # pyright: ignore[reportMissingImports]
        from vllm.sampling_params import (  # pyright: ignore[reportMissingImports]
            RequestOutputKind,
        )

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
            # Exactly our stop tokens end an answer; the model's own list is ignored.
            stop_token_ids=list(params.stop_token_ids),
            ignore_eos=True,
            # No alternatives; the sampled token's log-probability is always included in some.
            logprobs=0 if params.logprobs else None,
            flat_logprobs=True,
            detokenize=False,
            skip_special_tokens=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            logit_bias=biased_tokens(params, self._head_size, -math.inf) or None,
        )

    def close(self) -> None:
        """Frees the engine's memory. A second call does nothing."""
        llm, self._llm = self._llm, None
        if llm is None:
            return
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def _repack_tied_head(model: Any) -> None:
    """Repacks the head. On CPUs vLLM multiplies by a packed copy of it, which reloading tied
    embeddings does not update."""
    head = model.lm_head
    head.quant_method.process_weights_after_loading(head)


def _completion(output: Any) -> Completion:
    if output.finish_reason not in ("stop", "length"):
        raise EngineDied(f"vLLM ended a completion with {output.finish_reason!r}")
    token_ids, flat = tuple(output.token_ids), output.logprobs
    if flat is None:
        return Completion(token_ids, (), output.finish_reason == "length")
    # One entry per position, because logprobs = 0 requests only the sampled token.
    assert tuple(flat.token_ids) == token_ids, "log-probabilities of other tokens than the sampled"
    return Completion(token_ids, tuple(flat.logprobs), output.finish_reason == "length")


@contextmanager
def deaths() -> Iterator[None]:
    """Returns a context that converts the exceptions of a dead engine in this process to
    EngineDied."""
    from vllm.v1.engine.exceptions import (  # pyright: ignore[reportMissingImports]
        EngineDeadError,
    )

    try:
        yield
    except (EngineDeadError, RuntimeError) as error:
        raise EngineDied(f"{type(error).__name__}: {error}") from error
