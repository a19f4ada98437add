"""OpenMP threads spin on a free machine and sleep on a busy one; results are equal to the bit."""

import json
import os
import subprocess
import sys
import time
from typing import Any

import pytest
import torch

from paint_kernels import _spinning
from paint_kernels._spinning import LoadFollower, num_teams_above_limit

PROGRAM = """
import json, os, subprocess, sys, time
import torch
from paint_kernels import follow_load, paint_loss

def waiting_ms():
    # The processor time of a region and of the thread that waits after it.
    x = torch.zeros(2**17)
    x.add_(1.0)
    start = time.process_time()
    for _ in range(20):
        x.add_(1.0)
        time.sleep(0.03)
    return (time.process_time() - start) / 20 * 1e3

def gradient():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 12, 16, generator=generator)
    weight = torch.randn(40_000, 16, generator=generator)
    student.requires_grad_()
    paint_loss(student, teacher, weight, torch.tensor([0, 12], dtype=torch.int32)).loss.backward()
    return student.grad

torch.set_num_threads(2)
follow_load._due = float("inf")
found = {"free": waiting_ms()}
expected = gradient()
follow_load.adapt(others=100.0)
found["busy"] = waiting_ms()
found["equal"] = torch.equal(gradient(), expected)
follow_load.adapt(others=0.0)
found["free again"] = waiting_ms()

follow_load._due = 0.0
torch.set_num_threads(len(os.sched_getaffinity(0)))
load = subprocess.Popen([sys.executable, "-c", "while True: pass"])
deadline = time.monotonic() + 60
while follow_load.parked is None and time.monotonic() < deadline:
    paint_loss(*torch.randn(2, 4, 16), torch.randn(100, 16), torch.tensor([0, 4]))
    time.sleep(0.05)
load.kill()
found["noticed"] = follow_load.parked is not None
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    if not _spinning.uses_libgomp() or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs libgomp and two processors")
    settings = (*_spinning.USER_SETTINGS, "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in settings}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_threads_that_wait_sleep_while_teams_are_parked(report: dict[str, Any]) -> None:
    """Processor time and not elapsed time, so that other processes do not matter."""
    assert report["busy"] < 0.3 * report["free"]
    assert report["busy"] < 0.3 * report["free again"]


def test_results_are_the_same_to_the_bit(report: dict[str, Any]) -> None:
    assert report["equal"]


def test_a_busy_process_is_noticed(report: dict[str, Any]) -> None:
    assert report["noticed"]


@pytest.mark.parametrize("num_processors", [2, 3, 8, 16, 64])
@pytest.mark.parametrize("num_threads", [2, 4, 8])
def test_teams_are_as_few_as_exceed_the_processors(num_threads: int, num_processors: int) -> None:
    teams = num_teams_above_limit(num_threads, num_processors)
    assert num_threads + teams * (num_threads - 1) > num_processors
    assert teams == 0 or num_threads + (teams - 1) * (num_threads - 1) <= num_processors


@pytest.fixture
def follower(monkeypatch: pytest.MonkeyPatch) -> LoadFollower:
    """One that applies here, whatever this system and the user's settings are."""
    for name in _spinning.USER_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(_spinning, "uses_libgomp", lambda: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    return LoadFollower()


def test_teams_are_parked_while_others_use_the_processors(
    follower: LoadFollower, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = {"now": 100.0, "used": 50.0, "own": 10.0}
    monkeypatch.setattr(time, "monotonic", lambda: clock["now"])
    monkeypatch.setattr(time, "process_time", lambda: clock["own"])
    monkeypatch.setattr(_spinning, "used_seconds", lambda: clock["used"])

    def after(seconds: float, own: float, others: float) -> bool:
        clock["now"] += seconds
        clock["own"] += own * seconds
        clock["used"] += (own + others) * seconds
        follower()
        return follower.parked is not None

    # The first call has nothing to compare with, and one that comes too soon does not look.
    assert not after(0.0, 0.0, 0.0)
    assert not after(0.4, 0.0, 0.9)
    assert not after(0.6, 2.0, 0.0)
    assert after(1.0, 1.0, 1.0)
    assert follower.parked is not None
    (team,) = follower.parked.threads
    assert after(1.0, 1.0, 0.3)
    assert not after(1.0, 2.0, 0.1)
    team.join(10)
    assert not team.is_alive()
    assert not after(1.0, 1.0, 0.3)


@pytest.mark.parametrize("name", _spinning.USER_SETTINGS)
def test_the_users_settings_are_left_alone(
    name: str, follower: LoadFollower, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "PASSIVE" if name == "OMP_WAIT_POLICY" else "1000")
    monkeypatch.setattr(_spinning, "used_seconds", lambda: pytest.fail("looked"))
    follower()
    assert follower.parked is None


def test_one_thread_has_nobody_to_wait_for(
    follower: LoadFollower, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    follower.adapt(others=1.0)
    assert follower.parked is None


def test_processors_that_no_thread_needs_are_left_to_others(
    follower: LoadFollower, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    follower.adapt(others=6.0)
    assert follower.parked is None
    follower.adapt(others=7.0)
    assert follower.parked is not None and len(follower.parked.threads) == 7
    follower.adapt(others=6.0)
    assert follower.parked is None


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/stat")
def test_used_seconds_count_this_process() -> None:
    before, own = _spinning.used_seconds(), time.process_time()
    while time.process_time() - own < 0.3:
        pass
    assert _spinning.used_seconds() - before > 0.2


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp")
def test_a_process_may_end_at_any_moment_of_the_parking() -> None:
    """A thread inside PyTorch at the interpreter's end aborts the process."""
    program = (
        "from paint_kernels import follow_load\n"
        "for others in [100.0, 0.0] * 5 + [100.0]: follow_load.adapt(others)"
    )
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
