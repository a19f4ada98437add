"""Ranks of one process group, forked by a program that has imported everything once."""

import json
import os
import signal
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from paint_engine.distributed import close_world, init_world

CPU = torch.device("cpu")


def fork(action: Callable[[], object]) -> int:
    """The id of a process that does this and ends; its exit code is 1 where that raises."""
    pid = os.fork()
    if pid:
        return pid
    try:
        action()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def on_ranks(size: int, action: Callable[..., Any], work: Path, model_dir: Path) -> Any:
    """What rank 0 of that many returns."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    answer = work / f"{action.__name__}-{size}.json"

    def rank_main(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        world = init_world(CPU)
        result = action(world, work, model_dir)
        if world.is_main:
            answer.write_text(json.dumps(result))
        close_world()

    running = {fork(lambda rank=rank: rank_main(rank)) for rank in range(size)}
    while running:
        pid, status = os.wait()
        running.remove(pid)
        if status:
            # The others would wait for it.
            for other in running:
                os.kill(other, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(status)
            raise AssertionError(f"a rank of {action.__name__} has failed: exit code {code}")
    return json.loads(answer.read_text())
