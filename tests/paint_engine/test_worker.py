"""The exchange with a child process: Ctrl-C at any point, and several threads."""

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from paint_engine.worker import Reply, Worker


@pytest.fixture(autouse=True)
def interrupts() -> Iterator[None]:
    """Python's own handler of Ctrl-C: a shell's job in the background starts without one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def echo() -> Iterator[Worker]:
    """A worker that answers [value] with value."""
    worker = Worker(
        "operator:itemgetter",
        [0],
        call="the echo",
        process="the echo's process",
        timeout_s=60.0,
        start_limit_s=60.0,
        advice="look there",
    )
    yield worker
    worker.close()


# A child whose construction is interrupted is left to Python, which complains of its open socket.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_at_any_point_leaves_every_answer_with_its_question(echo: Worker) -> None:
    rng = random.Random(0)
    main, answers = threading.get_ident(), dict[int, Reply]()
    for question in range(50):
        # An exchange takes a fraction of a millisecond, and the start of a child 100 of them.
        delay_s = rng.choice([0.0, 2e-4, 2e-3, 0.1]) * rng.random()
        killer = threading.Timer(delay_s, signal.pthread_kill, (main, signal.SIGINT))
        with suppress(KeyboardInterrupt):
            killer.start()
            answers[question] = echo.ask([question])
            killer.join()
            # The main thread sees the signal between two instructions.
            time.sleep(0.001)
        if question % 3 == 0:
            assert echo.ask([-question]) == Reply(-question)
    assert answers == {question: Reply(question) for question in answers}
    # Some arrived before the answer did, and some after it.
    assert 0 < len(answers) < 50


def test_an_interrupt_between_question_and_answer_ends_the_child(
    echo: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert echo.ask(["first"]) == Reply("first")

    def interrupt(**fields: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("paint_engine.worker.Reply", interrupt)
        echo.ask(["second"])
    assert echo.ask(["third"]) == Reply("third")


def test_threads_get_their_own_answers_while_the_main_thread_is_interrupted(echo: Worker) -> None:
    main = threading.get_ident()
    with ThreadPoolExecutor(4) as pool:
        expected = [Reply(number) for number in range(200)]
        futures = [pool.submit(echo.ask, [number]) for number in range(200)]
        for _ in range(5):
            threading.Timer(0.01, signal.pthread_kill, (main, signal.SIGINT)).start()
            with pytest.raises(KeyboardInterrupt):
                while True:
                    assert echo.ask(["main"]) == Reply("main")
        assert [future.result() for future in futures] == expected


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_of_the_process_has_a_child_of_its_own(echo: Worker) -> None:
    assert echo.ask(["before"]) == Reply("before")
    fork = os.fork()
    if fork == 0:
        answers = [echo.ask([number]) == Reply(number) for number in range(20)]
        echo.close()
        os._exit(0 if all(answers) else 1)
    answers = [echo.ask([-number]) == Reply(-number) for number in range(20)]
    _, status = os.waitpid(fork, 0)
    assert all(answers) and status == 0
    assert echo.ask(["after"]) == Reply("after")


# The child's only socket is the one to its parent.
_ENDS_WITHIN_A_REPLY = """
import os, stat
def make():
    def answer(question):
        for handle in range(3, 64):
            try:
                if stat.S_ISSOCK(os.fstat(handle).st_mode):
                    os.write(handle, b'{"value": "cut sho')
            except OSError:
                pass
        os._exit(3)
    return answer
"""


def test_a_child_that_is_killed_while_it_answers_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ends_within_a_reply.py").write_text(_ENDS_WITHIN_A_REPLY)
    monkeypatch.syspath_prepend(tmp_path)
    worker = Worker(
        "ends_within_a_reply:make",
        [],
        call="the answer",
        process="the answering process",
        timeout_s=60.0,
        start_limit_s=60.0,
        advice="look there",
    )
    reply = worker.ask("?")
    worker.close()
    assert reply == Reply(error="the answering process stopped (exit code 3)", ended=True)
