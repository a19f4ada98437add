"""What the measurement beside other processes starts, ends and counts."""

import signal
import sys
from pathlib import Path

import pytest

from bench import busy


def test_ratios_are_to_spinning_threads_without_a_load() -> None:
    def case(measure: str, policy: str, load: str, seconds: float) -> dict[str, object]:
        return {"measure": measure, "policy": policy, "load": load, "seconds": seconds}

    cases = [
        case("loss", "spin", "none", 2.0),
        case("loss", "follow", "one process", 3.0),
        case("training", "follow", "none", 20.0),
    ]
    busy.add_ratios(cases)
    assert [c.get("ratio") for c in cases] == [1.0, 1.5, None]


def test_a_case_that_is_measured_again_replaces_the_old_one() -> None:
    def case(policy: str, seconds: float) -> dict[str, object]:
        return {"measure": "loss", "policy": policy, "load": "none", "seconds": seconds}

    merged = busy.merge([case("spin", 2.0), case("follow", 1.0)], [case("follow", 3.0)])
    assert merged == [case("follow", 3.0), case("spin", 2.0)]


def test_a_load_runs_until_the_measurement_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy, "LOAD_STARTS_S", 0.1)
    with busy.busy("one process") as process:
        assert process is not None and process.poll() is None
    assert process.returncode == -signal.SIGKILL
    with busy.busy("none") as process:
        assert process is None


def test_policies_replace_the_users_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("GOMP_SPINCOUNT", "9")
    assert not {"OMP_NUM_THREADS", "GOMP_SPINCOUNT"} & set(busy.clean_environment())


def test_a_command_that_fails_or_hangs_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(busy, "LIMIT_S", 0.5)
    program = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'while True: pass'])"
    for text in ("raise SystemExit('no')", program):
        with pytest.raises(RuntimeError, match="failed, or took"):
            busy.run_limited([sys.executable, "-c", text], "follow", tmp_path / "log.txt")
