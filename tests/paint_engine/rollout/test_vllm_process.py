"""The exchange with vLLM's process, by a thread in its place: what Ctrl-C leaves of it."""

import multiprocessing
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from paint_engine.rollout.engine import Completion, EngineDied, SamplingParams
from paint_engine.rollout.vllm_process import _ABANDON, OwnProcess, _Batch

PARAMS = SamplingParams(1.0, 1.0, -1, 1, (), 8)


def answer_calls(connection: Any, *settings: object) -> None:
    """Loads answer with what they were given; a generation has two batches."""
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

    exitcode = -9

    def __init__(self, args: tuple[Any, ...], **settings: object) -> None:
        self.thread = threading.Thread(target=answer_calls, args=args, daemon=True)
        self.start = self.thread.start
        self.killed = False

    def kill(self) -> None:
        self.killed = True

    def join(self, timeout: float | None = None) -> None:
        pass


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[OwnProcess]:
    context = SimpleNamespace(Pipe=multiprocessing.Pipe, Process=ThreadProcess)
    monkeypatch.setattr("multiprocessing.get_context", lambda method: context)
    # The thread's end is this process's too.
    monkeypatch.setattr("multiprocessing.connection.Connection.close", lambda connection: None)
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
