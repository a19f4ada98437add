"""The rows of math-verify's tests, as the answer check gets them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.answer_suite import answer_in

TESTS = r"""
import pytest

@pytest.mark.parametrize("gold,pred,expected", [
    ("$2$", r"so \boxed{2}", 1),
    ("$2$", "$3$", 1),
    ("$2$", "It has been found, after some time, to be $2$.", 1),
])
def test_numbers(gold, pred, expected):
    raise AssertionError("no row is run by pytest")
"""


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"$1$, so \boxed{2}", "2"),
        ("it is $1$ or $2$", "2"),
        (r"\[ 3 \]", "3"),
        (r"\(4\)", "4"),
        (" 5 ", "5"),
        ("a sentence that is much longer than any short answer is", None),
    ],
)
def test_the_answer_in_a_row(text: str, answer: str | None) -> None:
    assert answer_in(text) == answer


def test_the_command_counts_and_lists(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "__init__.py").touch()
    (tmp_path / "tests" / "test_made_up.py").write_text(TESTS)
    command = [sys.executable, "-m", "bench.answer_suite", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    result = json.loads(done.stdout)
    assert (result["rows"], result["prose"], result["same"]) == (3, 1, 1)
    (difference,) = result["differences"]
    assert difference == {
        "test": "test_made_up::test_numbers",
        "gold": "2",
        "boxed": "3",
        "math-verify": True,
    }
