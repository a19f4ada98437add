"""The process group of a run, and the collective calls of its ranks.

torchrun starts one process per device. A run without torchrun has no process group, and every
function below is then the identity, so no other module distinguishes the two cases.
"""

import atexit
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

T = TypeVar("T")

_POLL_S = 0.01
# Python objects use a separate gloo group with this timeout, because one rank may have far more to
# do than the others: its share of an evaluation, the start of a server. Tensors keep the default
# timeout.
_OBJECT_TIMEOUT = timedelta(hours=12)
_BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


class _Groups:
    """The group for Python objects and barriers; None without torchrun."""

    objects: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class World:
    """This process and its place among the ranks.

    World(rank=3, size=8, local_rank=3, device=torch.device("cuda", 3))
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the run's files and prints."""
        return self.rank == 0

    @property
    def writes_for_node(self) -> bool:
        """Whether this rank writes the files that every rank of its node reads."""
        return self.local_rank == 0


def launched_ranks() -> int:
    """Returns the number of processes that torchrun started for this run; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    """Returns this process's rank among those that torchrun started; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def init_world(device: torch.device) -> World:
    """Joins the process group of the ranks that torchrun started, until this process ends.

    device: only its type is used. On GPUs, each rank uses the GPU of its local rank.

    Raises ValueError if a node has fewer GPUs than processes.
    """
    if launched_ranks() == 1:
        return World(0, 1, 0, device)
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"this node has {torch.cuda.device_count()} GPUs, but torchrun started a process "
                f"with local rank {local_rank}; needs one GPU per process; lower --nproc-per-node"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        store, rank, size = next(rendezvous("env://"))
        session = _agree_on_session(store, rank, size)
        dist.init_process_group(
            _BACKENDS[device.type],
            store=PrefixStore(session, store),
            rank=rank,
            world_size=size,
        )
        # Tensors do not use this group: their shorter timeout detects a dead peer.
        group = dist.new_group(backend="gloo", timeout=_OBJECT_TIMEOUT)
        assert isinstance(group, dist.ProcessGroup), group
        _Groups.objects = group
        atexit.register(close_world)
    return World(rank, launched_ranks(), local_rank, device)


def _agree_on_session(store: Store, rank: int, size: int) -> str:
    """Returns a prefix for the store's keys that no earlier start of these processes has used.

    Processes that torchrun restarts get the store of their predecessors, and would connect to the
    addresses left there. torchrun's restart count does not distinguish the two starts, because a
    node whose own processes did not fail does not increase it. Each rank therefore asks with a
    random word, and rank 0 answers until all ranks have the prefix.
    """
    if rank > 0:
        word = secrets.token_hex(8)
        store.set(f"ask/{rank}", word)
        session = store.get(f"answer/{word}").decode()
        store.set(f"here/{session}/{rank}", "")
        return session
    session, missing = secrets.token_hex(8), set(range(1, size))
    while missing:
        for other in tuple(missing):
            # The word may be an earlier start's; then nobody reads the answer.
            store.set(f"answer/{store.get(f'ask/{other}').decode()}", session)
            if store.check([f"here/{session}/{other}"]):
                missing.remove(other)
        time.sleep(_POLL_S)
    return session


def close_world() -> None:
    """Leaves the process group, if there is one."""
    _Groups.objects = None
    if dist.is_initialized():
        dist.destroy_process_group()


def _is_alone() -> bool:
    # vLLM in this process creates its own group of one rank.
    return not dist.is_initialized() or dist.get_world_size() == 1


def barrier() -> None:
    """Waits for every rank. A collective call."""
    if not _is_alone():
        dist.barrier(_Groups.objects)


def gather_objects(value: T) -> list[T]:
    """Returns every rank's value, in rank order, on every rank. Values must be picklable. A
    collective call."""
    if _is_alone():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value, _Groups.objects)
    return gathered


def any_rank(flag: bool) -> bool:
    """Returns whether the flag is set on any rank, so all ranks decide alike. A collective call."""
    return any(gather_objects(flag))


def sum_over_ranks(sums: Mapping[str, float]) -> dict[str, float]:
    """Returns sums of the ranks' numbers by name. They are added in rank order, so every rank gets
    the same result. A collective call."""
    total: dict[str, float] = {}
    for rank_sums in gather_objects(dict(sums)):
        for name, value in rank_sums.items():
            total[name] = total.get(name, 0.0) + value
    return total


def raise_together(error: str | Exception | None) -> None:
    """Raises on every rank if any rank has an error: the lowest such rank's, or ValueError with its
    text.

    A collective call. If one rank raised alone, the others would wait for it.
    """
    for found in gather_objects(error):
        if found is not None:
            raise found if isinstance(found, Exception) else ValueError(found)


def together(attempt: Callable[[], T], kinds: tuple[type[Exception], ...]) -> T:
    """Returns this rank's value; if any rank's attempt raised one of these kinds, raises the lowest
    such rank's on every rank. Their arguments must be picklable. A collective call."""
    value, failure = None, None
    try:
        value = attempt()
    except kinds as error:
        failure = error
    raise_together(failure)
    return cast(T, value)


def my_share(items: Sequence[T], world: World) -> list[T]:
    """Returns this rank's share of the items: every `world.size`-th, starting at its rank."""
    return list(items[world.rank :: world.size])


def merge_shares(shares: Sequence[Sequence[T]]) -> list[T]:
    """Undoes `my_share`: returns the items in their original order, from the shares of ranks 0, 1,
    ..."""
    total = sum(map(len, shares))
    return [shares[i % len(shares)][i // len(shares)] for i in range(total)]


def sum_gradients(parameters: list[Tensor]) -> None:
    """Sums the ranks' gradients of unsharded parameters, with one reduction per dtype. FSDP has
    already reduced those of sharded parameters. A collective call.

    It is a sum and not a mean, because the losses are divided by global counts of rollouts or
    tokens.
    """
    parameters = [p for p in parameters if not isinstance(p, DTensor)]
    if not parameters or _is_alone():
        return
    # A rank without a rollout has no gradient and still takes part.
    gradients = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in parameters]
    for dtype in sorted({g.dtype for g in gradients}, key=str):
        group = [g for g in gradients if g.dtype == dtype]
        flat = torch.cat([g.flatten() for g in group])
        dist.all_reduce(flat)
        for gradient, part in zip(group, flat.split([g.numel() for g in group]), strict=True):
            gradient.copy_(part.view_as(gradient))
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
