"""vLLM in a process of its own beside the trainer, and its death."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from paint_engine.distributed import World
from paint_engine.rollout.engine import Completion, EngineDied, SamplingParams
from paint_engine.rollout.vllm_engine import VllmEngine, own_environment

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


def test_a_whole_model_is_there_again_after_a_death(
    make_student: Callable[..., nn.Module],
    model_dir: Path,
    world: World,
    prompts: Prompts,
    params: SamplingParams,
    mismatch: Callable[..., float],
    train_step: Callable[[nn.Module, int], None],
    left_in_shared_memory: Callable[[], list[str]],
) -> None:
    """The memory with the weights is the trainer's; training has gone on since."""
    elsewhere = left_in_shared_memory()
    student = make_student(lora=False)
    engine = VllmEngine(
        student,
        str(model_dir),
        world,
        max_model_len=512,
        max_sequences=8,
        gpu_memory_utilization=0.1,
        own_process=True,
    )
    seeds = range(len(prompts))
    train_step(student, 1)
    engine.sync(1)
    before = engine.generate(prompts, seeds, params)
    assert mismatch(student, prompts, before, params) < 1e-4
    train_step(student, 2)
    assert mismatch(student, prompts, before, params) > 0.01
    os.kill(engine._core._process.pid, signal.SIGKILL)
    with pytest.raises(EngineDied, match="exit code -9"):
        engine.generate(prompts, seeds, params)
    engine.restart()
    engine.generate(prompts, seeds, params, base=True)
    assert engine.generate(prompts, seeds, params) == before
    engine.sync(2)
    assert mismatch(student, prompts, engine.generate(prompts, seeds, params), params) < 1e-4
    assert left_in_shared_memory() == elsewhere
    engine.close()


# A trainer whose engine generates for ever, after it has shown that it can.
TRAINER = """
import sys
import torch
from paint_engine.config.sections import LoraSection, ModelSection
from paint_engine.distributed import World
from paint_engine.model.load import load_base
from paint_engine.model.lora import add_lora
from paint_engine.rollout.engine import SamplingParams
from paint_engine.rollout.vllm_engine import VllmEngine

if __name__ == "__main__":
    world = World(0, 1, 0, torch.device("cpu"))
    base = load_base(ModelSection(name_or_path=sys.argv[1]), world.device)
    engine = VllmEngine(
        add_lora(base, LoraSection(rank=4, alpha=8), seed=0),
        sys.argv[1],
        world,
        max_model_len=512,
        max_sequences=8,
        gpu_memory_utilization=0.1,
        own_process=True,
    )
    engine.generate([(1,)], [0], SamplingParams(1.0, 1.0, -1, 4, (), 300), base=True)
    print("engine", engine._core._process.pid, flush=True)
    params = SamplingParams(1.0, 1.0, -1, 500, (), 300)
    engine.generate([(1,)] * 10_000, range(10_000), params, base=True)
"""


def test_a_killed_trainer_takes_a_generating_engine_along(model_dir: Path, tmp_path: Path) -> None:
    """SIGKILL leaves it nothing to say, and an engine that lived on would keep the GPU."""
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    trainer = subprocess.Popen(
        [sys.executable, str(script), str(model_dir)], stdout=subprocess.PIPE, text=True
    )
    assert trainer.stdout is not None
    # vLLM prints to the same place.
    told = next(line for line in trainer.stdout if line.startswith("engine "))
    pid = int(told.split()[1])
    try:
        # Into the long batch.
        time.sleep(3)
        used_before = _cpu_ticks(pid)
        time.sleep(0.5)
        assert _cpu_ticks(pid) > used_before
        trainer.kill()
        trainer.wait()
        deadline = time.monotonic() + 6
        while _is_running(pid):
            assert time.monotonic() < deadline, "the engine outlived its trainer"
            time.sleep(0.1)
    finally:
        trainer.kill()
        trainer.communicate()
        if _is_running(pid):
            os.kill(pid, signal.SIGKILL)


def _stat(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _cpu_ticks(pid: int) -> int:
    return int(_stat(pid)[11]) + int(_stat(pid)[12])


def _is_running(pid: int) -> bool:
    # Where nothing reaps orphans, a dead one stays listed as a zombie.
    return Path(f"/proc/{pid}").exists() and _stat(pid)[0] != "Z"


@pytest.mark.parametrize(
    ("listed", "gpu"), [(None, "1"), ("", "1"), ("3,5,7", "5"), ("GPU-a, GPU-b", "GPU-b")]
)
def test_an_engine_sees_the_gpu_of_its_rank(
    monkeypatch: pytest.MonkeyPatch, listed: str | None, gpu: str
) -> None:
    """By its place on the node; its compiled code goes by its place among all, for nodes may share
    the cache's disk."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if listed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    monkeypatch.setenv("VLLM_CACHE_ROOT", "/cache")
    environment = own_environment(World(5, 8, 1, torch.device("cuda", 1)))
    assert environment == {"CUDA_VISIBLE_DEVICES": gpu, "VLLM_CACHE_ROOT": "/cache/rank-5"}
    assert own_environment(World(0, 1, 0, torch.device("cpu"))) == {}
