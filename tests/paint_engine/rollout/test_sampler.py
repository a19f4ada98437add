"""A run's rollouts step by step: which weights they come from, and engines that die."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from paint_engine.monitor import NotFinite
from paint_engine.monitor.timings import Timings
from paint_engine.rollout.engine import Completion, EngineDied, SamplingParams
from paint_engine.rollout.sampler import Sampled, Sampler
from paint_engine.types import Problem, Request

PARAMS = SamplingParams(1.0, 1.0, -1, 8, (2,), 340)


class FakeEngine:
    """Completions that name the weights and the seed behind them. Dies in the calls whose numbers
    are in `deaths`, and after that until it is restarted."""

    def __init__(self, deaths: Sequence[int] = ()) -> None:
        self.deaths = set(deaths)
        self.calls: list[str] = []
        self.num_generated = 0
        self.loaded = self.current = -1
        self.alive = self.can_restart = True
        self.closed = False
        self.always_has_logprobs = True

    def pause(self) -> None:
        self.calls.append("pause")
        self.alive = False

    def sync(self, weights_version: int) -> None:
        self.calls.append(f"sync {weights_version}")
        self.current = weights_version
        if not self.alive:
            raise EngineDied("gone before the weights came")
        self.loaded = weights_version

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        params: SamplingParams,
        *,
        base: bool = False,
        on_batch: Callable[[list[int], list[Completion]], None] | None = None,
    ) -> list[Completion]:
        self.num_generated += 1
        self.calls.append(f"generate {self.loaded}")
        if self.num_generated in self.deaths:
            self.alive = False
        if not self.alive:
            raise EngineDied("killed")
        return [Completion((self.loaded, seed), (0.0, 0.0), False) for seed in seeds]

    def restart(self) -> None:
        self.calls.append("restart")
        self.alive, self.loaded = True, self.current

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("ahead", [False, True])
def test_a_log_probability_that_is_not_finite_is_named(ahead: bool, value: float) -> None:
    class Broken(FakeEngine):
        def generate(self, *args: Any, **options: Any) -> list[Completion]:
            first, second = super().generate(*args, **options)
            if self.num_generated == 2:
                second = replace(second, logprobs=(0.0, value))
            return [first, second]

    sampler, _ = make(Broken(), ahead=ahead)
    sampler.take(0, 4)
    # A stop waits for what was sampled ahead, and saves without it.
    if ahead:
        assert sampler.pending() is None
    message = rf"token 1 \(id 1\d\) of the completion for p:0 is {value}, so the model's logits"
    if not ahead:
        with pytest.raises(NotFinite, match=message):
            sampler.take(1, 4)
    sampler.close()


PROBLEM = Problem("p:0", "How many?", "It is $\\boxed{3}$.", "3")


def requests(step: int) -> list[Request]:
    prompts = enumerate(((1, 2), (3,)))
    return [Request(place, PROBLEM, prompt, 10 * step + place) for place, prompt in prompts]


def make(
    engine: FakeEngine, *, ahead: bool = False, pending: Sampled | None = None
) -> tuple[Sampler, list[str]]:
    warnings: list[str] = []
    sampler = Sampler(
        engine,
        requests,
        PARAMS,
        ahead=ahead,
        timings=Timings(),
        warn=warnings.append,
        pending=pending,
    )
    return sampler, warnings


def weights_and_seeds(sampled: Sampled) -> list[tuple[int, ...]]:
    return [c.token_ids for c in sampled.completions]


def test_each_step_samples_from_its_own_weights() -> None:
    engine = FakeEngine()
    sampler, warnings = make(engine)
    for step in range(3):
        sampled = sampler.take(step, 3)
        assert (sampled.step, sampled.weights_version) == (step, step)
        assert weights_and_seeds(sampled) == [(step, 10 * step), (step, 10 * step + 1)]
        assert sampler.pending() is None
    assert engine.calls == [c for s in range(3) for c in (f"sync {s}", f"generate {s}")]
    sampler.close()
    assert engine.closed and not warnings


def test_ahead_samples_one_step_from_weights_one_step_old() -> None:
    engine = FakeEngine()
    sampler, _ = make(engine, ahead=True)
    lags = []
    for step in range(4):
        sampled = sampler.take(step, 4)
        assert sampled.step == step
        assert weights_and_seeds(sampled)[0] == (sampled.weights_version, 10 * step)
        lags.append(step - sampled.weights_version)
    # The first step has no one to be ahead of; after the last nothing more is sampled.
    assert lags == [0, 1, 1, 1]
    assert engine.num_generated == 4
    assert sampler.pending() is None
    sampler.close()


def test_what_was_sampled_ahead_is_used_after_a_resume() -> None:
    sampler, _ = make(FakeEngine(), ahead=True)
    for step in range(2):
        sampler.take(step, 4)
    kept = sampler.pending()
    assert kept is not None and (kept.step, kept.weights_version) == (2, 1)
    assert sampler.pending() == kept
    expected = [sampler.take(step, 4) for step in (2, 3)]
    resumed, _ = make(FakeEngine(), ahead=True, pending=kept)
    assert [resumed.take(step, 4) for step in (2, 3)] == expected
    for each in (sampler, resumed):
        each.close()


def test_an_engine_that_dies_is_restarted_once_and_its_batch_done_again() -> None:
    engine = FakeEngine(deaths=[2])
    sampler, warnings = make(engine)
    healthy, _ = make(FakeEngine())
    for step in range(4):
        assert sampler.take(step, 4) == healthy.take(step, 4)
    assert engine.calls.count("restart") == 1
    assert len(warnings) == 1 and "killed" in warnings[0] and "restarted once" in warnings[0]


def test_an_engine_ends_for_another_one_and_samples_as_before_after_it() -> None:
    """The one that dies is restarted. Two uses of another one after each other cost one start."""
    engine, other = FakeEngine(), FakeEngine(deaths=[1])
    sampler, warnings = make(engine)
    healthy, _ = make(FakeEngine())
    assert sampler.take(0, 4) == healthy.take(0, 4)
    with sampler.paused():
        assert not engine.alive
        sampler.sync(1, other)
        sampler.guarded(lambda: other.generate([], [], PARAMS), other)
    assert other.calls == ["sync 1", "generate 1", "restart", "generate 1"]
    assert warnings == ["the evaluations' engine failed (killed); it is restarted once"]
    with sampler.paused():
        pass
    assert engine.calls == ["sync 0", "generate 0", "pause"]
    assert [sampler.take(step, 4) for step in (1, 2)] == [healthy.take(step, 4) for step in (1, 2)]
    assert engine.calls[2:6] == ["pause", "restart", "sync 1", "generate 1"]


def test_an_engine_that_was_paused_while_it_was_ahead_is_rebuilt_for_the_next_step() -> None:
    engine = FakeEngine()
    sampler, _ = make(engine, ahead=True)
    healthy, _ = make(FakeEngine(), ahead=True)
    assert sampler.take(0, 4) == healthy.take(0, 4)
    with sampler.paused():
        pass
    assert [sampler.take(step, 4) for step in (1, 2, 3)] == [
        healthy.take(step, 4) for step in (1, 2, 3)
    ]
    assert engine.calls.count("restart") == 1
    for each in (sampler, healthy):
        each.close()


@pytest.mark.parametrize("deaths", [[2, 3], [2, 4]], ids=["at once", "a step later"])
def test_the_second_death_comes_out(deaths: list[int]) -> None:
    engine = FakeEngine(deaths=deaths)
    sampler, _ = make(engine)
    sampler.take(0, 4)
    with pytest.raises(EngineDied, match="killed"):
        for step in range(1, 4):
            sampler.take(step, 4)
    assert engine.calls.count("restart") == 1


def test_an_engine_that_cannot_be_restarted_is_not_said_to_be() -> None:
    engine = FakeEngine(deaths=[2])
    engine.can_restart = False
    sampler, warnings = make(engine)
    sampler.take(0, 4)
    with pytest.raises(EngineDied, match="killed"):
        sampler.take(1, 4)
    assert "restart" not in engine.calls and not warnings


def test_an_engine_found_dead_when_it_takes_the_weights_has_them_after_its_restart() -> None:
    engine = FakeEngine()
    sampler, warnings = make(engine)
    sampler.take(0, 2)
    engine.alive = False
    assert weights_and_seeds(sampler.take(1, 2))[0] == (1, 10)
    assert len(warnings) == 1


def test_a_death_while_sampling_ahead_is_mended_there() -> None:
    engine = FakeEngine(deaths=[2])
    sampler, warnings = make(engine, ahead=True)
    results = [sampler.take(step, 3) for step in range(3)]
    assert [weights_and_seeds(r)[0] for r in results] == [(0, 0), (0, 10), (1, 20)]
    assert len(warnings) == 1
    sampler.close()


def test_a_checkpoint_of_a_run_whose_engine_is_dead_for_good_keeps_nothing_ahead() -> None:
    engine = FakeEngine(deaths=[2, 3])
    sampler, _ = make(engine, ahead=True)
    sampler.take(0, 3)
    with pytest.raises(EngineDied):
        sampler.take(1, 3)
    assert sampler.pending() is None
    sampler.close()


def test_one_thread_asks_the_engine() -> None:
    engine = FakeEngine()
    sampler, _ = make(engine, ahead=True)
    with ThreadPoolExecutor(1) as other:
        results = list(other.map(lambda step: sampler.take(step, 3), range(3)))
    assert [r.step for r in results] == [0, 1, 2]
    # Weights never arrive while a batch is under way.
    assert engine.calls == ["sync 0", "generate 0", "generate 0", "sync 1", "generate 1"]
    sampler.close()


def test_an_evaluation_waits_for_what_is_sampled_ahead_and_has_the_same_restart() -> None:
    engine = FakeEngine(deaths=[3, 4])
    sampler, warnings = make(engine, ahead=True)
    sampler.take(0, 3)

    def evaluation() -> list[Completion]:
        return engine.generate(((1,),), (7,), PARAMS)

    sampler.sync(1)
    # The second call of generate was the step's after, and is over.
    assert engine.calls == ["sync 0", "generate 0", "generate 0", "sync 1"]
    with pytest.raises(EngineDied):
        sampler.guarded(evaluation)
    assert len(warnings) == 1 and engine.calls.count("restart") == 1
    assert weights_and_seeds(sampler.take(1, 2))[0] == (0, 10)
    sampler.close()
