"""A run that is killed at random moments, and started again each time, ends as one that never was.

By default 4 kills; twenty take some minutes:

    PAINT_TEST_KILLS=20 python -m pytest --timeout 1800 \\
        tests/paint_engine/training/test_kill_and_resume.py
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from paint_engine.checkpoint.directory import list_checkpoints

NUM_KILLS = int(os.environ.get("PAINT_TEST_KILLS", "4"))
# Room for every kill to come while steps are still to be done, on a fast machine too.
NUM_STEPS = 50 * NUM_KILLS


def start(command: list[str], run_dir: Path, log: Path) -> subprocess.Popen[bytes]:
    overrides = {
        "run.dir": run_dir,
        "run.auto_resume": "true",
        "train.num_steps": NUM_STEPS,
        "optim.schedule": "cosine",
        "eval.enabled": "false",
    }
    arguments = [part for key, value in overrides.items() for part in (f"--{key}", str(value))]
    with log.open("ab") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "paint_engine.train", *command, *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=stream,
            stderr=subprocess.STDOUT,
        )


def newest(run_dir: Path) -> str | None:
    checkpoints = list_checkpoints(run_dir)
    return checkpoints[-1].name if checkpoints else None


def kill_once(
    process: subprocess.Popen[bytes], run_dir: Path, wait_s: float, *, early: bool
) -> bool:
    """SIGKILL, `wait_s` after the start (early) or after the process's first checkpoint; whether it
    was still running."""
    before, began = newest(run_dir), time.monotonic()
    while not early and process.poll() is None and newest(run_dir) == before:
        assert time.monotonic() - began < 600
        time.sleep(0.002)
    time.sleep(wait_s)
    killed = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return killed


def losses(run_dir: Path) -> list[tuple[int, float, float]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [(row["step"], row["loss"], row["grad_norm"]) for row in map(json.loads, lines)]


def test_killed_at_random_moments_the_run_ends_the_same(command: list[str], tmp_path: Path) -> None:
    rng = random.Random(time.time_ns())
    log, whole, killed = tmp_path / "log.txt", tmp_path / "whole", tmp_path / "killed"
    # Its last arguments win, so that the fixture's own run.dir gives way.
    reference = start(command, whole, log)
    moments: list[str] = []
    num_killed = 0
    for attempt in range(2 * NUM_KILLS):
        if num_killed == NUM_KILLS:
            break
        early = attempt % 4 == 0
        wait_s = rng.uniform(0, 8 if early else 0.3)
        process = start(command, killed, log)
        num_killed += kill_once(process, killed, wait_s, early=early)
        moments.append(f"{'early' if early else 'late'} {wait_s:.3f} s, at {newest(killed)}")
    assert start(command, killed, log).wait(timeout=900) == 0, log.read_text()[-4000:]
    assert reference.wait(timeout=900) == 0, log.read_text()[-4000:]
    assert num_killed == NUM_KILLS, moments
    assert losses(killed) == losses(whole), moments
    assert [step for step, _, _ in losses(whole)] == list(range(1, NUM_STEPS + 1))
    ends = [run / "checkpoints" / f"step-{NUM_STEPS}" for run in (whole, killed)]
    one, other = [(end / "adapter_model.safetensors").read_bytes() for end in ends]
    assert one == other, moments
    # By content, for the metadata before it comes in any order.
    (shards,) = zip(*(sorted((end / "trainer").iterdir()) for end in ends), strict=True)
    expected, actual = (load_file(shard) for shard in shards)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected), moments
