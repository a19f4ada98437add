"""Several processes on a CPU: the training of one, however it is divided."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from paint_engine.checkpoint.directory import list_checkpoints
from paint_engine.files import read_jsonl

RunRanks = Callable[[int, Sequence[Sequence[object]]], None]
NUM_STEPS = 10
VARIANTS = {
    (shard, lora): ("--parallel.shard", shard, "--lora.enabled", str(lora).lower())
    for shard in ("full", "replicate")
    for lora in (True, False)
}


def trained(run_dir: Path) -> dict[str, Tensor]:
    """The weights after the last step, as peft or transformers read them."""
    (file,) = (run_dir / "checkpoints" / f"step-{NUM_STEPS}").glob("*model.safetensors")
    return load_file(file)


@pytest.fixture(scope="module")
def settings(
    model_dir: Path, tmp_path_factory: pytest.TempPathFactory, write_rows: Callable[..., Path]
) -> list[str]:
    rows = write_rows(tmp_path_factory.mktemp("rows") / "train.jsonl")
    values = {
        "model.name_or_path": model_dir,
        "data.path": rows,
        "eval.enabled": "false",
        "train.num_steps": NUM_STEPS,
        # Not a multiple of the ranks: some have a rollout more, or none in the last micro-batch.
        "train.batch_size": 6,
        "train.max_tokens_per_microbatch": 300,
        "train.device": "cpu",
        "rollout.max_new_tokens": 16,
        "lora.rank": 4,
        "lora.alpha": 8,
        "optim.learning_rate": 1e-3,
        "checkpoint.every": 0,
    }
    return [part for key, value in values.items() for part in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def runs(
    settings: list[str], tmp_path_factory: pytest.TempPathFactory, run_ranks: RunRanks
) -> Path:
    """One directory for each number of ranks, way of sharding and kind of training; activations
    are recomputed on two ranks."""
    root = tmp_path_factory.mktemp("ranks")
    for num_ranks in (1, 2, 4):
        commands = [
            [
                *settings,
                *extra,
                "--run.dir",
                str(root / f"{num_ranks}-{shard}-{lora}"),
                "--parallel.activation_checkpointing",
                str(num_ranks == 2).lower(),
            ]
            for (shard, lora), extra in VARIANTS.items()
            if num_ranks > 1 or shard == "replicate"
        ]
        run_ranks(num_ranks, commands)
    return root


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "all weights"])
@pytest.mark.parametrize("shard", ["full", "replicate"])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_any_number_of_ranks_trains_as_one_process_does(
    num_ranks: int, shard: str, lora: bool, runs: Path
) -> None:
    one, several = runs / f"1-replicate-{lora}", runs / f"{num_ranks}-{shard}-{lora}"
    expected, actual = (read_jsonl(run / "metrics.jsonl") for run in (one, several))
    assert len(expected) == len(actual) == NUM_STEPS
    for step, other in zip(expected, actual, strict=True):
        assert other["loss"] == pytest.approx(step["loss"], rel=1e-5)
        for name in ("token_kl", "student_entropy", "overlap", "num_loss_tokens", "mask_ratio"):
            assert other[name] == pytest.approx(step[name], rel=1e-5), name
        assert other["grad_norm"] == pytest.approx(step["grad_norm"], rel=1e-4)
    weights, others = trained(one), trained(several)
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        assert torch.allclose(others[name], tensor, rtol=0, atol=1e-5), name
    # Losses that do not move would agree whatever the ranks did.
    assert len({step["loss"] for step in expected}) == NUM_STEPS


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_rank_is_heard_and_one_writes(num_ranks: int, runs: Path) -> None:
    run = runs / f"{num_ranks}-full-True"
    assert json.loads((run / "versions.json").read_text())["world_size"] == num_ranks
    samples = read_jsonl(run / "samples.jsonl")
    alone = read_jsonl(runs / "1-replicate-True" / "samples.jsonl")

    def seen(records: list[dict]) -> list[tuple]:
        return sorted((s["step"], s["problem_id"], "".join(s["tokens"])) for s in records)

    assert seen(samples) == seen(alone)
    assert (run / "report.html").exists()
    assert [path.name for path in list_checkpoints(run)] == [f"step-{NUM_STEPS}"]


def test_a_run_resumes_at_another_number_of_ranks_in_the_same_order(
    settings: list[str], runs: Path, tmp_path: Path, run_ranks: RunRanks
) -> None:
    run = tmp_path / "run"
    start = [*settings, "--run.dir", run, "--train.num_steps", "4", "--parallel.shard", "full"]
    run_ranks(2, [start])
    go_on = ["--resume", run, "--train.num_steps", str(NUM_STEPS)]
    run_ranks(1, [go_on])
    expected = read_jsonl(runs / "1-replicate-True" / "metrics.jsonl")
    actual = read_jsonl(run / "metrics.jsonl")
    for step, other in zip(expected, actual, strict=True):
        assert other["loss"] == pytest.approx(step["loss"], rel=1e-5)
    order = [
        [s["problem_id"] for s in read_jsonl(path / "samples.jsonl")]
        for path in (run, runs / "1-replicate-True")
    ]
    assert order[0] == order[1]
    for name, tensor in trained(runs / "1-replicate-True").items():
        assert torch.allclose(trained(run)[name], tensor, rtol=0, atol=1e-5), name


@pytest.fixture
def started(
    settings: list[str], tmp_path: Path, torchrun: Callable[..., subprocess.Popen]
) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts the command line under torchrun, and ends what is left of it."""
    processes = []

    def start(num_ranks: int, *extra: str, launcher: Sequence[str] = ()) -> subprocess.Popen:
        command = [*launcher, "-m", "paint_engine.train", *settings, *extra]
        process = torchrun(num_ranks, *command, cwd=tmp_path)
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + 600
    while not any(int(p.name[5:]) >= step for p in list_checkpoints(run)):
        assert time.monotonic() < deadline, f"no checkpoint of step {step} in {run}"
        time.sleep(0.02)


def worker_pids(launcher: subprocess.Popen) -> list[int]:
    """The launcher's children, in the order of their start, which is that of ranks."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    found = []
    for child in children:
        arguments = Path(f"/proc/{child}/cmdline").read_bytes()
        if b"paint_engine.train" in arguments:
            found.append(int(child))
    return sorted(found)


@pytest.mark.parametrize("names_a_directory", [True, False], ids=["run.dir", "made up"])
def test_a_killed_rank_under_torchrun_resumes_from_the_last_checkpoint(
    names_a_directory: bool, started: Callable[..., subprocess.Popen], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    directory = ("--run.dir", str(run)) if names_a_directory else ()
    long = ("--train.num_steps", "40", "--checkpoint.every", "1", "--checkpoint.keep", "2")
    process = started(2, *directory, *long, launcher=("--max-restarts", "1"))
    if not names_a_directory:
        while not list(tmp_path.glob("runs/*")):
            time.sleep(0.05)
        (run,) = tmp_path.glob("runs/*")
    wait_for_step(run, 3)
    os.kill(worker_pids(process)[1], signal.SIGKILL)
    printed, _ = process.communicate(timeout=900)
    assert process.returncode == 0, printed[-4000:]
    assert [m["step"] for m in read_jsonl(run / "metrics.jsonl")] == list(range(1, 41))
    # The second start went on and did not begin again.
    starts = re.findall(r"step (\d+)/40", printed)
    assert json.loads((run / "summary.json").read_text())["num_steps"] == 40
    assert printed.count("run directory: ") >= 2 and starts
    assert printed.count("step 1/40") == 1, printed


def test_sigterm_saves_on_every_rank_and_ends_cleanly(
    started: Callable[..., subprocess.Popen], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = started(
        2, "--run.dir", str(run), "--train.num_steps", "500", "--checkpoint.every", "5"
    )
    wait_for_step(run, 5)
    # A scheduler may reach one process first: the others must hear of it.
    os.kill(worker_pids(process)[1], signal.SIGTERM)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, printed[-4000:]
    last = list_checkpoints(run)[-1].name.removeprefix("step-")
    assert f"stopped after step {last}; saved" in printed
    assert [m["step"] for m in read_jsonl(run / "metrics.jsonl")] == list(range(1, int(last) + 1))
