"""Making the missing runs: failures, kills, stored results and the choice of rates."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.paper.plan import BASE, LAPTOP, Job, Scale, quick, table_runs
from bench.paper.runs import RESULT, best_rates, make_pool, run_missing, visible_gpus

LAST = {"step": 20, "avg_at_k": 0.5}
PERFORMED: list[str] = []
FAILING: set[str] = set()


def stub(job: Job) -> dict[str, Any]:
    """Like perform_job, without training."""
    if job.run.run_id in FAILING:
        FAILING.remove(job.run.run_id)
        raise RuntimeError("the machine is on fire")
    PERFORMED.append(job.run.run_id)
    record = {"id": job.run.run_id, **job.settings, "evaluations": [LAST], "seconds": 1.0}
    job.directory.mkdir(parents=True, exist_ok=True)
    (job.directory / RESULT).write_text(json.dumps(record))
    return record


def test_a_failed_run_leaves_the_others_and_is_repeated(
    jobs_of: Callable[[Scale], list[Job]],
) -> None:
    PERFORMED.clear()
    FAILING.add("small/sft/seed-1")
    jobs = jobs_of(replace(quick(LAPTOP), rows=(BASE, "sft", "paint")))
    said: list[str] = []
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(RuntimeError, match=r"sft/seed-1[\s\S]*on fire"):
            run_missing(jobs, pool, perform=stub, say=said.append)
        made = list(PERFORMED)
        assert len(made) == len(jobs) - 1 and len(said) == len(jobs)
        records = run_missing(jobs, pool, perform=stub, say=said.append)
    assert PERFORMED[len(made) :] == ["small/sft/seed-1"]
    assert list(records) == [job.run.run_id for job in jobs]


def test_a_stored_run_with_other_settings_is_repeated(
    jobs_of: Callable[[Scale], list[Job]],
) -> None:
    PERFORMED.clear()
    scale = replace(quick(LAPTOP), rows=(BASE,))
    with ThreadPoolExecutor(1) as pool:
        for num_problems, made in ((128, 2), (128, 2), (64, 4)):
            one = replace(scale, num_problems=num_problems)
            jobs = jobs_of(one)
            run_missing(jobs, pool, perform=stub, say=lambda text: None)
            assert len(PERFORMED) == made


def test_a_stored_run_of_another_base_is_repeated(
    jobs_of: Callable[[Scale], list[Job]], tmp_path: Path
) -> None:
    PERFORMED.clear()
    scale = replace(LAPTOP, sizes=("small", "large"), rows=(BASE,), main_seeds=(0,))
    jobs = jobs_of(scale)
    with ThreadPoolExecutor(1) as pool:
        run_missing(jobs, pool, perform=stub, say=lambda text: None)
        (tmp_path / "bases" / "large" / "model.safetensors").write_bytes(b"trained anew")
        run_missing(jobs, pool, perform=stub, say=lambda text: None)
    assert PERFORMED == ["large/base/seed-0", "small/base/seed-0", "large/base/seed-0"]


@pytest.mark.parametrize(
    ("allowed", "count", "expected"), [(None, 2, ["0", "1"]), ("4,6", 2, ["4", "6"]), ("", 0, [])]
)
def test_workers_keep_to_the_gpus_that_they_may_use(
    monkeypatch: pytest.MonkeyPatch, allowed: str | None, count: int, expected: list[str]
) -> None:
    if allowed is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", allowed)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    assert visible_gpus() == expected


def test_more_workers_than_gpus_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.paper.runs.visible_gpus", lambda: ["6"])
    with make_pool(2, on_gpus=True) as pool:
        found = [pool.submit(os.getenv, "CUDA_VISIBLE_DEVICES") for _ in range(2)]
        assert [future.result() for future in found] == ["6", "6"]


KILLED_SCRIPT = """
import sys, time, types
from pathlib import Path

from bench.paper.plan import LAPTOP, quick, table_runs
from bench.paper.runs import make_jobs, make_pool, run_missing

directory = Path(sys.argv[1])

def perform(job):
    (directory / "started").open("a").write(job.run.run_id + "\\n")
    time.sleep(0.3)
    step = {"step": 20, "avg_at_k": 0.5}
    return {"id": job.run.run_id, **job.settings, "evaluations": [step], "seconds": 1.0}

# Also in the worker, which runs this file: this test needs no training.
sys.modules["bench.paper.worker"] = types.SimpleNamespace(perform=perform)

if __name__ == "__main__":
    scale = quick(LAPTOP)
    rates = {("small", recipe): 1e-4 for recipe in ("sft", "grpo", "opsd", "paint")}
    jobs = make_jobs(table_runs(scale, (1,)), scale, rates, directory, directory / "runs")
    with make_pool(1, on_gpus=False) as pool:
        run_missing(jobs, pool)
"""


def wait_for(condition: Any, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_killed_command_leaves_no_worker_and_resumes(tmp_path: Path) -> None:
    script, started = tmp_path / "script.py", tmp_path / "started"
    script.write_text(KILLED_SCRIPT)
    command = [sys.executable, str(script), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    def results() -> set[str]:
        return {str(p.parent.relative_to(tmp_path / "runs")) for p in tmp_path.rglob(RESULT)}

    child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    wait_for(lambda: len(results()) >= 3)
    child.send_signal(signal.SIGKILL)
    child.wait()
    # The worker exits with the command: no further run starts.
    time.sleep(0.5)
    begun, finished = started.read_text().split(), results()
    time.sleep(1.0)
    assert started.read_text().split() == begun and results() == finished
    assert 3 <= len(finished) < 10
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    again = started.read_text().split()[len(begun) :]
    assert sorted([*finished, *again]) == sorted(r.run_id for r in table_runs(quick(LAPTOP), (1,)))


def sweep_record(rate: float, accuracy: float, recipe: str = "paint") -> dict[str, Any]:
    evaluations = [{"step": 20, "avg_at_k": accuracy}]
    return {
        "size": "small",
        "setting": recipe,
        "learning_rate": rate,
        "evaluations": evaluations,
    }


def test_the_best_rate_or_the_lower_of_equals_is_chosen() -> None:
    scale = replace(LAPTOP, rates=(1e-4, 3e-4, 1e-3))
    sweep = [sweep_record(rate, x) for rate, x in ((1e-4, 0.6), (3e-4, 0.7), (1e-3, 0.7))]
    sweep += [sweep_record(rate, x, "sft") for rate, x in ((1e-4, 0.6), (3e-4, 0.7), (1e-3, 0.8))]
    rates, found = best_rates(scale, sweep)
    assert rates == {("small", "paint"): 3e-4, ("small", "sft"): 1e-3}
    assert [choice["at_grid_edge"] for choice in found] == [False, True]
    assert [entry["avg_at_k"] for entry in found[1]["tried"]] == [0.6, 0.7, 0.8]
