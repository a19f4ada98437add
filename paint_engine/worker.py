"""A child process that answers questions, bounded in time: it is killed when a question takes too
long, and replaced when it was killed or has crashed."""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from paint_engine.files import printable_output
from paint_engine.keys import without_keys

_HERE = Path(__file__).parent
_MAX_ERROR_CHARS = 200
_MAX_FRAMES = 8
# A child whose parent was killed ends by itself this long after its question's time is over.
_ORPHAN_S = 5.0


class StartFailed(RuntimeError):
    """The child refused to start, ended or took too long before its first question."""


@dataclass(frozen=True)
class Reply:
    """The result of one question: Reply(value=True)

    error: why there is no value: "KeyError: 'x'". ended: because the child took too long and was
    killed, or has crashed. location: the line that raised it,
    "my_module.py:12", and traceback: the frames down to it; both None if only code of
    this package raised it.
    """

    value: Any = None
    error: str | None = None
    ended: bool = False
    location: str | None = None
    traceback: str | None = None


class Worker:
    """Answers questions in a child process.

    worker = Worker("my_package.my_module:make_answer", [], call="the sum", process="the adder",
                    timeout_s=5.0, start_limit_s=60.0, advice="import my_package yourself")
    worker.ask([1, 2]).value

    factory: "module:function", a function that the child calls once with `arguments` and that
        returns the function of a question. Arguments, questions and values are what JSON holds.
    call, process: what one question and the child are called in messages.
    timeout_s, start_limit_s: bounds on one question, and on the child's imports and `factory`.
    advice: what to do where the child does not start.
    shows_output: what the child prints goes to this process's stderr; else nowhere.

    The child starts with the first question, or with `begin` or `start`. Threads take turns.
    """

    def __init__(
        self,
        factory: str,
        arguments: list[Any],
        *,
        call: str,
        process: str,
        timeout_s: float,
        start_limit_s: float,
        advice: str,
        shows_output: bool = False,
    ) -> None:
        self._command = (factory, arguments)
        self._call = call
        self._process = process
        self._timeout_s = timeout_s
        self._start_limit_s = start_limit_s
        self._advice = advice
        self._shows_output = shows_output
        self._child: _Child | None = None
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Starts the child, where there is none, without waiting for it."""
        with self._lock:
            if self._child is None:
                self._child = self._new_child()

    def start(self) -> None:
        """Starts the child, and waits until it is ready. Raises StartFailed."""
        with self._lock:
            self._child = self._take_child()

    def ask(self, question: Any) -> Reply:
        """The answer, or why there is none. Raises StartFailed where a child has to start for it
        and does not."""
        with self._lock:
            child = self._take_child()
            try:
                reply = child.ask(question, self._timeout_s)
            except TimeoutError:
                child.stop()
                error = f"{self._call} took longer than {self._timeout_s:g} s"
                reply = Reply(error=error, ended=True)
            except EOFError:
                error = f"{self._process} stopped (exit code {child.stop()})"
                reply = Reply(error=error, ended=True)
            except BaseException:
                child.stop()
                raise
            else:
                self._child = child
                return reply
            # The replacement starts while the caller continues.
            self._child = self._new_child()
            return reply

    def close(self) -> None:
        """Ends the child. A later question starts a new one."""
        with self._lock:
            if self._child is not None:
                self._child.stop()
                self._child = None

    def _new_child(self) -> "_Child":
        return _Child(*self._command, self._timeout_s, shows_output=self._shows_output)

    def _take_child(self) -> "_Child":
        """A child that waits for a question. The caller puts it back into `_child` after a whole
        exchange.

        Ctrl-C may arrive between any two instructions, and a notebook continues after it. The child
        that it left in the middle of an exchange still owes an answer, which would be taken for the
        next question's. So `_child` never holds such a child, whatever ends the exchange.
        """
        child, self._child = self._child, None
        if child is None or child.has_ended():
            child = self._new_child()
        try:
            child.wait_until_ready(self._start_limit_s)
        except (EOFError, TimeoutError) as error:
            raise StartFailed(
                f"{self._process} did not start within {self._start_limit_s:.0f} s (exit code "
                f"{child.stop()}); {self._advice}"
            ) from error
        except BaseException:
            child.stop()
            raise
        return child


class _Child:
    """One process and the socket to it: a JSON line each way per question.

    A plain child, not multiprocessing, which would import the caller's __main__ again, or fork a
    process that holds threads and a GPU. Its own session keeps a Ctrl-C at the terminal from it,
    and what it starts itself is killed with it.
    """

    _SOURCE = (
        "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
        "from paint_engine.worker import serve; serve(*json.loads(sys.argv[2]))"
    )

    def __init__(
        self, factory: str, arguments: list[Any], timeout_s: float, *, shows_output: bool
    ) -> None:
        self._socket, child_socket = socket.socketpair()
        with child_socket:
            handle = child_socket.fileno()
            settings = json.dumps([handle, timeout_s, factory, arguments])
            output = None if shows_output else subprocess.DEVNULL
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-c", self._SOURCE, json.dumps(sys.path), settings],
                stdin=subprocess.DEVNULL,
                env=without_keys(),
                stdout=2 if shows_output else output,
                stderr=output,
                pass_fds=(handle,),
                start_new_session=True,
            )
        self._replies = self._socket.makefile("r", encoding="utf-8")
        self._is_ready = False
        self._owner = os.getpid()
        # At the latest when nobody holds the worker any more, or when this process ends.
        self._finalizer = weakref.finalize(
            self, _end, self._process, self._socket, self._replies, self._owner
        )

    def has_ended(self) -> bool:
        """Whether it answers no more; in a fork of the process that started it, it never did."""
        if self._owner != os.getpid():
            return True
        # Not asked of the process: as long as nobody has waited for it, its process group, which
        # `stop` kills, cannot become another one's.
        self._socket.settimeout(0.0)
        try:
            return not self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except ConnectionError:
            return True

    def wait_until_ready(self, limit_s: float) -> None:
        """Raises StartFailed with the child's own words, TimeoutError or EOFError."""
        if self._is_ready:
            return
        refusal = self._receive(limit_s)
        if refusal is not None:
            raise StartFailed(refusal)
        self._is_ready = True

    def ask(self, question: Any, timeout_s: float) -> Reply:
        """Raises TimeoutError, or EOFError where the child has ended."""
        self._socket.settimeout(timeout_s)
        with suppress(ConnectionError):
            self._socket.sendall((json.dumps(question) + "\n").encode())
        return Reply(**self._receive(timeout_s))

    def _receive(self, limit_s: float) -> Any:
        self._socket.settimeout(limit_s)
        try:
            line = self._replies.readline()
        except ConnectionError:
            line = ""
        # A child that was killed while it answered has sent a part.
        if not line.endswith("\n"):
            raise EOFError
        return json.loads(line)

    def stop(self) -> int:
        """The exit code of the process, which is killed where it has not ended."""
        self._finalizer()
        return self._process.returncode


def _end(
    process: subprocess.Popen[bytes],
    connection: socket.socket,
    replies: TextIOWrapper,
    owner: int,
) -> None:
    replies.close()
    connection.close()
    if owner != os.getpid():
        return
    # What the child has started too. A process that is ending keeps its own exit code; macOS
    # refuses the signal where no other one is left.
    with suppress(PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def serve(handle: int, timeout_s: float, factory: str, arguments: list[Any]) -> None:
    """Runs in the child: gets ready, then answers one line at a time until the parent's end
    closes."""
    with socket.socket(fileno=handle) as connection, printable_output():
        channel = connection.makefile("rw", encoding="utf-8")

        def send(value: Any) -> None:
            channel.write(json.dumps(value) + "\n")
            channel.flush()

        module, _, name = factory.partition(":")
        # BaseException: a user's module or function may call sys.exit.
        try:
            make_answer = getattr(importlib.import_module(module), name)
            answer: Callable[[Any], Any] = make_answer(*arguments)
        except BaseException as error:
            text = str(error) if isinstance(error, ValueError) else _describe(error).error
            send(text)
            return
        send(None)
        for line in channel:
            # The kernel ends the child even if the parent has died in the meantime.
            signal.setitimer(signal.ITIMER_REAL, timeout_s + _ORPHAN_S)
            try:
                reply = Reply(answer(json.loads(line)))
            except BaseException as error:
                reply = _describe(error)
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            send(vars(reply))


def _describe(error: BaseException) -> Reply:
    message = str(error)[:_MAX_ERROR_CHARS]
    text = type(error).__name__ + (f": {message}" if message else "")
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not Path(frame.filename).is_relative_to(_HERE)
    ]
    if not frames:
        return Reply(error=text)
    # The user's line, where it is a library's that raised.
    own = [frame for frame in frames if frame.filename == frames[0].filename][-1]
    location = f"{Path(own.filename).name}:{own.lineno}"
    listing = "".join(traceback.format_list(frames[-_MAX_FRAMES:]))
    return Reply(error=text, location=location, traceback=f"{listing}{text}")
