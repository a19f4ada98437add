"""Which outcomes of two processes in one directory are right."""

from typing import Any

import pytest

from bench.soak.starts import is_late, is_right

RIGHT = {"codes": [0, 2], "both_at_work": False, "message": "error: in use", "traceback": False}


def case(**values: Any) -> dict[str, Any]:
    return {**RIGHT, "differing": [], **values}


def test_one_is_refused_and_the_other_ends_as_if_alone() -> None:
    assert is_right(case()) and is_right(case(codes=[2, 0]))


@pytest.mark.parametrize(
    "wrong",
    [
        {"codes": [0, 0], "both_at_work": True},
        {"codes": [2, 2]},
        {"codes": [0, 1]},
        {"codes": [-9, 0]},
        {"both_at_work": True},
        {"message": ""},
        {"traceback": True},
        {"differing": ["metrics.jsonl"]},
    ],
)
def test_everything_else_is_wrong(wrong: dict[str, Any]) -> None:
    assert not is_right(case(**wrong)) and not is_late(case(**wrong))


def test_a_second_process_after_the_end_says_nothing() -> None:
    assert is_late(case(codes=[0, 0]))
