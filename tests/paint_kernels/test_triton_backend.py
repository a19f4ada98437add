"""Runs the Triton cases where they can run: on a GPU if there is one, else in the interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def run(*command: str, **variables: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    done = subprocess.run(
        [sys.executable, *command],
        env=environment,
        cwd=HERE.parents[1],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize("cases", ["triton_cases.py", "triton_topk_cases.py"])
def test_numerics(cases):
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    output = run("-m", "pytest", str(HERE / cases), **interpreted)
    assert " passed" in output and "skipped" not in output


def test_memory_accesses():
    """In the interpreter, which alone shows each access, whatever devices there are."""
    output = run("-m", "pytest", str(HERE / "triton_memory_cases.py"), TRITON_INTERPRET="1")
    assert " passed" in output and "skipped" not in output
