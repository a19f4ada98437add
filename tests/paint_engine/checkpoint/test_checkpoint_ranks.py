"""Checkpoints at several ranks: saved at one number of them and restored at another, sharded or
not; a rank that cannot write; a kill at any moment."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("checkpoint_ranks.py")
# As in the program: models, layouts that save and layouts that load, kills.
NUM_RESTORED, NUM_KILLS = 2 * 6 * 6, 12


@pytest.fixture(scope="module")
def report(
    tmp_path_factory: pytest.TempPathFactory, model_dir: Path, run_program: Callable[..., Any]
) -> dict[str, Any]:
    work = tmp_path_factory.mktemp("ranks")
    result = run_program(PROGRAM, work, model_dir)
    shutil.rmtree(work)
    return result


def test_what_any_number_of_ranks_saved_comes_back_at_any_other_bit_for_bit(
    report: dict[str, Any],
) -> None:
    restored = report["restored"]
    assert len(restored) == NUM_RESTORED
    assert {case: differing for case, differing in restored.items() if differing} == {}


def test_a_rank_that_cannot_write_stops_every_rank_with_one_message(
    report: dict[str, Any],
) -> None:
    refused = dict(report["refused"])
    assert refused.pop("truncated") == [[{"step": 1}, 1], [{"step": 1}, 0]]
    unreadable = refused.pop("unreadable")
    assert len(set(unreadable)) == 1 and "step-2/" in unreadable[0]
    assert "could not be read (Stale file handle" in unreadable[0]
    assert len(refused) == 3
    for messages, there in refused.values():
        assert len(messages) == 2 and messages[0] == messages[1]
        assert "step-2 could not be saved" in messages[0]
        assert "File too large" in messages[0]
        assert there == ["step-1"]


def test_a_kill_at_any_moment_leaves_whole_checkpoints(report: dict[str, Any]) -> None:
    killed = report["killed"]
    assert len(killed) == NUM_KILLS
    for step, values, warned in killed:
        assert values == [step]
        assert warned == []
    steps = [step for step, _, _ in killed]
    assert steps == sorted(set(steps))
