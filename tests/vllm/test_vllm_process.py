"""vLLM in a process of its own beside the trainer, and its death."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from paint_engine.distributed import World
from paint_engine.rollout import EngineDied
from paint_engine.rollout_hf import Completion, SamplingParams
from paint_engine.rollout_vllm import VllmEngine

Prompts = Sequence[tuple[int, ...]]
# What torchrun tells a process. An engine that believed it would wait for a second rank for ever.
TORCHRUN = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "1",
    "TORCHELASTIC_RUN_ID": "none",
}


@pytest.fixture(scope="module")
def student(make_student: Callable[..., nn.Module]) -> nn.Module:
    return make_student()


@pytest.fixture(scope="module")
def engine(student: nn.Module, model_dir: Path, world: World) -> Iterator[VllmEngine]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in TORCHRUN.items():
            patch.setenv(name, value)
        engine = VllmEngine(
            student,
            str(model_dir),
            world,
            max_model_len=512,
            max_sequences=8,
            gpu_memory_utilization=0.1,
            own_process=True,
        )
        assert os.environ["WORLD_SIZE"] == "2"
    engine.sync(0)
    yield engine
    engine.close()


def test_each_step_samples_from_its_own_weights(
    engine: VllmEngine,
    student: nn.Module,
    prompts: Prompts,
    params: SamplingParams,
    mismatch: Callable[..., float],
    train_step: Callable[[nn.Module, int], None],
) -> None:
    seeds = range(len(prompts))
    for step in (1, 2):
        train_step(student, step)
        engine.sync(step)
        completions = engine.generate(prompts, seeds, params)
        base = engine.generate(prompts, seeds, params, base=True)
        assert mismatch(student, prompts, completions, params) < 1e-4
        assert mismatch(student, prompts, completions, params, base=True) > 0.01
        assert mismatch(student, prompts, base, params, base=True) < 1e-4
    # The trainer's process has neither joined a process group nor lost its threads' setting.
    assert not torch.distributed.is_initialized()


def test_it_generates_while_this_process_trains(
    engine: VllmEngine,
    student: nn.Module,
    prompts: Prompts,
    params: SamplingParams,
    train_step: Callable[[nn.Module, int], None],
) -> None:
    """What is sampled ahead is of the weights of the last `sync`, whatever training does then."""
    expected = engine.generate(prompts, range(len(prompts)), params)
    sampled: list[list[Completion]] = []
    thread = threading.Thread(
        target=lambda: sampled.append(engine.generate(prompts, range(len(prompts)), params))
    )
    thread.start()
    train_step(student, 3)
    thread.join()
    assert sampled == [expected]


def test_killed_while_it_generates(
    engine: VllmEngine,
    student: nn.Module,
    prompts: Prompts,
    params: SamplingParams,
    mismatch: Callable[..., float],
    left_in_shared_memory: Callable[[], list[str]],
) -> None:
    engine.sync(4)
    seeds = range(len(prompts))
    before = engine.generate(prompts, seeds, params)
    pid = engine._core._process.pid
    assert pid is not None
    many = 400
    killer = threading.Timer(0.3, os.kill, (pid, signal.SIGKILL))
    killer.start()
    began = time.monotonic()
    with pytest.raises(EngineDied, match="exit code -9"):
        engine.generate([prompts[0]] * many, range(many), params)
    killer.join()
    assert time.monotonic() - began < 60
    with pytest.raises(EngineDied):
        engine.generate(prompts, seeds, params)
    engine.restart()
    assert engine.generate(prompts, seeds, params) == before
    assert mismatch(student, prompts, before, params) < 1e-4
    engine.close()
    assert left_in_shared_memory() == []
    # A second close, as when a run that failed is cleaned up, does no harm.
    engine.close()
