"""Whether the ranks of a run reach each other, pair by pair: for `--dry-run` under torchrun.

The process group of a run connects all ranks at once, and waits for minutes where two of them do
not reach each other. Here each pair has a group of its own and a short time.
"""

import fcntl
import json
import os
import secrets
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from paint_engine.distributed import launched_rank, launched_ranks

_JOIN_S = 60.0
"""until every rank has started; ranks on a busy file system import for long"""
_PING_S = 10.0
"""for the connection of one pair"""
_NUM_NAMED = 8
_SIOCGIFADDR = 0x8915
"""Linux's request for an interface's IPv4 address"""


def started_by_torchrun() -> bool:
    """Returns whether this process is one of several ranks that can meet. `WORLD_SIZE` alone only
    tells an estimate how many there will be."""
    return launched_ranks() > 1 and {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def rounds(size: int) -> Iterator[list[tuple[int, int]]]:
    """Yields every pair of `size` ranks once, in rounds of pairs that share no rank.

    >>> list(rounds(4))
    [[(0, 3), (1, 2)], [(2, 3), (0, 1)], [(1, 3), (0, 2)]]
    """
    even = size + size % 2
    for turn in range(even - 1):
        # The circle method: one stays, the others move on by one place.
        seats = [(place - turn) % (even - 1) for place in range(even - 1)] + [even - 1]
        pairs = ((seats[i], seats[even - 1 - i]) for i in range(even // 2))
        yield [(min(pair), max(pair)) for pair in pairs if max(pair) < size]


def _address(interface: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("256s", interface.encode()[:15])
        return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24])


def describe_interfaces() -> str:
    """Returns in words this host's name, and the interface and address that gloo and NCCL use.

    Gloo takes the interface of GLOO_SOCKET_IFNAME, else the address that the host's name has. NCCL
    chooses by itself, among those of NCCL_SOCKET_IFNAME if that is set.
    """
    host, given = socket.gethostname(), os.environ.get("GLOO_SOCKET_IFNAME")
    try:
        if given:
            gloo = f"{_address(given.split(',')[0])} on {given} (GLOO_SOCKET_IFNAME)"
        else:
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]
            gloo = f"{found}, the address of its name (GLOO_SOCKET_IFNAME is not set)"
    except OSError as error:
        there = ", ".join(name for _, name in socket.if_nameindex())
        what = f"GLOO_SOCKET_IFNAME {given}" if given else "its own name"
        gloo = f"{what} has no address ({error.strerror}); its interfaces are {there}"
    nccl = os.environ.get("NCCL_SOCKET_IFNAME")
    return f"host {host}, gloo: {gloo}; NCCL_SOCKET_IFNAME " + (nccl or "is not set")


def _sum_of_pair(backend: str, store: Store, place: int, device: torch.device) -> str | None:
    """Adds up a number of each of two ranks; what failed, in words. place: 0 or 1."""
    limit = timedelta(seconds=_PING_S)
    # The stubs of these classes lack their collectives.
    group: Any
    try:
        number = torch.tensor([place + 1.0], device=device)
        if backend == "gloo":
            group = dist.ProcessGroupGloo(store, place, 2, limit)
        else:
            # NCCL's watchdog would end this process before it can tell.
            os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = limit
            group = dist.ProcessGroupNCCL(store, place, 2, options)
        group.allreduce([number]).wait()
    except RuntimeError as error:
        # Of any library below: what it says is the finding.
        return " ".join(str(error).split())[:200]
    return None if number.item() == 3.0 else f"1 + 2 was {number.item()}"


def _within(limit_s: float, action: Callable[[], str | None]) -> str | None:
    """What the action returns, or that it did not end in time. NCCL may wait for ever."""
    found: list[str | None] = []
    thread = threading.Thread(target=lambda: found.append(action()), daemon=True)
    thread.start()
    thread.join(limit_s)
    if found:
        return found[0]
    return f"no answer within {limit_s:g} s" if thread.is_alive() else "it failed, see above"


def _present(store: Store, names: list[str], limit_s: float) -> list[bool]:
    """Which of the keys are in the store, at the latest after this time."""
    deadline = time.monotonic() + limit_s
    while not store.check(names) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [store.check([name]) for name in names]


def _ping_peers(store: Store, backend: str, device: torch.device) -> dict[int, str]:
    """Pings this rank's peers in turn. Returns what failed, by peer of higher rank."""
    rank, size, failed = launched_rank(), launched_ranks(), {}
    for number, pairs in enumerate(rounds(size)):
        for low, high in pairs:
            if rank not in (low, high):
                continue
            # A connection of its own: this one would be locked as long as that one waits.
            apart = store.clone()  # pyright: ignore[reportAttributeAccessIssue]
            inside = PrefixStore(f"{backend}-{low}-{high}", apart)
            ping = partial(_sum_of_pair, backend, inside, int(rank == high), device)
            found = _within(_PING_S + 1, ping)
            if found is not None and rank == low:
                failed[high] = found
        # A pair that fails makes its two ranks late for the next round.
        store.set(f"{backend}-{number}-{rank}", "")
        _present(store, [f"{backend}-{number}-{other}" for other in range(size)], 2 * _PING_S)
    return failed


def _open_store() -> Store:
    """Returns the store in which ranks find each other: torchrun's, or rank 0's without torchrun.
    Raises ValueError if it cannot be reached."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        return dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            host,
            port,
            launched_ranks(),
            is_master=launched_rank() == 0 and not has_agent,
            timeout=timedelta(seconds=_JOIN_S),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except dist.DistError as error:
        raise ValueError(
            f"rank {launched_rank()} on host {socket.gethostname()} does not reach {host}:{port}, "
            f"where the ranks meet, within {_JOIN_S:g} s ({type(error).__name__}); needs a name "
            "and a port that every node reaches; check --rdzv-endpoint of torchrun (MASTER_ADDR "
            "and MASTER_PORT), and the firewall"
        ) from error


@contextmanager
def _session(store: Store) -> Iterator[str]:
    """Yields a prefix for the ping's keys that no earlier start has used: processes that torchrun
    restarts find the store as their predecessors left it (`distributed._agree_on_session`). Rank 0
    answers whoever asks as long as the context lasts; it does not wait for the others.

    Raises ValueError on the other ranks if rank 0 does not answer.
    """
    rank = launched_rank()
    if rank > 0:
        word = secrets.token_hex(8)
        store.set(f"ask-{rank}", word)
        try:
            session = store.get(f"answer-{word}").decode()
        except dist.DistError as error:
            raise ValueError(
                f"no sign of rank 0 within {_JOIN_S:g} s on rank {rank}; needs every rank; look at "
                "what rank 0 says, and start as many processes as --nproc-per-node and --nnodes say"
            ) from error
        yield session
        return
    session, over = secrets.token_hex(8), threading.Event()
    # A connection of its own: the ping waits on the other.
    apart = store.clone()  # pyright: ignore[reportAttributeAccessIssue]

    def answer() -> None:
        while not over.wait(0.05):
            for other in range(1, launched_ranks()):
                if apart.check([f"ask-{other}"]):
                    apart.set(f"answer-{apart.get(f'ask-{other}').decode()}", session)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    try:
        yield session
    finally:
        over.set()
        thread.join()


def ping_ranks(device: torch.device, show: Callable[[str], object]) -> None:
    """Connects every pair of ranks, with gloo, and with NCCL if `device` is a GPU. A collective
    call of the ranks that have started.

    show: gets a line about each rank's interfaces, and the result.

    Raises ValueError on the lowest rank that is there if another one has not started, or if a pair
    does not connect. The other ranks then end, with exit code 0: one rank tells.
    """
    opened = PrefixStore("ping", _open_store())
    with _session(opened) as session:
        _ping(PrefixStore(session, opened), device, show)


def _ping(store: Store, device: torch.device, show: Callable[[str], object]) -> None:
    rank, ranks = launched_rank(), range(launched_ranks())
    store.set(f"here-{rank}", describe_interfaces())
    here = _present(store, [f"here-{other}" for other in ranks], _JOIN_S)
    backends = {"gloo": torch.device("cpu")}
    if device.type == "cuda":
        backends["NCCL"] = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if all(here):
        failed = {name: _ping_peers(store, name, place) for name, place in backends.items()}
        store.set(f"failed-{rank}", json.dumps(failed))
    if rank != here.index(True):
        _present(store, ["verdict"], _JOIN_S)
        connected = store.check(["verdict"]) and store.get("verdict") == b"connected"
        store.set(f"heard-{rank}", "")
        if connected:
            return
        sys.exit(0)
    problem = _problem(store, here, list(backends))
    store.set("verdict", problem or "connected")
    # Without torchrun, this rank has the store, which the others still read.
    _present(store, [f"heard-{r}" for r in ranks if here[r] and r != rank], _PING_S)
    lines = [f"rank {r}: {store.get(f'here-{r}').decode()}" for r in ranks if here[r]]
    if problem is not None:
        raise ValueError(
            f"{problem}; needs every rank, and a connection of every pair; set GLOO_SOCKET_IFNAME "
            "and NCCL_SOCKET_IFNAME on each node to an interface of the network that the nodes "
            f"share, and open its ports (docs/cluster.md); {'; '.join(lines)}"
        )
    for line in lines:
        show(line)
    show(f"every pair of {len(ranks)} ranks connects ({', '.join(backends)})")


def _problem(store: Store, here: list[bool], backends: Sequence[str]) -> str | None:
    """What is wrong with the ranks, in words; None if nothing is."""
    missing = [str(rank) for rank, there in enumerate(here) if not there]
    if missing:
        return f"no sign of rank {', '.join(missing)} of {len(here)} within {_JOIN_S:g} s"
    keys = [f"failed-{rank}" for rank in range(len(here))]
    told = _present(store, keys, 4 * _PING_S)
    failed = []
    for rank, key in enumerate(keys):
        if not told[rank]:
            failed.append(f"all of rank {rank} (it started, and then did not answer)")
            continue
        found = json.loads(store.get(key))
        failed += [
            f"{backend} {rank}-{peer} ({said})"
            for backend in backends
            for peer, said in found[backend].items()
        ]
    if not failed:
        return None
    more = f" and {len(failed) - _NUM_NAMED} more" if len(failed) > _NUM_NAMED else ""
    return f"pairs of ranks that do not connect: {', '.join(failed[:_NUM_NAMED])}{more}"
