"""A vLLM engine in its own process. It generates while the trainer trains, and the trainer survives
its death."""

import atexit
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from paint_engine.files import printable_output
from paint_engine.rollout.engine import Completion, EngineDied, SamplingParams
from paint_engine.rollout.vllm_core import Core, OnBatch
from paint_engine.rollout.weights import SharedWeights, WrittenWeights

# How long an engine's process may take to exit when asked to.
_EXIT_TIMEOUT_S = 10.0
# Interval at which an engine's process checks that its trainer is alive.
_WATCH_S = 1.0
# A message to an engine's process that has no answer of its own.
_ABANDON = "abandon"
# Variables that torchrun sets for its processes. An engine that read them would act as one of the
# ranks.
_TORCHRUN_PREFIXES = ("RANK", "LOCAL_", "WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC")


@dataclass(frozen=True)
class _Batch:
    """Finished requests of an engine's process: _Batch([3], [Completion((2,), (-0.1,), False)])"""

    indices: list[int]
    completions: list[Completion]


# What the process runs. By its name, since classes of __main__ could not be sent back.
_SOURCE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from paint_engine.rollout.vllm_process import serve; serve(*json.loads(sys.argv[2]))"
)


def engine_environment(own: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment that an engine's process starts with: the trainer's without
    torchrun's variables, and with `own`."""
    kept = {n: v for n, v in os.environ.items() if not n.startswith(_TORCHRUN_PREFIXES)}
    return kept | dict(own)


def _start(own: Mapping[str, str]) -> tuple[Connection, subprocess.Popen[bytes]]:
    """Starts an engine's process, which is to be sent Core's arguments.

    Not by multiprocessing, whose child gets its variables only after it has imported PyTorch, the
    trainer's __main__ and all that these import: what of it looks for GPUs would see those of all
    ranks.
    """
    mine, theirs = multiprocessing.Pipe()
    # Otherwise this process would hold the other end open and not notice a death.
    with theirs:
        handle = theirs.fileno()
        process = subprocess.Popen(
            [
                *(sys.executable, "-c", _SOURCE, json.dumps(sys.path)),
                json.dumps([handle, os.getpid()]),
            ],
            env=engine_environment(own),
            stdin=subprocess.DEVNULL,
            pass_fds=(handle,),
        )
    return mine, process


def serve(handle: int, trainer: int) -> None:
    """Runs an engine's process. It answers calls until the trainer is gone.

    handle: the file descriptor of its end of the pipe.
    trainer: the trainer's process id.
    """
    # Ctrl-C reaches every process of a terminal, and torchrun's SIGTERM every process of a rank's
    # group. The trainer decides when this one ends.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_trainer, args=(trainer,), daemon=True).start()
    with Connection(handle) as connection, printable_output():
        llm_args, head_size = connection.recv()
        _answer_calls(connection, llm_args, head_size)


def _answer_calls(connection: Any, llm_args: Mapping[str, Any], head_size: int) -> None:
    try:
        core = Core(llm_args, head_size)
    except EngineDied as death:
        connection.send(death)
        raise
    connection.send(None)
    while True:
        try:
            method, args = connection.recv()
        except EOFError:
            return
        if method == _ABANDON:
            # The message came too late: that batch was already finished.
            continue
        try:
            if method == "generate":
                answer = _send_batches(connection, core, args)
            else:
                answer = getattr(core, method)(*args)
        except ValueError as error:
            # Some exceptions of vLLM and pydantic cannot be pickled for the pipe.
            answer = ValueError(str(error))
        connection.send(answer)


def _send_batches(connection: Any, core: Core, args: Sequence[Any]) -> None:
    """Sends requests as they finish, until all have or the trainer abandons the rest."""
    with closing(core.stream(*args)) as steps:
        for indices, completions in steps:
            if indices:
                connection.send(_Batch(indices, completions))
            if connection.poll():
                method, _ = connection.recv()
                assert method == _ABANDON, method
                return


def _end_with_the_trainer(trainer: int) -> None:
    """Exits when the trainer is gone. A trainer killed by SIGKILL sends no message, and an engine
    that generates does not read the pipe."""
    while os.getppid() == trainer:
        time.sleep(_WATCH_S)
    os._exit(1)


class OwnProcess:
    """A `Core` in its own process. Generation overlaps with training, and the trainer survives its
    death.

    environment: environment variables of the process from its start on, in addition to the
        trainer's.

    Raises EngineDied if the engine cannot be built.
    """

    def __init__(
        self, llm_args: Mapping[str, Any], head_size: int, environment: Mapping[str, str]
    ) -> None:
        self._connection, self._process = _start(environment)
        # At exit too, without the second that the process takes to notice it.
        atexit.register(self._process.kill)
        self._connection.send((llm_args, head_size))
        # Whether a call has not got its last answer. Ctrl-C may leave it so at any point.
        self._is_answering = True
        try:
            self._answer()
        except EngineDied:
            self.close()
            raise

    def load(self, written: WrittenWeights | SharedWeights) -> None:
        """Loads the weights; see `Core`."""
        self._call("load", written)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        params: SamplingParams,
        base: bool,
        on_batch: OnBatch,
    ) -> None:
        """Samples completions; see `Core`."""
        answer = self._call("generate", prompts, seeds, params, base)
        while isinstance(answer, _Batch):
            try:
                on_batch(answer.indices, answer.completions)
            except Exception:
                self._abandon()
                raise
            answer = self._answer()

    def _abandon(self) -> None:
        """Aborts the current batch and reads the messages that were sent in the meantime."""
        answer = self._send(_ABANDON)
        while isinstance(answer, _Batch):
            answer = self._answer()

    def close(self) -> None:
        """Kills the process, even during a batch. It has no state to save."""
        self._process.kill()
        self._process.wait()
        self._connection.close()
        atexit.unregister(self._process.kill)

    def _call(self, method: str, *args: Any) -> Any:
        if self._is_answering:
            # The rest of that answer would be taken for this call's.
            self._process.kill()
            raise EngineDied(
                "a call of vLLM's process was interrupted, and the process ended for it"
            )
        self._is_answering = True
        return self._send(method, *args)

    def _send(self, method: str, *args: Any) -> Any:
        try:
            self._connection.send((method, args))
        except OSError as error:
            raise self._death() from error
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._death() from error
        self._is_answering = isinstance(answer, _Batch)
        if isinstance(answer, ValueError | EngineDied):
            raise answer
        return answer

    def _death(self) -> EngineDied:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_EXIT_TIMEOUT_S)
        return EngineDied(f"vLLM's process ended with exit code {self._process.returncode}")
