"""The command line with vLLM: whole runs on the bundled model, alone and on two ranks, and engines
killed under them."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from paint_engine.checkpoint.directory import list_checkpoints
from paint_engine.files import read_jsonl
from paint_engine.report.records import read_metrics

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

    def start(*extra: str, ranks: int = 1) -> subprocess.Popen:
        settings = [part for key, value in SETTINGS.items() for part in (f"--{key}", str(value))]
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        process = subprocess.Popen(
            [
                sys.executable,
                *(torchrun if ranks > 1 else []),
                *("-m", "paint_engine.train", *extra, *settings),
            ],
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


def kill_engine(
    trainer: subprocess.Popen, run: Path, after_step: int, *, num_engines: int = 1
) -> None:
    """Kills an engine's process once the step is saved: the next batch is then under way."""
    deadline = time.monotonic() + 200
    while not any(int(p.name[5:]) >= after_step for p in list_checkpoints(run)):
        assert time.monotonic() < deadline and trainer.poll() is None, finish(trainer)
        time.sleep(0.02)
    children = psutil.Process(trainer.pid).children(recursive=True)
    engines = [
        c for c in children if any("vllm_process import serve" in part for part in c.cmdline())
    ]
    assert len(engines) == num_engines
    engines[0].kill()


def left_in_shared_memory(pid: int) -> list[Path]:
    return list(Path("/dev/shm").glob(f"paint-{pid}-*"))


def test_a_run_samples_from_the_weights_that_it_trains(start: Start, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start("--run.dir", str(run), "--train.num_steps", "3")
    printed = finish(process)
    assert process.returncode == 0, printed[-4000:]
    metrics = read_metrics(run / "metrics.jsonl")
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
    assert printed.count("it is restarted once") == 1
    assert re.search(r"the rollout engine failed \(.*\); saved ", printed)
    assert not left_in_shared_memory(process.pid)
    metrics = read_jsonl(run / "metrics.jsonl")
    last = int(list_checkpoints(run)[-1].name[5:])
    assert [m["step"] for m in metrics] == list(range(1, last + 1))
    assert last >= 5
    # The batch that was lost came again, from the weights that it was first asked of.
    assert [m["rollout_lag"] for m in metrics] == [0] + [1] * (last - 1)
    found = re.search(r"resume with: python -m paint_engine\.train (--resume \S+)", printed)
    assert found is not None
    again = start(*found[1].split(), "--train.num_steps", str(last + 2))
    printed = finish(again)
    assert again.returncode == 0, printed[-4000:]
    assert len(read_jsonl(run / "metrics.jsonl")) == last + 2


@pytest.mark.parametrize(
    "extra",
    [
        ("--lora.enabled", "false"),
        ("--rollout.tensor_parallel_size", "2", "--parallel.shard", "replicate"),
        ("--rollout.ahead", "1"),
    ],
    ids=["all weights", "one engine over both", "ahead"],
)
def test_two_ranks(start: Start, tmp_path: Path, extra: tuple[str, ...]) -> None:
    run, files = tmp_path / "run", tmp_path / "files"
    files.mkdir()
    options = ("--run.dir", str(run), "--rollout.adapter_dir", str(files), "--eval.enabled=false")
    process = start(*options, "--train.num_steps", "3", *extra, ranks=2)
    printed = finish(process)
    assert process.returncode == 0, printed[-4000:]
    metrics = read_jsonl(run / "metrics.jsonl")
    ahead = "--rollout.ahead" in extra
    assert [m["rollout_lag"] for m in metrics] == ([0, 1, 1] if ahead else [0, 0, 0])
    for step in metrics:
        assert 0 < step["rollout_logprob_diff"] < 1e-5 or step["rollout_lag"]
    assert list(files.iterdir()) == []


def test_an_engine_of_one_of_two_ranks_is_killed(start: Start, tmp_path: Path) -> None:
    """Not sampled ahead, with sharded weights: the other rank waits, and the run continues."""
    run, files = tmp_path / "run", tmp_path / "files"
    files.mkdir()
    options = ("--run.dir", str(run), "--rollout.adapter_dir", str(files), "--eval.enabled=false")
    shard = ("--parallel.shard", "full", "--checkpoint.keep", "1000")
    process = start(*options, "--train.num_steps", "8", *shard, ranks=2)
    kill_engine(process, run, 2, num_engines=2)
    printed = finish(process)
    assert process.returncode == 0, printed[-4000:]
    assert (
        len(re.findall(r"rank [01]: the rollout engine failed .* it is restarted once", printed))
        == 1
    )
    metrics = read_jsonl(run / "metrics.jsonl")
    assert [m["step"] for m in metrics] == list(range(1, 9))
    for step in metrics:
        assert step["rollout_lag"] == 0 and 0 < step["rollout_logprob_diff"] < 1e-5
    assert list(files.iterdir()) == []


def test_a_teacher_that_reasons_first_writes_with_its_own_weights(
    start: Start, tmp_path: Path
) -> None:
    written = {}
    for weights in ("fixed", "live"):
        run = tmp_path / weights
        settings = {
            "run.dir": run,
            "teacher.weights": weights,
            "teacher.reason_first": "true",
            "teacher.reason_max_new_tokens": 24,
            "train.num_steps": 2,
            # One step far enough away that other words are drawn.
            "optim.learning_rate": 0.3,
            "eval.enabled": "false",
        }
        process = start(
            *(part for key, value in settings.items() for part in (f"--{key}", str(value)))
        )
        printed = finish(process)
        assert process.returncode == 0, printed[-4000:]
        samples = read_jsonl(run / "samples.jsonl")
        written[weights] = [[s["rationale"] for s in samples if s["step"] == n] for n in (1, 2)]
    # Before the first step both are the base; then only one of them moves.
    assert written["fixed"][0] == written["live"][0] and all(written["fixed"][0])
    assert written["fixed"][1] != written["live"][1]


def test_importance_weights_of_the_engines_own_probabilities_are_one(
    start: Start, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    short = ("--train.num_steps", "2", "--grpo.group_size", "4", "--eval.enabled", "false")
    # A group of equal rewards has no passes otherwise.
    short += ("--grpo.skip_zero_variance", "false")
    process = start("--preset", "grpo-tiny", "--run.dir", str(run), *short)
    printed = finish(process)
    assert process.returncode == 0, printed[-4000:]
    for step in read_jsonl(run / "metrics.jsonl"):
        assert abs(step["importance_weight"] - 1) < 1e-4
        assert step["ratio"] == 1.0 and 0 < step["rollout_logprob_diff"] < 1e-4


EVENTS = """
import sys, time
from paint_engine.rollout import vllm_engine

class Recorded(vllm_engine.OwnProcess):
    def __init__(self, llm_args, *rest):
        super().__init__(llm_args, *rest)
        self.share, self.open = llm_args["gpu_memory_utilization"], True
        self.say("starts", llm_args["max_num_seqs"], llm_args["max_model_len"])

    def say(self, *words):
        with open(sys.argv[1], "a") as file:
            print(self.share, *words, file=file)

    def close(self):
        super().close()
        if self.open:
            self.say("ends")
        self.open = False

if __name__ == "__main__":
    vllm_engine.OwnProcess = Recorded
    from paint_engine import train
    train.main(sys.argv[2:])
"""


def test_evaluations_have_an_engine_of_their_own_while_that_of_rollouts_ends(
    tmp_path: Path,
) -> None:
    """Their answers are those of the shared engine, and so are the rollouts after them."""
    script, events, runs = tmp_path / "events.py", tmp_path / "events", {}
    script.write_text(EVENTS)
    own = ("--eval.gpu_memory_utilization", "0.2", "--eval.max_concurrent", "5")
    for name, extra in (("shared", ()), ("own", own)):
        settings = [part for key, value in SETTINGS.items() for part in (f"--{key}", str(value))]
        options = ("--run.dir", tmp_path / name, "--eval.base_cache", "none", "--eval.every", "0")
        options += ("--train.num_steps", "1", "--rollout.max_new_tokens", "96")
        options += ("--rollout.gpu_memory_utilization", "0.1", *extra)
        done = subprocess.run(
            [sys.executable, script, events, *map(str, options), *settings],
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        found = (tmp_path / name / "evaluations").glob("*.jsonl")
        answers = {path.name: path.read_text() for path in found}
        steps = [
            (m["num_loss_tokens"], m["rollout_lag"], m["rollout_logprob_diff"] < 1e-5)
            for m in read_metrics(tmp_path / name / "metrics.jsonl")
        ]
        runs[name] = answers, steps
    assert runs["own"] == runs["shared"]
    lines = events.read_text().split("\n")[:-1]
    kinds = [" ".join(line.split()[:3]) for line in lines]
    # After the last step no rollouts come.
    rollouts, answered = ["0.1 starts 8", "0.1 ends"], ["0.2 starts 5", "0.2 ends"]
    assert kinds == [*rollouts, *answered, *rollouts, *answered]
    lengths = {line.split()[0]: int(line.split()[3]) for line in lines if "starts" in line}
    # Rollouts of 96 tokens need no room for an evaluation's answer.
    assert lengths["0.1"] < lengths["0.2"]
