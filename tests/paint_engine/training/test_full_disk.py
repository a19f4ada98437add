"""A disk that refuses a write ends a run with one message; what it printed then continues the run
to what an uninterrupted one leaves."""

import errno
import os
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file

from paint_engine.files import WriteFailed, read_jsonl
from paint_engine.report import __main__ as report_command
from paint_engine.report.page import write_report
from paint_engine.rollout.builtin import BuiltinEngine

Main = Callable[[Sequence[str]], int]
TIMING = {"seconds", "seconds_rollout", "seconds_update", "tokens_per_s"}


@pytest.fixture
def arguments(command: list[str]) -> list[str]:
    settings = {"train.num_steps": 2, "eval.every": 1, "checkpoint.every": 1, "checkpoint.keep": 1}
    return [*command, *(part for k, v in settings.items() for part in (f"--{k}", str(v)))]


def metrics(run_dir: Path) -> list[dict[str, object]]:
    rows = read_jsonl(run_dir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMING} for row in rows]


def advice(printed: str) -> list[str]:
    """The arguments of the command that the message names, or the same command again."""
    found = re.search(r"with: python -m paint_engine\.train (.*)", printed)
    return shlex.split(found[1]) if found else []


def assert_whole(run_dir: Path, expected: Path) -> None:
    assert metrics(run_dir) == metrics(expected)
    assert len(read_jsonl(run_dir / "samples.jsonl")) == 4
    last = "checkpoints/step-2/adapter_model.safetensors"
    ours, theirs = load_file(run_dir / last), load_file(expected / last)
    assert all((ours[name] == tensor).all() for name, tensor in theirs.items())
    assert (run_dir / "report.html").is_file() and (run_dir / "summary.json").is_file()
    assert not [p for p in run_dir.rglob(".*") if p.name.endswith("unfinished")]


def test_a_full_disk_at_any_time_loses_nothing_that_was_finished(
    arguments: list[str],
    run_main: Main,
    small_disk: Path,
    fill: Callable[[int | None], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_main(arguments) == 0
    run_dir = small_disk / "run"
    elsewhere = [*arguments, "--run.dir", str(run_dir)]
    # At the start; in the evaluation; in the metrics; in a checkpoint; once one is there.
    for room in (0, 16_384, 65_536, 262_144):
        fill(room)
        capsys.readouterr()
        assert run_main(elsewhere) == 1
        printed = capsys.readouterr().out
        assert "No space left on device" in printed and "free some space" in printed
        assert (printed.count("error: ") == 1 and "safe: " in printed) or "no checkpoint" in printed
        # The same again, from what is there.
        again = advice(printed) or elsewhere
        assert run_main(again) == 1
        again = advice(capsys.readouterr().out) or again
        fill(None)
        assert run_main(again) == 0
        assert_whole(run_dir, tmp_path / "run")
        shutil.rmtree(run_dir)


@pytest.mark.parametrize(
    ("place", "number"),
    [
        *((0.0, errno.EROFS), (0.15, errno.EIO), (0.4, errno.EDQUOT)),
        *((0.7, errno.EIO), (1.0, errno.EDQUOT)),
    ],
)
def test_whatever_the_system_refuses_is_one_message(
    number: int,
    place: float,
    arguments: list[str],
    run_main: Main,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As network storage reports it: when the data is flushed."""
    calls, original = 0, os.fsync
    fails_at = -1

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise OSError(number, os.strerror(number))
        original(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        assert run_main(arguments) == 0
        fails_at, calls = 1 + round(place * (calls - 1)), 0
        other = [*arguments, "--run.dir", str(tmp_path / "other")]
        capsys.readouterr()
        assert run_main(other) == 1
    printed = capsys.readouterr().out
    assert os.strerror(number) in printed and "could not be" in printed
    assert "safe: " in printed or "no checkpoint is saved yet" in printed
    assert run_main(advice(printed) or other) == 0
    assert_whole(tmp_path / "other", tmp_path / "run")


def test_a_full_disk_elsewhere_costs_no_step(
    arguments: list[str],
    run_main: Main,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As the shared memory in which vLLM gets the weights."""

    def sync(engine: BuiltinEngine, weights_version: int) -> None:
        if weights_version == 1:
            raise WriteFailed("the weights for vLLM could not be written (No space left)")

    monkeypatch.setattr(BuiltinEngine, "sync", sync)
    # The rollouts alone: evaluations save before they need the weights.
    argv = [*arguments, "--eval.enabled", "false", "--checkpoint.every", "0"]
    assert run_main(argv) == 1
    printed = capsys.readouterr().out
    assert "error: the weights for vLLM could not be written" in printed
    assert "safe: all 1 steps up to the newest checkpoint: step-1" in printed
    monkeypatch.undo()
    assert run_main(advice(printed)) == 0


def test_a_report_that_does_not_fit_keeps_the_earlier_one(
    arguments: list[str],
    run_main: Main,
    small_disk: Path,
    fill: Callable[[int | None], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir = small_disk / "run"
    assert run_main([*arguments, "--run.dir", str(run_dir)]) == 0
    before = (run_dir / "report.html").read_bytes()
    fill(0)
    with pytest.raises(SystemExit) as stop:
        report_command.main([str(run_dir)])
    assert stop.value.code == 1
    assert "report.html could not be written (No space left" in capsys.readouterr().out
    assert (run_dir / "report.html").read_bytes() == before
    # Nothing has to be written to resume a finished run but its summary and its report.
    assert run_main(["--resume", str(run_dir)]) == 1
    printed = capsys.readouterr().out
    assert "summary.json could not be written" in printed
    assert "all 2 steps up to the newest checkpoint" in printed
    fill(None)
    assert run_main(["--resume", str(run_dir)]) == 0
    assert write_report(run_dir).is_file()
