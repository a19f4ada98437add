"""The pings of a dry run under torchrun: every pair of ranks, and which does not connect."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
import torch.distributed as dist

from paint_engine.training.parts.ping import rounds

# Short times; the last rank starts late, dies, or has no such interface.
PROGRAM = """
import os, sys, time
fault = sys.argv.pop(1) if os.environ["RANK"] == "1" else sys.argv.pop(1) and ""
if fault == "silent":
    time.sleep(600)
if fault == "no interface":
    os.environ["GLOO_SOCKET_IFNAME"] = "missing0"
from paint_engine.training.parts import ping
from paint_engine.train import main
ping._JOIN_S, ping._PING_S = float(sys.argv.pop(1)), 2.0
if fault == "dead":
    ping._sum_of_pair = lambda *_: os._exit(0)
if fault == "hangs":
    ping._sum_of_pair = lambda *_: time.sleep(600)
main()
"""
Start = Callable[..., subprocess.Popen[str]]


@pytest.mark.parametrize("size", range(1, 10))
def test_every_pair_has_one_turn_and_no_rank_two_in_a_round(size: int) -> None:
    turns = list(rounds(size))
    assert sorted(pair for pairs in turns for pair in pairs) == list(combinations(range(size), 2))
    for pairs in turns:
        seated = [rank for pair in pairs for rank in pair]
        assert len(seated) == len(set(seated))


@pytest.fixture
def dry_run(
    tmp_path: Path,
    command: list[str],
    torchrun: Start,
    printed_by: Callable[[subprocess.Popen[str], float], str],
) -> Callable[..., tuple[int, str, float]]:
    """Exit code, text and seconds of a dry run on two ranks of which the second has a fault."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)

    def run(fault: str, join_s: float) -> tuple[int, str, float]:
        started = time.monotonic()
        process = torchrun(2, str(program), fault, str(join_s), *command, "--dry-run")
        printed = printed_by(process, 600)
        return process.returncode, printed, time.monotonic() - started

    return run


def test_ranks_that_connect_are_told_with_their_interfaces(
    dry_run: Callable[..., tuple[int, str, float]],
) -> None:
    code, printed, _ = dry_run("none", 300.0)
    text = " ".join(printed.split())
    assert code == 0, printed
    assert "every pair of 2 ranks connects (gloo)" in text
    for rank in (0, 1):
        host = socket.gethostname()
        assert re.search(rf"rank {rank}: host {re.escape(host)}, gloo: .*NCCL_SOCKET_IFNAME", text)
    # The dry run itself follows.
    assert "max_new_tokens" in text


@pytest.mark.parametrize(
    ("fault", "join_s", "named"),
    [
        ("silent", 20.0, "no sign of rank 1 of 2 within 20 s"),
        ("dead", 300.0, "pairs of ranks that do not connect: gloo 0-1 ("),
        ("hangs", 300.0, "pairs of ranks that do not connect: gloo 0-1 ("),
        ("no interface", 300.0, "GLOO_SOCKET_IFNAME missing0 has no address"),
    ],
)
def test_a_rank_that_does_not_answer_is_named(
    fault: str, join_s: float, named: str, dry_run: Callable[..., tuple[int, str, float]]
) -> None:
    code, printed, _ = dry_run(fault, join_s)
    # What torchrun itself prints of its children follows.
    text = " ".join(printed.split())
    assert code != 0
    assert named in text, printed
    assert printed.count("error: pairs") + printed.count("error: no sign") == 1
    assert "set GLOO_SOCKET_IFNAME" in text
    assert "paint_engine/training" not in printed, printed


def test_processes_that_are_started_again_do_not_read_what_the_first_ones_left() -> None:
    """torchrun keeps its store when it restarts a run, with the addresses of the ranks before."""
    program = "import torch; from paint_engine.training.parts.ping import ping_ranks; "
    program += "ping_ranks(torch.device('cpu'), print)"
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # pyright: ignore[reportPrivateImportUsage]
    shared = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(agent.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    for _ in range(2):
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", program],
                env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in "01"
        ]
        printed = [process.communicate(timeout=300)[0] for process in ranks]
        assert [process.returncode for process in ranks] == [0, 0], printed
        assert "every pair of 2 ranks connects (gloo)" in printed[0]
