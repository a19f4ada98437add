"""What the soak starts, finds and counts."""

import mmap
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.soak import launch
from bench.soak.kills import wait_for
from bench.soak.server import complete
from bench.soak.starts import outcome
from bench.soak.steps import own_bytes, take_samples

PARENT = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print("started", flush=True)
time.sleep(600)
"""


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[launch.Launch]:
    """A process with a child in a session of its own, which does not end by itself."""
    package = tmp_path / "fake" / "paint_engine"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "train.py").write_text(PARENT)
    monkeypatch.setattr(launch, "ROOT", tmp_path / "fake")
    started = launch.Launch(tmp_path / "work", [])
    while "started" not in started.printed():
        assert started.process.poll() is None, started.printed()
        time.sleep(0.01)
    yield started
    started.kill_all()


def test_a_scheduler_s_kill_leaves_no_child(family: launch.Launch) -> None:
    assert len(family.alive()) == 2
    family.kill_all()
    assert family.process.returncode == -signal.SIGKILL
    assert family.seconds_of_orphans() is not None


def test_a_child_that_stays_is_told_and_ended(
    family: launch.Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "ORPHAN_LIMIT_S", 0.05)
    family.kill_main()
    assert family.seconds_of_orphans() is None
    assert family.alive() == []


@pytest.mark.parametrize(
    "wait",
    [
        launch.Launch.wait,
        lambda hangs: wait_for(hangs, lambda: False),
        lambda hangs: take_samples(hangs, num_steps=8, every=8),
        lambda hangs: outcome(hangs, hangs),
    ],
    ids=["end", "moment", "samples", "outcome"],
)
def test_no_part_waits_for_ever_for_a_run_that_hangs(
    wait: Callable[[launch.Launch], object], family: launch.Launch
) -> None:
    family.limit_s = time.monotonic() - family.started + 0.1
    with pytest.raises(RuntimeError, match=r"took more than \d+ s: started"):
        wait(family)
    assert family.alive() == [] and not family.is_running()


def test_an_exception_ends_what_was_started(family: launch.Launch) -> None:
    with pytest.raises(KeyboardInterrupt), family:
        raise KeyboardInterrupt
    assert family.alive() == []


def test_names_in_shared_memory_are_those_of_the_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_SHARED_MEMORY", tmp_path)
    for name in ("paint-812-s96417-5d1ba3c0-9fc3e08b", "torch_812_1", "paint-8123-a-b", "sem.loky"):
        (tmp_path / name).touch()
    assert sorted(launch.shared_memory({812})) == [
        "paint-812-s96417-5d1ba3c0-9fc3e08b",
        "torch_812_1",
    ]


def test_memory_of_a_process_is_counted_with_what_is_swapped_out() -> None:
    # A mapping of its own: malloc could hand out memory that is counted already.
    with mmap.mmap(-1, 64 * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        before = own_bytes(os.getpid())
        block.write(b"1" * len(block))
        assert own_bytes(os.getpid()) - before > 60 * 2**20


def test_completions_depend_on_weights_prompt_and_seed_alone() -> None:
    request = {"prompt": [1, 2], "seed": 3, "max_tokens": 8, "top_k": 0}
    first = complete(request, "a")
    assert complete(dict(request), "a") == first
    others = [complete(request, "b"), complete(request | {"seed": 4}, "a")]
    others.append(complete(request | {"prompt": [1, 3]}, "a"))
    assert all(other["token_ids"] != first["token_ids"] for other in others)
    assert len(first["token_ids"]) == len(first["logprobs"]["token_logprobs"]) == 8
    assert all(value <= 0 for value in first["logprobs"]["token_logprobs"])
