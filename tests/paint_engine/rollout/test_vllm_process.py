"""The exchange with vLLM's process, by a thread in its place: what Ctrl-C leaves of it. And what
the process itself starts with."""

import multiprocessing
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from paint_engine.distributed import World
from paint_engine.rollout import vllm_process
from paint_engine.rollout.engine import Completion, EngineDied, SamplingParams
from paint_engine.rollout.vllm_engine import own_environment
from paint_engine.rollout.vllm_process import _ABANDON, OwnProcess, _Batch

PARAMS = SamplingParams(1.0, 1.0, -1, 1, (), 8)


def answer_calls(connection: Any) -> None:
    """Loads answer with what they were given; a generation has two batches."""
    assert connection.recv() == ({}, 0)
    connection.send(None)
    while True:
        method, args = connection.recv()
        if method == "end":
            return
        if method == _ABANDON:
            continue
        if method == "generate":
            for index in (0, 1):
                connection.send(_Batch([index], [Completion((index,), (0.0,), False)]))
        connection.send(args[0] if method == "load" else None)


class ThreadProcess:
    """Of a process: what `OwnProcess` uses."""

    returncode = -9

    def __init__(self, connection: Connection) -> None:
        self.thread = threading.Thread(target=answer_calls, args=(connection,), daemon=True)
        self.thread.start()
        self.killed = False

    def kill(self) -> None:
        self.killed = True

    def wait(self, timeout: float | None = None) -> None:
        pass


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[OwnProcess]:
    mine, theirs = multiprocessing.Pipe()
    monkeypatch.setattr(vllm_process, "_start", lambda environment: (mine, ThreadProcess(theirs)))
    engine = OwnProcess({}, 0, {})
    yield engine
    engine._connection.send(("end", ()))
    engine._process.thread.join()  # pyright: ignore[reportAttributeAccessIssue]


def generate(engine: OwnProcess, on_batch: Callable[..., None]) -> None:
    engine.generate([[1], [2]], [0, 0], PARAMS, False, on_batch)


def test_answers_follow_their_calls(engine: OwnProcess) -> None:
    seen: list[int] = []
    generate(engine, lambda indices, completions: seen.extend(indices))
    assert seen == [0, 1]
    assert engine._call("load", "first") == "first"


def test_a_batch_that_is_refused_leaves_the_process_in_use(engine: OwnProcess) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        generate(engine, refuse)
    assert engine._call("load", "next") == "next"


@pytest.mark.parametrize("at", ["batch", "receive"])
def test_ctrl_c_in_a_call_ends_the_process_and_no_later_call_reads_its_answer(
    engine: OwnProcess, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        if at == "batch":
            generate(engine, interrupt)
        else:
            with monkeypatch.context() as patched:
                patched.setattr(engine._connection, "recv", interrupt)
                engine._call("load", "stale")
    with pytest.raises(EngineDied, match="interrupted"):
        engine._call("load", "fresh")
    assert engine._process.killed  # pyright: ignore[reportAttributeAccessIssue]


# In place of the interpreter's own: it is imported before anything else of the process.
SITE = """
import os, sys
with open(os.environ["SEEN"], "w") as seen:
    print(os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("WORLD_SIZE"), file=seen)
    print("torch" in sys.modules, file=seen)
"""


def test_the_process_starts_with_the_gpu_of_its_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before PyTorch or anything else is imported that may look for GPUs; and without what torchrun
    tells a rank."""
    (tmp_path / "sitecustomize.py").write_text(SITE)
    # Its arguments have no `model`, at which it ends.
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{':'.join(filter(None, sys.path))}")
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.setenv("WORLD_SIZE", "2")
    environment = own_environment(World(1, 2, 1, torch.device("cuda", 1)))
    with pytest.raises(EngineDied, match="ended with exit code 1"):
        OwnProcess({}, 0, environment)
    assert (tmp_path / "seen").read_text() == "6 None\nFalse\n"
