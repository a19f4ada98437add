"""Making the missing runs: failures, kills, stored results and the choice of rates."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.paper.ledger import Ledger
from bench.paper.plan import (
    BASE,
    CONTROL,
    LAPTOP,
    PLANNED,
    RECIPES,
    TEACHERS,
    Job,
    Scale,
    quick,
    sweep_runs,
    table_runs,
)
from bench.paper.runs import Crew, best_rates, make_pool, run_missing, run_tables, visible_gpus
from bench.paper_tables import RESULTS
from paint_engine.config.command_line import load_config

LAST = {"step": 20, "avg_at_k": 0.5}
PERFORMED: list[str] = []
FAILING: set[str] = set()


def stub(job: Job) -> dict[str, Any]:
    """Like perform_job, without training."""
    if job.run.run_id in FAILING:
        FAILING.remove(job.run.run_id)
        raise RuntimeError("the machine is on fire")
    PERFORMED.append(job.run.run_id)
    return {
        "id": job.run.run_id,
        "size": job.run.size,
        "setting": job.run.setting,
        "learning_rate": job.rate,
        **job.settings,
        "evaluations": [LAST],
        "seconds": 1.0,
    }


def silent(text: str) -> None:
    pass


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "runs.jsonl")


def test_a_failed_run_leaves_the_others_and_is_repeated(
    jobs_of: Callable[[Scale], list[Job]], ledger: Ledger
) -> None:
    PERFORMED.clear()
    FAILING.add("small/sft/seed-1")
    jobs = jobs_of(replace(quick(LAPTOP), rows=(BASE, "sft", "paint")))
    said: list[str] = []
    with ThreadPoolExecutor(1) as pool:
        crew = Crew(pool, 1)
        with pytest.raises(RuntimeError, match=r"sft/seed-1[\s\S]*on fire"):
            run_missing(jobs, crew, ledger, perform=stub, say=said.append)
        made = list(PERFORMED)
        assert len(made) == len(jobs) - 1 and len(said) == len(jobs)
        (failure,) = Ledger(ledger.path).failures
        assert failure["id"] == "small/sft/seed-1"
        assert failure["error"] == "RuntimeError: the machine is on fire"
        # Another command reads the file.
        again = Ledger(ledger.path)
        run_missing(jobs, crew, again, perform=stub, say=said.append)
    assert PERFORMED[len(made) :] == ["small/sft/seed-1"]
    assert not again.missing(jobs)


def test_a_stored_run_with_other_settings_is_repeated(
    jobs_of: Callable[[Scale], list[Job]], ledger: Ledger
) -> None:
    PERFORMED.clear()
    scale = replace(quick(LAPTOP), rows=(BASE,))
    with ThreadPoolExecutor(1) as pool:
        for num_problems, made in ((128, 2), (128, 2), (64, 4)):
            one = replace(scale, num_problems=num_problems)
            run_missing(jobs_of(one), Crew(pool, 1), ledger, perform=stub, say=silent)
            assert len(PERFORMED) == made
    # The later runs have taken the place of the earlier ones.
    assert len(ledger.path.read_text().splitlines()) == 2


def test_a_stored_run_of_another_base_is_repeated(
    jobs_of: Callable[[Scale], list[Job]], tmp_path: Path, ledger: Ledger
) -> None:
    PERFORMED.clear()
    scale = replace(LAPTOP, sizes=("small", "30m"), rows=(BASE,), claim_seeds=(0,))
    jobs = jobs_of(scale)
    with ThreadPoolExecutor(1) as pool:
        run_missing(jobs, Crew(pool, 1), ledger, perform=stub, say=silent)
        (tmp_path / "bases" / "30m" / "model.safetensors").write_bytes(b"trained anew")
        run_missing(jobs, Crew(pool, 1), ledger, perform=stub, say=silent)
    assert PERFORMED == ["30m/base/seed-0", "small/base/seed-0", "30m/base/seed-0"]


def test_no_run_starts_after_the_time_and_those_begun_are_finished(
    jobs_of: Callable[[Scale], list[Job]], ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock of the command advances by 1 with each run that is finished, and stops them at
    2.5: two workers have then begun three or four."""
    jobs = jobs_of(replace(quick(LAPTOP), rows=(BASE, "sft", "paint")))
    begun: list[str] = []
    done: list[str] = []
    clock = SimpleNamespace(monotonic=lambda: float(len(done)))
    monkeypatch.setattr("bench.paper.runs.time", clock)

    def timed(job: Job) -> dict[str, Any]:
        begun.append(job.run.run_id)
        record = stub(job)
        done.append(job.run.run_id)
        return record

    with ThreadPoolExecutor(2) as pool:
        run_missing(jobs, Crew(pool, 2, 2.5), ledger, perform=timed, say=silent)
        assert 3 <= len(begun) <= 4 < len(jobs)
        assert sorted(ledger.records) == sorted(begun)
        run_missing(jobs, Crew(pool, 2, 2.5), ledger, perform=timed, say=silent)
        assert len(ledger.records) == len(begun)
        run_missing(jobs, Crew(pool, 2), ledger, perform=timed, say=silent)
    assert not ledger.missing(jobs)


def test_the_runs_that_are_left_are_counted(
    bases: Path, tmp_path: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First of the sweep, which the tables wait for, then of the tables."""
    scale = replace(quick(LAPTOP), rows=(BASE, "paint"), rates=(1e-4, 3e-4))
    places = scale, (1,), bases, tmp_path
    monkeypatch.setattr("bench.paper.runs.run_missing", partial(run_missing, perform=stub))
    with ThreadPoolExecutor(1) as pool:
        late = Crew(pool, 1, time.monotonic())
        ledger.add_failure("small/paint/seed-0", "RuntimeError: on fire")
        ledger.add_failure("small/sft/seed-0", "RuntimeError: of no row here")
        assert run_tables(*places, late, ledger, say=silent) == 2 + 4
        finished = run_tables(*places, Crew(pool, 1), ledger, say=silent)
        assert not isinstance(finished, int)
        assert len(finished.records) == 4 and len(finished.swept) == 2
        assert finished.failed == ["small/paint/seed-0"]
        del ledger.records["small/paint/seed-1"]
        assert run_tables(*places, late, ledger, say=silent) == 1


def test_a_ledger_whose_last_line_is_cut_is_refused(
    jobs_of: Callable[[Scale], list[Job]], ledger: Ledger
) -> None:
    jobs = jobs_of(replace(quick(LAPTOP), rows=(BASE,)))
    for job in jobs:
        ledger.add(stub(job))
    whole = ledger.path.read_bytes()
    ledger.path.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match=r"runs\.jsonl: line 2, the last one, is cut short"):
        Ledger(ledger.path)
    # The remedy: without the line, its run is missing.
    ledger.path.write_bytes(whole[: whole.index(b"\n") + 1])
    assert Ledger(ledger.path).missing(jobs) == jobs[1:]


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
        # What decides the order of sums on a processor.
        assert pool.submit(torch.get_num_threads).result() == 1
        assert pool.submit(torch.backends.cpu.get_cpu_capability).result() != "AVX512"


KILLED_SCRIPT = """
import sys, time, types
from pathlib import Path

from bench.paper.ledger import Ledger
from bench.paper.plan import LAPTOP, RECIPES, TEACHERS, quick, table_runs
from bench.paper.runs import Crew, make_jobs, make_pool, run_missing

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
    rates = {("small", recipe): 1e-4 for recipe in RECIPES + TEACHERS}
    jobs = make_jobs(table_runs(scale, (1,)), scale, rates, directory, directory / "runs")
    with make_pool(1, on_gpus=False) as pool:
        run_missing(jobs, Crew(pool, 1), Ledger(directory / "runs.jsonl"))
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
        return set(Ledger(tmp_path / "runs.jsonl").records)

    child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    wait_for(lambda: len(results()) >= 3)
    child.send_signal(signal.SIGKILL)
    child.wait()
    # The worker exits with the command: no further run starts.
    time.sleep(0.5)
    begun, finished = started.read_text().split(), results()
    time.sleep(1.0)
    assert started.read_text().split() == begun and results() == finished
    assert 3 <= len(finished) < 12
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


def test_the_rate_with_the_best_mean_or_the_lower_of_equals_is_chosen() -> None:
    scale = replace(LAPTOP, rates=(1e-4, 3e-4, 1e-3))
    # The highest single accuracy is that of 1e-3, the highest mean that of 3e-4.
    by_rate = {1e-4: (0.6, 0.5), 3e-4: (0.75, 0.75), 1e-3: (1.0, 0.25)}
    sweep = [sweep_record(rate, x) for rate, found in by_rate.items() for x in found]
    tied = {1e-4: (0.25, 0.75), 3e-4: (0.5, 0.5), 1e-3: (0.125, 0.125)}
    sweep += [sweep_record(rate, x, "sft") for rate, found in tied.items() for x in found]
    rates, found = best_rates(scale, sweep)
    assert rates == {("small", "paint"): 3e-4, ("small", "sft"): 1e-4}
    assert [choice["at_grid_edge"] for choice in found] == [False, True]
    assert [entry["avg_at_k"] for entry in found[1]["tried"]] == [0.5, 0.5, 0.125]
    assert found[0]["tried"][2]["by_seed"] == [1.0, 0.25]


def test_the_presets_of_the_bundled_model_have_the_rates_that_the_sweep_chose() -> None:
    """But for OPSD and the control, which have PAINT's, so that nothing else differs."""
    ledger = Ledger(RESULTS / "paper-runs.jsonl")
    sweep = [ledger.records[run.run_id] for run in sweep_runs(LAPTOP, PLANNED)]
    rates, _ = best_rates(LAPTOP, sweep)
    assert {recipe for _, recipe in rates} == {*RECIPES, *TEACHERS}
    for (_, recipe), rate in rates.items():
        same = recipe in ("opsd", CONTROL)
        config = load_config(["--preset", f"{recipe}-tiny"]).config
        assert config.optim.learning_rate == (rates["small", "paint"] if same else rate), recipe
