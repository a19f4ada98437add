"""Of two processes in one run directory, one is refused, and the other ends as if it were alone.

`python -m bench.soak --parts starts` does it at random moments.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file

from paint_engine.checkpoint.directory import list_checkpoints

NUM_STEPS = 12


def start(argv: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "paint_engine.train", *argv],
        env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def what_it_is(run_dir: Path) -> tuple[list[tuple[int, float, float]], dict[str, bytes]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    losses = [(row["step"], row["loss"], row["grad_norm"]) for row in map(json.loads, lines)]
    weights = load_file(run_dir / "checkpoints" / f"step-{NUM_STEPS}/adapter_model.safetensors")
    return losses, {name: tensor.numpy().tobytes() for name, tensor in weights.items()}


def test_of_two_processes_in_a_directory_one_is_refused(command: list[str], tmp_path: Path) -> None:
    steps = ["--train.num_steps", str(NUM_STEPS), "--eval.enabled", "false"]
    argv = [*command, *steps, "--run.dir"]
    # With as many threads as the others, on which the last digits depend.
    alone = start([*argv, str(tmp_path / "alone")])
    text = alone.communicate(timeout=600)[0]
    assert alone.returncode == 0, text
    expected = what_it_is(tmp_path / "alone")
    run_dir = tmp_path / "run"
    pair = [start([*argv, str(run_dir)]) for _ in range(2)]
    while not list_checkpoints(run_dir):
        time.sleep(0.02)
    # The one that was first waits, so that the other ones find it at work.
    refused, first = sorted(pair, key=lambda process: process.pid == holder(run_dir))
    first.send_signal(signal.SIGSTOP)
    try:
        for other in (refused, start(["--resume", str(run_dir)])):
            text = other.communicate(timeout=600)[0]
            assert other.returncode == 2, text
            assert f"error: run directory {run_dir} is in use by process {first.pid} on " in text
            assert text.count("error: ") == 1 and "Traceback" not in text
    finally:
        first.send_signal(signal.SIGCONT)
    text = first.communicate(timeout=600)[0]
    assert first.returncode == 0, text
    assert what_it_is(run_dir) == expected


def holder(run_dir: Path) -> int:
    return json.loads((run_dir / ".lock-1").read_text())["pid"]
