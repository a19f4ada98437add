"""Rollouts by vLLM next to the trainer: in its process, or in a separate process on the same
GPU."""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import nn
from transformers import PreTrainedConfig

from paint_engine.distributed import World, raise_together
from paint_engine.model import causal_lm, compute_dtype, lm_head_weight
from paint_engine.model.stored import refuse_prefixes
from paint_engine.rollout.engine import Completion, EngineDied, SamplingParams
from paint_engine.rollout.vllm_core import Core, OnBatch, deaths, reserved_lora_rank, reserved_rank
from paint_engine.rollout.vllm_process import OwnProcess
from paint_engine.rollout.weights import (
    SharedWeights,
    WeightFiles,
    WeightMemory,
    WrittenWeights,
    has_shared_memory,
)

T = TypeVar("T")

# The maximum number of tokens per forward pass. vLLM's own default grows with the GPU. Its start-up
# reserves the memory of a pass of that size, which the trainer then lacks.
_MAX_BATCHED_TOKENS = 4096
# vLLM refuses higher temperatures.
_MAX_TEMPERATURE = 2.0


@dataclass(frozen=True)
class StoredModel:
    """A model that is not being trained, as files that vLLM reads by itself.

    StoredModel(head_size=151936, dtype=torch.bfloat16, tokenizer="Qwen/Qwen3-8B",
                adapter=Path("runs/a/checkpoints/step-100"), lora_rank=64)

    tokenizer: path or name of the tokenizer; nothing is decoded with it.
    adapter: peft's files, of rank `lora_rank`, in safetensors; None = the model alone.
    """

    head_size: int
    dtype: torch.dtype
    tokenizer: str
    adapter: Path | None
    lora_rank: int

    def write(self, weights_version: int) -> WrittenWeights:
        """Returns the existing files."""
        assert self.adapter is not None, "there is no adapter to load"
        return WrittenWeights("adapter", 1, self.adapter)

    def close(self) -> None:
        """Does nothing: the files stay."""


class VllmEngine:
    """vLLM next to the trainer; see `rollout.engine.RolloutEngine`.

    With one process, the engine runs in the trainer's process. With several, each process either
    has an engine in a separate process, or is a worker of an engine that spans several of them.

    model: the student, which is a PeftModel or, with all weights trained, a causal language model;
        or a `StoredModel`, for evaluations without a trainer. One without an adapter needs no
        `sync`, and is sampled with base=True.
    model_path: the path or name that the model was loaded from.
    max_model_len: maximum number of tokens of a prompt and its completion together.
    max_sequences: number of sequences that are decoded at once. vLLM has one such limit, so it
        holds for evaluations as well as for rollouts.
    gpu_memory_utilization: share of the GPU's memory (on CPUs, of the node's memory over all its
        ranks).
    tensor_parallel_size: number of consecutive ranks of a node that one engine spans; they must
        call `generate` together. A single process with a `StoredModel` starts vLLM's own workers.
    adapter_dir: where the weights are handed over as files; None = adapters in files in shared
        memory, a whole model in memory without files.
    own_process: a single process also runs the engine in a separate process, so that it generates
        while the trainer trains. Not with an engine over several ranks.
    memory_keys: what to change if vLLM does not start for lack of memory.

    The constructor and `sync` are collective calls. The constructor raises ValueError if the
    settings do not match the ranks, and if vLLM does not start.
    """

    def __init__(
        self,
        model: nn.Module | StoredModel,
        model_path: str,
        world: World,
        *,
        max_model_len: int,
        max_sequences: int,
        gpu_memory_utilization: float,
        tensor_parallel_size: int = 1,
        adapter_dir: str | None = None,
        trust_remote_code: bool = False,
        own_process: bool = False,
        memory_keys: str = "--rollout.gpu_memory_utilization or --rollout.max_sequences",
    ) -> None:
        refuse_prefixes(model_path)
        stored = isinstance(model, StoredModel)
        # vLLM's own workers need the GPUs for themselves, which holds only without a trainer.
        own_workers = stored and world.size == 1 and tensor_parallel_size > 1
        if not own_workers:
            _check_ranks(world, tensor_parallel_size, own_process)
        if not stored:
            check_heads(causal_lm(model).config, tensor_parallel_size)
        self._world = world
        # An engine inside several ranks could not be rebuilt by one of them alone.
        self._own_process = own_process or (world.size > 1 and tensor_parallel_size == 1)
        self._group_size = 1 if own_workers else tensor_parallel_size
        self._head_size = model.head_size if stored else lm_head_weight(model).shape[0]
        dtype = model.dtype if stored else compute_dtype(model)
        if world.device.type == "cpu":
            gpu_memory_utilization /= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self._llm_args: dict[str, Any] = {
            "model": model_path,
            "trust_remote_code": trust_remote_code,
            "dtype": str(dtype).removeprefix("torch."),
            # Otherwise the model's generation settings would fill in what a request leaves out.
            "generation_config": "vllm",
            # Log-probabilities under the sampled distribution: after temperature, top-k and top-p.
            "logprobs_mode": "processed_logprobs",
            "seed": 0,
            "gpu_memory_utilization": gpu_memory_utilization,
            **_batch_args(world, max_model_len, max_sequences),
            **_adapter_args(model),
        }
        if tensor_parallel_size > 1:
            self._llm_args["tensor_parallel_size"] = tensor_parallel_size
            # The ranks are vLLM's workers: the engine joins the trainer's process group and GPU.
            backend = "mp" if own_workers else "external_launcher"
            self._llm_args["distributed_executor_backend"] = backend
        self._memory_keys = memory_keys
        self._weights = model if stored else _way_of(model, world, adapter_dir)
        self._written: WrittenWeights | SharedWeights | None = None
        self._core = self._first_core()

    def sync(self, weights_version: int) -> None:
        """Hands the student's current weights to the engine. A collective call."""
        self._written = self._weights.write(weights_version)
        self._alive(lambda core: core.load(self._current()))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        params: SamplingParams,
        *,
        base: bool = False,
        on_batch: Callable[[list[int], list[Completion]], None] | None = None,
    ) -> list[Completion]:
        """Returns one completion per prompt, in their order; `on_batch` gets them as they finish.

        An exception from `on_batch` ends the batch. With an engine over several ranks it is raised
        only at the end of the batch, because these ranks run each step together.
        """
        assert len(prompts) == len(seeds)
        assert base or self._written is not None, "sync comes before generate"
        self._check(prompts, params)
        shares = self._gather((list(prompts), list(seeds)))
        place = self._world.rank % self._group_size
        first = sum(len(share[0]) for share in shares[:place])
        all_prompts = [prompt for share in shares for prompt in share[0]]
        all_seeds = [seed for share in shares for seed in share[1]]
        if not all_prompts:
            return []
        finished = _Finished(range(first, first + len(prompts)), on_batch, self._group_size > 1)
        with suppress(_GivenUp):
            self._alive(
                lambda core: core.generate(all_prompts, all_seeds, params, base, finished.add)
            )
        return finished.all()

    @property
    def always_has_logprobs(self) -> bool:
        """False: vLLM computes them in a pass of their own."""
        return False

    @property
    def can_restart(self) -> bool:
        """Whether this rank can rebuild the engine on its own. An engine over several ranks must be
        built by all of them, and the other ranks do not know that it died."""
        return self._group_size == 1

    def pause(self) -> None:
        """Ends the engine until `restart`. One in a process of its own leaves no memory behind."""
        self._alive(lambda core: core.close())

    def restart(self) -> None:
        """Rebuilds the engine with the weights of the last `sync`.

        Raises EngineDied if it dies again, or if not `can_restart`.
        """
        if not self.can_restart:
            raise EngineDied(
                f"one rank cannot rebuild an engine over {self._group_size} ranks; restart the run "
                "(torchrun --max-restarts does), or give every rank its own engine with "
                "--rollout.tensor_parallel_size 1"
            )
        self._alive(lambda core: core.close())
        self._core = self._build()
        if self._written is not None:
            self._alive(lambda core: core.load(self._current()))

    def close(self) -> None:
        """Stops the engine, and deletes the files or frees the memory of the weights."""
        try:
            self._core.close()
        finally:
            self._weights.close()

    def _first_core(self) -> Core | OwnProcess:
        core, error = None, None
        try:
            core = self._build()
        except EngineDied as death:
            error = (
                f"vLLM did not start on rank {self._world.rank} ({death}); if memory is the cause, "
                f"change {self._memory_keys}; or use --rollout.engine builtin"
            )
        # Ranks that are vLLM's own workers wait inside vLLM for the rank that failed, so this rank
        # raises alone.
        if error is not None and self._group_size > 1:
            raise ValueError(error)
        try:
            raise_together(error)
        except ValueError:
            self._weights.close()
            if core is not None:
                core.close()
            raise
        assert core is not None
        return core

    def _build(self) -> Core | OwnProcess:
        if self._own_process:
            return OwnProcess(self._llm_args, self._head_size, own_environment(self._world))
        return Core(self._llm_args, self._head_size)

    def _check(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> None:
        if params.temperature > _MAX_TEMPERATURE:
            raise ValueError(
                f"the sampling temperature is {params.temperature}; vLLM takes at most "
                f"{_MAX_TEMPERATURE}; lower it, or use --rollout.engine builtin"
            )
        longest, room = max(map(len, prompts), default=0), self._llm_args["max_model_len"]
        if longest + params.max_new_tokens > room:
            raise ValueError(
                f"a prompt has {longest} tokens and its completion may have "
                f"{params.max_new_tokens}; the engine was built for {room} in total; lower "
                "max_new_tokens, or leave out longer problems"
            )

    def _current(self) -> WrittenWeights | SharedWeights:
        assert self._written is not None
        return self._written

    def _alive(self, ask: Callable[[Any], T]) -> T:
        if self._own_process:
            return ask(self._core)
        with deaths():
            return ask(self._core)

    def _gather(self, share: T) -> list[T]:
        """Returns the shares of the ranks that this engine spans; each rank must pass all of them
        to vLLM."""
        if self._group_size == 1:
            return [share]
        from vllm.distributed.parallel_state import (  # pyright: ignore[reportMissingImports]
            get_tp_group,
        )

        shares: list[Any] = [None] * self._group_size
        dist.all_gather_object(shares, share, group=get_tp_group().cpu_group)
        return shares


def _way_of(model: nn.Module, world: World, adapter_dir: str | None) -> WeightFiles | WeightMemory:
    """Returns how the weights get to the engines: vLLM takes adapters as files alone."""
    if isinstance(model, PeftModel) or adapter_dir is not None or not has_shared_memory():
        return WeightFiles(model, world, adapter_dir, per_node=True)
    return WeightMemory(model, world)


def own_environment(world: World) -> dict[str, str]:
    """Returns the variables that this rank's engine process has instead of the trainer's."""
    environment = {}
    if world.device.type == "cuda":
        listed = os.environ.get("CUDA_VISIBLE_DEVICES")
        index = world.local_rank
        environment["CUDA_VISIBLE_DEVICES"] = (
            listed.split(",")[index].strip() if listed else str(index)
        )
    if world.size > 1:
        # Each engine acts as rank 0. Without this, all would write their compiled code to the same
        # files.
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        root = os.environ.get("VLLM_CACHE_ROOT") or os.path.join(cache, "vllm")
        environment["VLLM_CACHE_ROOT"] = os.path.join(root, f"rank-{world.rank}")
    return environment


class _GivenUp(Exception):
    """An exception from `on_batch` ends the batch."""


class _Finished:
    """The completions of an engine's batch so far.

    mine: the places of this rank's requests in the batch; `on_batch` counts from the first of them.
    to_the_end: an exception from `on_batch` is raised only at the end of the batch.
    """

    def __init__(self, mine: range, on_batch: OnBatch | None, to_the_end: bool) -> None:
        self._mine = mine
        self._on_batch = on_batch
        self._to_the_end = to_the_end
        self._failure: Exception | None = None
        self._completions: dict[int, Completion] = {}

    def add(self, indices: list[int], completions: list[Completion]) -> None:
        """Stores finished completions and passes this rank's to `on_batch`."""
        found = {i: c for i, c in zip(indices, completions, strict=True) if i in self._mine}
        self._completions |= found
        if self._on_batch is None or not found or self._failure is not None:
            return
        try:
            self._on_batch([i - self._mine.start for i in found], list(found.values()))
        except Exception as failure:
            # Stored, because the caller treats a RuntimeError as the engine's death.
            self._failure = failure
            if not self._to_the_end:
                raise _GivenUp from failure

    def all(self) -> list[Completion]:
        """Returns this rank's completions in the order of its requests."""
        if self._failure is not None:
            raise self._failure
        return [self._completions[index] for index in self._mine]


def _batch_args(world: World, max_model_len: int, max_sequences: int) -> dict[str, Any]:
    arguments = {"max_model_len": max_model_len, "max_num_seqs": max_sequences}
    at_once = max(_MAX_BATCHED_TOKENS, max_sequences)
    if world.device.type != "cpu":
        return arguments | {"max_num_batched_tokens": at_once}
    # vLLM fails if it splits the prompt of a seeded request, because it rewinds the random
    # generator, which CPU generators cannot do.
    uncut = {"enable_chunked_prefill": False, "max_num_batched_tokens": max(at_once, max_model_len)}
    return arguments | uncut


def _adapter_args(model: nn.Module | StoredModel) -> dict[str, Any]:
    if isinstance(model, StoredModel):
        rank = None if model.adapter is None else reserved_rank(model.lora_rank)
        arguments: dict[str, Any] = {"tokenizer": model.tokenizer}
    else:
        rank = reserved_lora_rank(model) if isinstance(model, PeftModel) else None
        arguments = {}
    if rank is None:
        return arguments | {"enable_lora": False}
    return arguments | {
        "enable_lora": True,
        "max_lora_rank": rank,
        "max_loras": 1,
        "max_cpu_loras": 1,
    }


def check_heads(config: PreTrainedConfig, tensor_parallel_size: int) -> None:
    """Raises ValueError unless the GPUs of an engine can share the model's attention heads evenly.
    vLLM copies key-value heads to several GPUs where there are fewer of them."""
    text = config.get_text_config()
    # Models without attention have none.
    num_heads = getattr(text, "num_attention_heads", 0)
    num_keys = getattr(text, "num_key_value_heads", None) or num_heads
    size = tensor_parallel_size
    if num_heads % size or (num_keys % size and size % num_keys):
        raise ValueError(
            f"rollout.tensor_parallel_size is {size} with {num_heads} attention heads and "
            f"{num_keys} key-value heads; needs a divisor of the first, and of the second a "
            "divisor or a multiple; change it, or use 1 (an engine for each GPU)"
        )


def _check_ranks(world: World, tensor_parallel_size: int, own_process: bool) -> None:
    if tensor_parallel_size == 1:
        return
    on_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if on_node % tensor_parallel_size:
        raise ValueError(
            f"rollout.tensor_parallel_size is {tensor_parallel_size} with {on_node} processes on "
            f"this node ({world.size} in total); needs a divisor of the number on a node; change "
            "it, or torchrun's --nproc-per-node"
        )
    if own_process:
        raise ValueError(
            f"rollout.tensor_parallel_size is {tensor_parallel_size} with rollout.ahead 1, under "
            "which each engine has its own process and GPU; use --rollout.tensor_parallel_size 1 "
            "or --rollout.ahead 0"
        )
