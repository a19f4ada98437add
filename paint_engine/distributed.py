"""The process group of a run, and the collective calls of its ranks.

Under torchrun there is one process per device. Without torchrun there is no process group, and
every function below is the identity, so callers need not distinguish the two cases.
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
# Timeout of collective calls on Python objects. One rank may have far more to do than the others,
# such as an evaluation or the start of a server.
_PATIENCE = timedelta(hours=12)
_BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


class _Group:
    """The gloo group for Python objects, with a 12-hour timeout; None before `init_world`."""

    patient: dist.ProcessGroup | None = None


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
        """Whether this rank writes the run's files and prints to the console."""
        return self.rank == 0

    @property
    def writes_for_node(self) -> bool:
        """Whether this rank writes the files that every rank of its node reads."""
        return self.local_rank == 0


def launched_ranks() -> int:
    """Returns the number of processes that torchrun started for this run; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def init_world(device: torch.device) -> World:
    """Joins the ranks that torchrun started, one device each. At exit the process leaves the group.

    device: the type of device that every rank trains on. On GPUs, each rank uses the one of its
    local rank.

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
        # Python objects use a separate gloo group with a 12-hour timeout. Collective calls on
        # tensors keep the default timeout, which detects a dead peer.
        group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        assert isinstance(group, dist.ProcessGroup), group
        _Group.patient = group
        atexit.register(close_world)
    return World(rank, launched_ranks(), local_rank, device)


def _agree_on_session(store: Store, rank: int, size: int) -> str:
    """Returns a prefix for the store's keys that no earlier start of these processes has used.

    Processes that torchrun restarts get the store of the earlier ones, and would connect to the
    addresses in it. torchrun's count of restarts cannot distinguish the two starts, because nodes
    whose own processes did not fail do not increase it. Each rank therefore writes a random word,
    and rank 0 answers these words until all ranks have arrived.
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
            # The word may be from an earlier start; nobody reads the answer to it.
            store.set(f"answer/{store.get(f'ask/{other}').decode()}", session)
            if store.check([f"here/{session}/{other}"]):
                missing.remove(other)
        time.sleep(_POLL_S)
    return session


def close_world() -> None:
    """Leaves the process group if there is one."""
    _Group.patient = None
    if dist.is_initialized():
        dist.destroy_process_group()


def _is_alone() -> bool:
    # vLLM in this process creates its own group of one rank.
    return not dist.is_initialized() or dist.get_world_size() == 1


def barrier() -> None:
    """Waits for every rank. A collective call."""
    if not _is_alone():
        dist.barrier(_Group.patient)


def gather_objects(value: T) -> list[T]:
    """Returns every rank's value, in the order of ranks, on every rank. Values must be picklable. A
    collective call."""
    if _is_alone():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value, _Group.patient)
    return gathered


def any_rank(flag: bool) -> bool:
    """Returns whether the flag is set on any rank, so that all ranks decide alike. A collective
    call."""
    return any(gather_objects(flag))


def sum_over_ranks(sums: Mapping[str, float]) -> dict[str, float]:
    """Returns the sums of the ranks' numbers by name. They are added in the order of ranks, so all
    ranks get the same result. A collective call."""
    total: dict[str, float] = {}
    for rank_sums in gather_objects(dict(sums)):
        for name, value in rank_sums.items():
            total[name] = total.get(name, 0.0) + value
    return total


def raise_together(error: str | None) -> None:
    """Raises ValueError on every rank if any rank has an error, with the first such rank's text.

    A collective call. If a rank failed alone, the others would wait for it forever.
    """
    for message in gather_objects(error):
        if message is not None:
            raise ValueError(message)


def my_share(items: Sequence[T], world: World) -> list[T]:
    """Returns this rank's part of items that all ranks share: every size-th, starting at its
    rank."""
    return list(items[world.rank :: world.size])


def merge_shares(shares: Sequence[Sequence[T]]) -> list[T]:
    """Restores the order of items that `my_share` divided, from the shares of ranks 0, 1, ..."""
    total = sum(map(len, shares))
    return [shares[i % len(shares)][i // len(shares)] for i in range(total)]


def sum_gradients(parameters: list[Tensor]) -> None:
    """Sums the ranks' gradients of unsharded parameters, with one reduction per dtype. FSDP has
    already summed those of sharded parameters. A collective call.

    It is a sum and not a mean, because the losses are already divided by the rollouts or tokens of
    the whole step.
    """
    parameters = [p for p in parameters if not isinstance(p, DTensor)]
    if not parameters or _is_alone():
        return
    # A rank without rollouts has no gradient, and still takes part.
    gradients = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in parameters]
    for dtype in sorted({g.dtype for g in gradients}, key=str):
        group = [g for g in gradients if g.dtype == dtype]
        flat = torch.cat([g.flatten() for g in group])
        dist.all_reduce(flat)
        for gradient, part in zip(group, flat.split([g.numel() for g in group]), strict=True):
            gradient.copy_(part.view_as(gradient))
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
