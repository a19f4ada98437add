"""The process group of a run, and the few exchanges between its ranks.

Started by torchrun there is one process a device; started plainly there is no process group, and
every exchange below is the identity. So nothing else asks which of the two it is.
"""

import atexit
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

T = TypeVar("T")

_POLL_S = 0.01
# How long ranks wait for each other where one may have far more to do: an evaluation, a server.
_PATIENCE = timedelta(hours=12)
_BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


class _Group:
    """The process group in which ranks wait for each other; None before there is one."""

    patient: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class World:
    """This process among its peers.

    World(rank=3, size=8, local_rank=3, device=torch.device("cuda", 3))
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the run's files and talks to the user."""
        return self.rank == 0

    @property
    def writes_for_node(self) -> bool:
        """Whether this rank writes what every rank of its node reads."""
        return self.local_rank == 0


def launched_ranks() -> int:
    """The number of processes that torchrun has started for this run; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def init_world(device: torch.device) -> World:
    """Joins the ranks that torchrun started, one device each; the end of the process leaves them.

    device: the type that every rank trains on; on GPUs each takes the one of its local rank.

    Raises ValueError where a node has fewer GPUs than processes.
    """
    if launched_ranks() == 1:
        return World(0, 1, 0, device)
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"this node has {torch.cuda.device_count()} GPUs, but torchrun started a process "
                f"with local rank {local_rank}; needs one GPU a process: lower --nproc-per-node"
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
        # Tensors' exchanges keep the usual limit, by which a dead peer is noticed.
        group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        assert isinstance(group, dist.ProcessGroup), group
        _Group.patient = group
        atexit.register(close_world)
    return World(rank, launched_ranks(), local_rank, device)


def _agree_on_session(store: Store, rank: int, size: int) -> str:
    """A prefix for the store's keys that no earlier start of these processes has used.

    Processes that torchrun has started again get the store of those before, and would dial the
    addresses that they left there. Its count of restarts cannot tell the two apart: nodes whose own
    processes did not fail do not count. So each rank asks under a word of its own, which rank 0
    answers until all have come.
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
            # The word may be of an earlier start still; the answer then goes unread.
            store.set(f"answer/{store.get(f'ask/{other}').decode()}", session)
            if store.check([f"here/{session}/{other}"]):
                missing.remove(other)
        time.sleep(_POLL_S)
    return session


def close_world() -> None:
    """Leaves the process group, where there is one."""
    _Group.patient = None
    if dist.is_initialized():
        dist.destroy_process_group()


def _is_alone() -> bool:
    # vLLM in this process makes a group of its own, of one rank.
    return not dist.is_initialized() or dist.get_world_size() == 1


def barrier() -> None:
    """Waits for every rank."""
    if not _is_alone():
        dist.barrier(_Group.patient)


def gather_objects(value: T) -> list[T]:
    """Every rank's value, in the order of ranks, on every rank. Values must be picklable."""
    if _is_alone():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value, _Group.patient)
    return gathered


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank: a decision that all must take alike."""
    return any(gather_objects(flag))


def sum_over_ranks(sums: Mapping[str, float]) -> dict[str, float]:
    """Sums of the ranks' numbers by name, added in the order of ranks so that all get the same."""
    total: dict[str, float] = {}
    for rank_sums in gather_objects(dict(sums)):
        for name, value in rank_sums.items():
            total[name] = total.get(name, 0.0) + value
    return total


def raise_together(error: str | None) -> None:
    """Raises ValueError on every rank where any has an error, with the first such rank's text.

    A rank that failed alone would leave the others waiting for it for ever.
    """
    for message in gather_objects(error):
        if message is not None:
            raise ValueError(message)


def my_share(items: Sequence[T], world: World) -> list[T]:
    """This rank's part of what all ranks divide among themselves: every size-th, from its rank."""
    return list(items[world.rank :: world.size])


def merge_shares(shares: Sequence[Sequence[T]]) -> list[T]:
    """What `my_share` divided, in the order before: the shares of ranks 0, 1, ..."""
    total = sum(map(len, shares))
    return [shares[i % len(shares)][i // len(shares)] for i in range(total)]


def sum_gradients(parameters: list[Tensor]) -> None:
    """Adds up the ranks' gradients of whole parameters, in one reduction a dtype; those of sharded
    ones have been.

    A sum and not a mean: the losses are divided by the whole step's rollouts or tokens already.
    """
    parameters = [p for p in parameters if not isinstance(p, DTensor)]
    if not parameters or _is_alone():
        return
    # A rank without a rollout has no gradient, and still takes part.
    gradients = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in parameters]
    for dtype in sorted({g.dtype for g in gradients}, key=str):
        group = [g for g in gradients if g.dtype == dtype]
        flat = torch.cat([g.flatten() for g in group])
        dist.all_reduce(flat)
        for gradient, part in zip(group, flat.split([g.numel() for g in group]), strict=True):
            gradient.copy_(part.view_as(gradient))
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
