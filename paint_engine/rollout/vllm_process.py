"""A vLLM engine in a process of its own, so that it generates while another one trains, and its
death leaves that one alive."""

import atexit
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from paint_engine.rollout.adapter_files import WrittenWeights
from paint_engine.rollout.engine import Completion, EngineDied, SamplingParams
from paint_engine.rollout.vllm_core import Core, OnBatch

# How long an engine's process may take to end when it is asked to.
_EXIT_TIMEOUT_S = 10.0
# Between two looks of an engine's process at whether its trainer still lives.
_WATCH_S = 1.0
# A message to an engine's process, which has no answer of its own.
_ABANDON = "abandon"
# What torchrun tells its processes: an engine that read it would take itself for one of the ranks.
_TORCHRUN_PREFIXES = ("RANK", "LOCAL_", "WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC")


@dataclass(frozen=True)
class _Batch:
    """What an engine's process has finished: _Batch([3], [Completion((2,), (-0.1,), False)])"""

    indices: list[int]
    completions: list[Completion]


def _serve(
    connection: Any, llm_args: Mapping[str, Any], head_size: int, environment: Mapping[str, str]
) -> None:
    """The main function of an engine's own process: answers calls until the trainer is gone."""
    # Ctrl-C reaches every process of a terminal, and torchrun's SIGTERM every process of a rank's
    # group; the trainer decides when this one ends.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    for name in [n for n in os.environ if n.startswith(_TORCHRUN_PREFIXES)]:
        del os.environ[name]
    os.environ.update(environment)
    threading.Thread(target=_end_with_the_trainer, daemon=True).start()
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
            # It came too late: that batch was done.
            continue
        try:
            if method == "generate":
                answer = _send_batches(connection, core, args)
            else:
                answer = getattr(core, method)(*args)
        except ValueError as error:
            # Those of vLLM and pydantic do not all survive the way through a pipe.
            answer = ValueError(str(error))
        connection.send(answer)


def _send_batches(connection: Any, core: Core, args: Sequence[Any]) -> None:
    """What finishes, as it does, until all has or the trainer gives the rest up."""
    with closing(core.stream(*args)) as steps:
        for indices, completions in steps:
            if indices:
                connection.send(_Batch(indices, completions))
            if connection.poll():
                method, _ = connection.recv()
                assert method == _ABANDON, method
                return


def _end_with_the_trainer() -> None:
    """A trainer that is killed by SIGKILL tells nobody, and one that generates hears nothing."""
    trainer = multiprocessing.parent_process()
    assert trainer is not None
    while os.getppid() == trainer.pid:
        time.sleep(_WATCH_S)
    os._exit(1)


class OwnProcess:
    """A `Core` in a process of its own: generation overlaps with training, and its death leaves
    the trainer alive.

    environment: its own environment variables, beside the trainer's.

    Raises EngineDied where the engine cannot be built.
    """

    def __init__(
        self, llm_args: Mapping[str, Any], head_size: int, environment: Mapping[str, str]
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve,
            args=(theirs, llm_args, head_size, environment),
            name="paint-vllm",
            daemon=True,
        )
        self._process.start()
        # multiprocessing would end it with the signal that it ignores, and wait for ever.
        atexit.register(self._process.kill)
        # Else this process would hold the other end open, and a death would not be noticed.
        theirs.close()
        try:
            self._answer()
        except EngineDied:
            self.close()
            raise

    def load(self, written: WrittenWeights) -> None:
        """See `Core`."""
        self._call("load", written)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        params: SamplingParams,
        base: bool,
        on_batch: OnBatch,
    ) -> None:
        """See `Core`."""
        answer = self._call("generate", prompts, seeds, params, base)
        while isinstance(answer, _Batch):
            try:
                on_batch(answer.indices, answer.completions)
            except Exception:
                self._abandon()
                raise
            answer = self._answer()

    def _abandon(self) -> None:
        """Gives up what is under way, and hears out what was sent in the meantime."""
        answer = self._call(_ABANDON)
        while isinstance(answer, _Batch):
            answer = self._answer()

    def close(self) -> None:
        """Ends the process, in the middle of a batch if need be: it keeps nothing of its own."""
        self._process.kill()
        self._process.join()
        self._connection.close()
        atexit.unregister(self._process.kill)

    def _call(self, method: str, *args: Any) -> Any:
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
        if isinstance(answer, ValueError | EngineDied):
            raise answer
        return answer

    def _death(self) -> EngineDied:
        self._process.join(_EXIT_TIMEOUT_S)
        return EngineDied(f"vLLM's process ended with exit code {self._process.exitcode}")
