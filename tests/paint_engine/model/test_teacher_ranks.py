"""Moving teachers of a sharded model: every step is that of one process, and the mean is saved and
restored at any number of ranks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("teacher_ranks.py")
VISIBLE = 1e-2


@pytest.fixture(scope="module")
def report(
    tmp_path_factory: pytest.TempPathFactory,
    untied_model_dir: Path,
    run_program: Callable[..., Any],
) -> dict[str, Any]:
    work = tmp_path_factory.mktemp("teachers")
    (work / "models").mkdir()
    (work / "models" / "untied").symlink_to(untied_model_dir)
    return run_program(PROGRAM, work, work / "models")


def test_two_ranks_score_and_train_as_one_process_does(report: dict[str, Any]) -> None:
    """The mean and the live teacher, in float32 and on a bfloat16 base whose layers are recomputed,
    with adapters in the layers alone and at the root; the teacher's pass as the very first, between
    the base's, inside gathered weights. One rank has the whole loss, so the numbers are the same
    ones bit for bit."""
    assert len(report["cases"]) == 5
    for case in report["cases"]:
        assert {name: case[name] for name in ("states", "students", "means")} == {
            "states": 0.0,
            "students": 0.0,
            "means": 0.0,
        }
        assert case["moved"] > VISIBLE


@pytest.mark.parametrize("fault", ["mean put into new storage", "root kept gathered"])
def test_a_planted_fault_shows(fault: str, report: dict[str, Any]) -> None:
    found = report["faults"][fault]
    assert min(found["states"], found["students"], found["means"]) > VISIBLE


def test_the_mean_comes_back_bit_for_bit_at_any_number_of_ranks(report: dict[str, Any]) -> None:
    """Saved and restored by one process, sharded over two and four, and whole on two."""
    assert len(report["restored"]) == 4 * 4
    assert {case: found for case, found in report["restored"].items() if found} == {}
