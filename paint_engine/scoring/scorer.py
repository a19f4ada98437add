"""Adds the scores of the teacher's server to a step's rollouts."""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace

from paint_engine.distributed import together
from paint_engine.monitor.timings import Timings
from paint_engine.rollout import EngineDied
from paint_engine.rollout.http import Requests, ask_at_once
from paint_engine.rollout.replies import engine_faults
from paint_engine.scoring.server import TeacherDied, TeacherServer
from paint_engine.types import TopK, TrainExample

_NUM_ATTEMPTS = 3
"""at the scores of one step; each but the last is followed by a wait for the server's return"""
_NUM_AT_ONCE = 8
"""requests of one rank; the server itself fills its passes with those of all ranks"""


class Scorer:
    """Scores a run's rollouts, step by step.

    server: the teacher's.
    timings: records the span "teacher".
    warn: is called with a message when the server is asked again.

    Scores that have come are kept: after a failure only the others are asked for again, once the
    server answers. A server that fails so three times in a step makes `add_scores` raise
    TeacherDied on every rank. Nothing depends on which attempt it was, since a server's scores
    follow from the tokens alone.
    """

    def __init__(
        self, server: TeacherServer, *, timings: Timings, warn: Callable[[str], None]
    ) -> None:
        self._server = server
        self._timings = timings
        self._warn = warn

    def room(self, context: int) -> int:
        """Returns the most tokens of a prompt and its completion, of at most `context`."""
        return self._server.model.room(context)

    def add_scores(self, examples: Sequence[TrainExample]) -> list[TrainExample]:
        """Returns this rank's examples, those with a teacher view with `served`. A collective call;
        raises TeacherDied on every rank."""
        with self._timings.span("teacher"):
            viewed = [example for example in examples if example.teacher_view is not None]
            scores = iter(together(lambda: self._scores(viewed), (TeacherDied,)))
        return [
            example if example.teacher_view is None else replace(example, served=next(scores))
            for example in examples
        ]

    def _scores(self, examples: Sequence[TrainExample]) -> list[TopK]:
        found: dict[int, TopK] = {}
        for attempt in range(1, _NUM_ATTEMPTS + 1):
            try:
                self._ask(examples, found)
            except EngineDied as death:
                if attempt == _NUM_ATTEMPTS:
                    raise TeacherDied(str(death)) from death
                self._warn(f"{TeacherDied.part} failed ({death}); it is asked again")
                self._server.wait()
            else:
                break
        return [found[index] for index in range(len(examples))]

    def _ask(self, examples: Sequence[TrainExample], found: dict[int, TopK]) -> None:
        """Adds the scores that are not in `found`. Raises EngineDied."""
        missing = [index for index in range(len(examples)) if index not in found]
        requests = Requests()

        def ask(place: int) -> TopK:
            example = examples[missing[place]]
            assert example.teacher_view is not None, "the others are left out"
            prompt, completion = example.teacher_view.prompt_ids, example.rollout.completion_ids
            with engine_faults(self._server.url):
                return self._server.score(prompt, completion, requests)

        with closing(ask_at_once(ask, len(missing), _NUM_AT_ONCE, requests)) as answers:
            for place, scores in answers:
                found[missing[place]] = scores
