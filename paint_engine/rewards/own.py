"""A reward function of the user's own, which runs in a child process.

The child is killed when a call exceeds its time, so a function may run what a model wrote, hang or
crash: that costs one verdict. It imports the user's module itself; the process that trains never
does.
"""

import inspect
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from paint_engine.config.plugins import load_plugin
from paint_engine.rewards.base import Reward, to_verdict
from paint_engine.types import Problem, Verdict
from paint_engine.worker import StartFailed, Worker

# A user's module may import libraries from a slow disk, or load a model.
_START_LIMIT_S = 300.0
# Of memory that the process writes to: libraries that are mapped, and a GPU's, do not count.
_MEMORY_LIMIT_BYTES = 8 << 30


class OwnReward(Reward):
    """`module:function`, called as function(problem, text).

    problem: a `paint_engine.types.Problem`. text: the completion, decoded. The function returns
    what `to_verdict` takes. What it prints goes to this process's stderr. It may keep state between
    calls, which is lost when the child is replaced, after a timeout or a crash.

    warn: gets the text of the first error.

    Raises ValueError where the function cannot be loaded or called: one message, before training.
    """

    is_own = True

    def __init__(self, name: str, timeout_s: float, warn: Callable[[str], object]) -> None:
        super().__init__(timeout_s)
        self.name = name
        self._warn = warn
        self._has_warned = False
        self._lock = threading.Lock()
        self._worker = Worker(
            "paint_engine.rewards.own:load_function",
            [name],
            call="the reward function",
            process="the reward function's process",
            timeout_s=timeout_s,
            start_limit_s=_START_LIMIT_S,
            advice=f"reward.function is {name!r}: see what python -c "
            f"'import {name.partition(':')[0]}' says",
            shows_output=True,
        )
        try:
            self._worker.start()
        except StartFailed as refusal:
            raise ValueError(str(refusal)) from refusal

    def judge(self, problem: Problem, text: str) -> Verdict:
        """The function's verdict; an error, reward 0.0 and not correct, where it failed."""
        try:
            reply = self._worker.ask([asdict(problem), text])
        except StartFailed as refusal:
            error, details = str(refusal), ""
        else:
            if reply.error is None:
                verdict = Verdict(**reply.value)
                if verdict.error is None:
                    return verdict
                self._warn_once(problem, verdict.error)
                return verdict
            error = reply.error + (f" ({reply.location})" if reply.location else "")
            details = reply.traceback or ""
        self._warn_once(problem, details or error)
        return Verdict(0.0, False, error)

    def _warn_once(self, problem: Problem, details: str) -> None:
        with self._lock:
            is_first, self._has_warned = not self._has_warned, True
        if is_first:
            self._warn(
                f"the reward function {self.name} failed on {problem.problem_id}; the completion "
                f"counts as wrong; further errors are counted and not shown\n{details}"
            )

    def close(self) -> None:
        """Ends the child."""
        self._worker.close()


def load_function(name: str) -> Callable[[list[Any]], dict[str, Any]]:
    """Builds the function from [the problem's fields, the completion] to a verdict's fields. The
    child process calls it.

    Raises ValueError where there is no such function, or it does not take two arguments.
    """
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY_LIMIT_BYTES, _MEMORY_LIMIT_BYTES))
    function = load_plugin(name, "paint_engine.rewards", "REWARD", "reward.function")
    needed = "needs a function of (problem, completion text)"
    if not callable(function):
        raise ValueError(
            f"reward.function: got {name!r}, an object of type {type(function).__name__}; {needed}"
        )
    try:
        signature = inspect.signature(function)
    except ValueError:
        # Of a function in C, which may have none.
        signature = None
    if signature is not None:
        try:
            signature.bind(None, "")
        except TypeError as error:
            raise ValueError(
                f"reward.function: got {name!r}, which takes {signature} ({error}); {needed}"
            ) from error

    def answer(question: list[Any]) -> dict[str, Any]:
        fields, text = question
        return vars(to_verdict(function(Problem(**fields), text)))

    return answer
