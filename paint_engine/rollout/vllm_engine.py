"""Rollouts by vLLM beside the trainer: in its process, or in one of their own on the same GPU."""

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

from paint_engine.distributed import World, raise_together
from paint_engine.model.forward import compute_dtype, lm_head_weight
from paint_engine.rollout.adapter_files import WeightFiles, WrittenWeights
from paint_engine.rollout.engine import Completion, EngineDied, SamplingParams
from paint_engine.rollout.vllm_core import Core, OnBatch, deaths, reserved_lora_rank, reserved_rank
from paint_engine.rollout.vllm_process import OwnProcess

T = TypeVar("T")

# The most tokens that one forward pass takes. vLLM's own default grows with the GPU, and its
# start-up measures the memory of a pass of that size, which the trainer then lacks.
_MAX_BATCHED_TOKENS = 4096
# vLLM refuses a higher one.
_MAX_TEMPERATURE = 2.0


@dataclass(frozen=True)
class StoredModel:
    """A model that nothing trains, as the files that vLLM reads by itself.

    StoredModel(head_size=151936, dtype=torch.bfloat16, tokenizer="Qwen/Qwen3-8B",
                adapter=Path("runs/a/checkpoints/step-100"), lora_rank=64)

    tokenizer: where the tokenizer is; nothing is decoded by it.
    adapter: peft's files, of rank `lora_rank`, safetensors; None = the model alone.
    """

    head_size: int
    dtype: torch.dtype
    tokenizer: str
    adapter: Path | None
    lora_rank: int

    def write(self, weights_version: int) -> WrittenWeights:
        """The files as they are."""
        assert self.adapter is not None, "there is no adapter to load"
        return WrittenWeights("adapter", 1, self.adapter)

    def close(self) -> None:
        """The files stay."""


class VllmEngine:
    """vLLM beside the trainer; see `rollout.RolloutEngine`. In the trainer's process where that is
    the only one; of several, each has an engine in a process beside it, or is a worker of one that
    is spread over them.

    model: the student, a PeftModel or, with all of it trained, a causal language model; or a
        `StoredModel`, for evaluations without a trainer. One without an adapter needs no `sync`,
        and is sampled from with base=True.
    model_path: what it was loaded from.
    max_model_len: the longest prompt and completion together, in tokens.
    max_sequences: how many are decoded at once; vLLM has one such limit, so that it holds for
        evaluations as it does for rollouts.
    gpu_memory_utilization: share of the GPU's memory (on CPUs of the node's, over all its ranks).
    tensor_parallel_size: consecutive ranks of a node that one engine is spread over; they must
        call `generate` together. One process with a `StoredModel` starts vLLM's own workers.
    own_process: the engine runs beside this process even if that is the only one, so that it
        generates while this one trains; not with an engine over several ranks.

    Building it and `sync` are collectives of all ranks. Raises ValueError where the settings and
    the ranks do not fit, and where vLLM does not start.
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
    ) -> None:
        stored = isinstance(model, StoredModel)
        # vLLM's own workers are alone with their GPUs only where no trainer shares them.
        own_workers = stored and world.size == 1 and tensor_parallel_size > 1
        if not own_workers:
            _check_ranks(world, tensor_parallel_size, own_process)
        self._world = world
        # One inside several ranks could not be built anew without the others.
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
            # Else the model's generation settings would fill in what a request leaves out.
            "generation_config": "vllm",
            # Of the distribution that was drawn from: after temperature, top-k and top-p.
            "logprobs_mode": "processed_logprobs",
            "seed": 0,
            "gpu_memory_utilization": gpu_memory_utilization,
            **_batch_args(world, max_model_len, max_sequences),
            **_adapter_args(model),
        }
        if tensor_parallel_size > 1:
            self._llm_args["tensor_parallel_size"] = tensor_parallel_size
            # Ranks are vLLM's workers: the engine joins the trainer's process group and GPU.
            backend = "mp" if own_workers else "external_launcher"
            self._llm_args["distributed_executor_backend"] = backend
        self._files = model if stored else WeightFiles(model, world, adapter_dir, per_node=True)
        self._written: WrittenWeights | None = None
        self._core = self._first_core()

    def sync(self, weights_version: int) -> None:
        """Writes the weights of this moment to files and has the engine read them."""
        self._written = self._files.write(weights_version)
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
        """One completion a prompt, in their order; `on_batch` gets them as they finish. What it
        raises ends the batch; with an engine over several ranks only at its end, for these go
        through each step together."""
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
    def can_restart(self) -> bool:
        """Whether `restart` may succeed. An engine over several ranks can only be built by all of
        them, and the others do not know of its death."""
        return self._group_size == 1

    def restart(self) -> None:
        """Builds the engine anew, with the weights of the last `sync`.

        Raises EngineDied where it dies again, and where not `can_restart`.
        """
        if not self.can_restart:
            raise EngineDied(
                f"an engine over {self._group_size} ranks cannot be built anew by one of them; "
                "start the run again (torchrun --max-restarts does), or give every rank an engine "
                "with --rollout.tensor_parallel_size 1"
            )
        self._alive(lambda core: core.close())
        self._core = self._build()
        if self._written is not None:
            self._alive(lambda core: core.load(self._current()))

    def close(self) -> None:
        """Ends the engine and deletes its files."""
        try:
            self._core.close()
        finally:
            self._files.close()

    def _first_core(self) -> Core | OwnProcess:
        core, error = None, None
        try:
            core = self._build()
        except EngineDied as death:
            error = (
                f"vLLM did not start on rank {self._world.rank} ({death}); if it is a matter of "
                "memory, change --rollout.gpu_memory_utilization or --rollout.max_sequences; or "
                "use --rollout.engine builtin"
            )
        # Ranks that are vLLM's own workers wait inside it for the one that failed: it ends alone.
        if error is not None and self._group_size > 1:
            raise ValueError(error)
        try:
            raise_together(error)
        except ValueError:
            self._files.close()
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
                f"{params.max_new_tokens}; the engine was built for {room} together; lower "
                "max_new_tokens, or leave out longer problems"
            )

    def _current(self) -> WrittenWeights:
        assert self._written is not None
        return self._written

    def _alive(self, ask: Callable[[Any], T]) -> T:
        if self._own_process:
            return ask(self._core)
        with deaths():
            return ask(self._core)

    def _gather(self, share: T) -> list[T]:
        """The shares of the ranks that this engine is spread over: all must be given all."""
        if self._group_size == 1:
            return [share]
        from vllm.distributed.parallel_state import (  # pyright: ignore[reportMissingImports]
            get_tp_group,
        )

        shares: list[Any] = [None] * self._group_size
        dist.all_gather_object(shares, share, group=get_tp_group().cpu_group)
        return shares


def own_environment(world: World) -> dict[str, str]:
    """What the engine's process of this rank has in its environment instead of the trainer's."""
    environment = {}
    if world.device.type == "cuda":
        listed = os.environ.get("CUDA_VISIBLE_DEVICES")
        index = world.local_rank
        environment["CUDA_VISIBLE_DEVICES"] = (
            listed.split(",")[index].strip() if listed else str(index)
        )
    if world.size > 1:
        # Each takes itself for rank 0, whose compiled code all would write to the same files.
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        root = os.environ.get("VLLM_CACHE_ROOT") or os.path.join(cache, "vllm")
        environment["VLLM_CACHE_ROOT"] = os.path.join(root, f"rank-{world.rank}")
    return environment


class _GivenUp(Exception):
    """What `on_batch` has raised ends a batch."""


class _Finished:
    """The completions of an engine's batch so far.

    mine: the places of this rank's requests in the batch; `on_batch` counts from their first.
    to_the_end: what `on_batch` raises waits for the end of the batch.
    """

    def __init__(self, mine: range, on_batch: OnBatch | None, to_the_end: bool) -> None:
        self._mine = mine
        self._on_batch = on_batch
        self._to_the_end = to_the_end
        self._failure: Exception | None = None
        self._completions: dict[int, Completion] = {}

    def add(self, indices: list[int], completions: list[Completion]) -> None:
        """Takes what has finished, and tells of what is this rank's."""
        found = {i: c for i, c in zip(indices, completions, strict=True) if i in self._mine}
        self._completions |= found
        if self._on_batch is None or not found or self._failure is not None:
            return
        try:
            self._on_batch([i - self._mine.start for i in found], list(found.values()))
        except Exception as failure:
            # Kept from what takes a RuntimeError for the engine's death.
            self._failure = failure
            if not self._to_the_end:
                raise _GivenUp from failure

    def all(self) -> list[Completion]:
        """This rank's completions, in the requests' order."""
        if self._failure is not None:
            raise self._failure
        return [self._completions[index] for index in self._mine]


def _batch_args(world: World, max_model_len: int, max_sequences: int) -> dict[str, Any]:
    arguments = {"max_model_len": max_model_len, "max_num_seqs": max_sequences}
    at_once = max(_MAX_BATCHED_TOKENS, max_sequences)
    if world.device.type != "cpu":
        return arguments | {"max_num_batched_tokens": at_once}
    # A seeded request whose prompt is cut in two ends vLLM there: it would turn back the random
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


def _check_ranks(world: World, tensor_parallel_size: int, own_process: bool) -> None:
    if tensor_parallel_size == 1:
        return
    on_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if on_node % tensor_parallel_size:
        raise ValueError(
            f"rollout.tensor_parallel_size is {tensor_parallel_size} with {on_node} processes on "
            f"this node ({world.size} in all); needs a number that divides the node's; change it, "
            "or torchrun's --nproc-per-node"
        )
    if own_process:
        raise ValueError(
            f"rollout.tensor_parallel_size is {tensor_parallel_size} with rollout.ahead 1, whose "
            "engines have a process and a GPU each; set one of the two back (to 1, or to 0)"
        )
