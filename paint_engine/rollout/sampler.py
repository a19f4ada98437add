"""Samples the student's rollouts, step by step, with the built-in engine or vLLM."""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from paint_engine.distributed import launched_rank, together
from paint_engine.monitor import NotFinite
from paint_engine.monitor.timings import Timings
from paint_engine.rollout.engine import Completion, EngineDied, RolloutEngine, SamplingParams
from paint_engine.types import Problem, Request, Rollout


def to_rollout(
    tokenizer: PreTrainedTokenizerBase,
    problem: Problem,
    prompt_ids: tuple[int, ...],
    completion: Completion,
) -> Rollout:
    """Returns a completion with its problem, decoded for the anchors and the reward."""
    text = tokenizer.decode(list(completion.token_ids), skip_special_tokens=True)
    assert isinstance(text, str)
    return Rollout(
        problem, prompt_ids, completion.token_ids, completion.logprobs, completion.truncated, text
    )


T = TypeVar("T")


def check_completion(completion: Completion, name: str) -> None:
    """Raises NotFinite if a log-probability is not a finite number: the model's logits were not, or
    the token could not be drawn.

    name: of the problem, for the message.
    """
    for place, value in enumerate(completion.logprobs):
        if not math.isfinite(value):
            token = completion.token_ids[place]
            raise NotFinite(
                f"rank {launched_rank()}: the sampler's log-probability of token {place} (id "
                f"{token}) of the completion for {name} is {value}, so the model's logits there "
                "are not finite"
            )


@dataclass(frozen=True)
class Sampled:
    """This rank's requests and completions of one step, in the same order. `weights_version` is the
    number of finished steps of the weights that sampled them.

    Sampled(step=3, weights_version=3, requests=[request],
            completions=[Completion((17, 30, 2), (-0.1, -2.3, -0.0), False)])
    """

    step: int
    weights_version: int
    requests: Sequence[Request]
    completions: list[Completion]


class Sampler:
    """Samples a run's rollouts, step by step.

    engine: samples the completions.
    requests: returns this rank's requests of a step.
    params: the sampling parameters.
    ahead: samples the next step's rollouts while the current step trains, with weights that are
        one step old.
    timings: records the spans "sync" and, if the step waits, "rollout".
    warn: is called with a message when the engine is restarted.
    pending: completions that a stopped run had sampled ahead.

    An engine that dies is restarted once, if it can be, and samples its batch again. Otherwise
    `take` raises EngineDied on every rank. Completions with log-probabilities that are not finite
    raise NotFinite on every rank.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        requests: Callable[[int], Sequence[Request]],
        params: SamplingParams,
        *,
        ahead: bool,
        timings: Timings,
        warn: Callable[[str], None],
        pending: Sampled | None = None,
    ) -> None:
        self._engine = engine
        self._requests = requests
        self.params = params
        self._warn = warn
        self.timings = timings
        self._restarts_left = 1
        self._is_paused = False
        # A single thread: the engine serves one request at a time.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollouts") if ahead else None
        self._pending: Future[Sampled] | None = None
        if pending is not None:
            self._pending = Future()
            self._pending.set_result(pending)

    def take(self, step: int, num_steps: int) -> Sampled:
        """Returns this rank's completions of `step`, sampled now or ahead. With `ahead`, it then
        starts to sample the next step, if there is one. A collective call."""
        self._wake()
        with self.timings.span("rollout"):
            sampled = None if self._pending is None else self._together(self._pending.result)
        # Not before: a step that Ctrl-C ends while it waits leaves the engine at work.
        self._pending = None
        if sampled is None:
            self.sync(step)
            with self.timings.span("rollout"):
                sampled = self._together(lambda: self._sample(step, step))
        assert sampled.step == step, (sampled.step, step)
        if self._thread is not None and step + 1 < num_steps:
            if sampled.weights_version != step:
                self.sync(step)
            self._pending = self._thread.submit(self._sample, step + 1, step)
        return sampled

    def sync(self, weights_version: int, engine: RolloutEngine | None = None) -> None:
        """Gives the engine the student's current weights once it is idle. A collective call.

        engine: another one than the rollouts'.
        """
        self.pending()
        given = engine or self._engine
        if given is self._engine:
            self._wake()

        # A restart loads the new weights too. Another sync would be a collective call that the
        # other ranks do not make.
        def sync() -> None:
            given.sync(weights_version)

        with self.timings.span("sync"):
            self._together(lambda: self._or_restart(sync, lambda: None, given))

    def guarded(self, attempt: Callable[[], T], engine: RolloutEngine | None = None) -> T:
        """Calls `attempt`, which uses the engine, once the engine is idle, and again after a
        restart. A collective call. Raises EngineDied on every rank.

        engine: another one than the rollouts'.
        """
        self.pending()
        given = engine or self._engine
        if given is self._engine:
            self._wake()
        return self._together(lambda: self._or_restart(attempt, attempt, given))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around the use of another engine: frees the memory of the rollouts' engine once it is
        idle. Its next use rebuilds it, which after the last step never comes. A collective call."""
        self.pending()
        if not self._is_paused:
            self._engine.pause()
        self._is_paused = True
        yield

    def _wake(self) -> None:
        """Rebuilds an engine that has been paused. A collective call: raises EngineDied on every
        rank."""
        if self._is_paused:
            self._is_paused = False
            self._together(self._engine.restart)

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        params: SamplingParams,
        *,
        base: bool,
    ) -> list[Completion]:
        """Samples one completion for each of this rank's prompts, apart from the step's rollouts,
        such as a teacher's rationales. A collective call; see `RolloutEngine.generate`."""

        def generate() -> list[Completion]:
            completions = self._engine.generate(prompts, seeds, params, base=base)
            for completion in completions:
                check_completion(completion, "a rationale")
            return completions

        with self.timings.span("rationale"):
            return self.guarded(generate)

    def pending(self) -> Sampled | None:
        """Waits for the rollouts sampled ahead and returns them. A collective call.

        Returns None if the engine died for good, or sampled what is not finite; the next step then
        raises.
        """
        if self._pending is None:
            return None
        try:
            return self._together(self._pending.result)
        except (EngineDied, NotFinite):
            self._pending = None
            return None

    def close(self) -> None:
        """Closes the engine. Unfinished rollouts are lost."""
        self._restarts_left = 0
        self._engine.close()
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def _sample(self, step: int, weights_version: int) -> Sampled:
        requests = self._requests(step)

        def generate() -> list[Completion]:
            prompts, seeds = [r.prompt_ids for r in requests], [r.seed for r in requests]
            completions = self._engine.generate(prompts, seeds, self.params)
            for request, completion in zip(requests, completions, strict=True):
                check_completion(completion, request.problem.problem_id)
            return completions

        completions = self._or_restart(generate, generate, self._engine)
        return Sampled(step, weights_version, requests, completions)

    def _or_restart(
        self, attempt: Callable[[], T], again: Callable[[], T], engine: RolloutEngine
    ) -> T:
        try:
            return attempt()
        except EngineDied as death:
            if self._restarts_left == 0 or not engine.can_restart:
                raise
            self._restarts_left -= 1
            name = "the rollout engine" if engine is self._engine else "the evaluations' engine"
            self._warn(f"{name} failed ({death}); it is restarted once")
            engine.restart()
            return again()

    def _together(self, attempt: Callable[[], T]) -> T:
        """Returns the value; raises on every rank if the engine died on any, or sampled there what
        is not finite."""
        return together(attempt, (EngineDied, NotFinite))
