"""The command line with vLLM: whole runs on the bundled model, and engines killed under them."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from paint_engine.checkpoint_files import list_checkpoints
from paint_engine.metrics import read_jsonl

SETTINGS = {
    "rollout.engine": "vllm",
    "rollout.max_sequences": 8,
    "train.batch_size": 4,
    "eval.num_problems": 3,
    "eval.num_samples": 2,
    "lora.rank": 8,
    "lora.alpha": 16,
    "checkpoint.every": 1,
}

Start = Callable[..., subprocess.Popen]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    processes = []

    def start(*extra: str) -> subprocess.Popen:
        settings = [part for key, value in SETTINGS.items() for part in (f"--{key}", str(value))]
        process = subprocess.Popen(
            [sys.executable, "-m", "paint_engine.train", *extra, *settings],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def finish(process: subprocess.Popen) -> str:
    printed, _ = process.communicate(timeout=240)
    return printed


def kill_engine(trainer: subprocess.Popen, run: Path, after_step: int) -> None:
    """Kills the engine's process once the step is saved: the next batch is then under way."""
    deadline = time.monotonic() + 200
    while not any(int(p.name[5:]) >= after_step for p in list_checkpoints(run)):
        assert time.monotonic() < deadline and trainer.poll() is None, finish(trainer)
        time.sleep(0.02)
    # The kernel lists children by the thread that started them.
    threads = Path(f"/proc/{trainer.pid}/task").glob("*/children")
    children = [child for thread in threads for child in thread.read_text().split()]
    engines = [c for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]
    (engine,) = engines
    os.kill(int(engine), signal.SIGKILL)


def left_in_shared_memory(pid: int) -> list[Path]:
    return list(Path("/dev/shm").glob(f"paint-{pid}-*"))


def test_a_run_samples_from_the_weights_that_it_trains(start: Start, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start("--run.dir", str(run), "--train.num_steps", "3")
    printed = finish(process)
    assert process.returncode == 0, printed[-4000:]
    metrics = read_jsonl(run / "metrics.jsonl")
    assert [m["rollout_lag"] for m in metrics] == [0, 0, 0]
    for step in metrics:
        assert 0 < step["rollout_logprob_diff"] < 1e-5
        assert step["rollout_ess"] > 0.999 and step["rollout_outside_share"] < 0.01
    assert "Avg@2 before:" in printed and "Avg@2 after:" in printed
    assert not left_in_shared_memory(process.pid)


def test_an_engine_killed_once_costs_a_batch_and_twice_stops_with_a_checkpoint(
    start: Start, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    long = ("--train.num_steps", "400", "--eval.enabled", "false", "--checkpoint.keep", "1000")
    process = start("--run.dir", str(run), "--rollout.ahead", "1", *long)
    kill_engine(process, run, 2)
    kill_engine(process, run, 2 + len(list_checkpoints(run)) + 2)
    printed = finish(process)
    assert process.returncode == 1, printed[-4000:]
    assert "it is restarted once" in printed and "the rollout engine died twice" in printed
    assert not left_in_shared_memory(process.pid)
    metrics = read_jsonl(run / "metrics.jsonl")
    last = int(list_checkpoints(run)[-1].name[5:])
    assert [m["step"] for m in metrics] == list(range(1, last + 1))
    assert last >= 5
    # The batch that was lost came again, from the weights that it was first asked of.
    assert [m["rollout_lag"] for m in metrics] == [0] + [1] * (last - 1)
    found = re.search(r"go on with: python -m paint_engine\.train (--resume \S+)", printed)
    assert found is not None
    again = start(*found[1].split(), "--train.num_steps", str(last + 2))
    printed = finish(again)
    assert again.returncode == 0, printed[-4000:]
    assert len(read_jsonl(run / "metrics.jsonl")) == last + 2
