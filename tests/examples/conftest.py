"""Runs an example as its docstring says: `python examples/NAME ...`, one thread, no network."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_python(*arguments: object) -> str:
    """The standard output of a Python process started in the repository's root."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *(path for path in sys.path if path)]),
    }
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def run_command() -> Callable[..., str]:
    return run_python


@pytest.fixture(scope="session")
def run_example() -> Callable[..., str]:
    return lambda name, *arguments: run_python(ROOT / "examples" / name, *arguments)
