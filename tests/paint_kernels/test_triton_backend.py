"""Runs the Triton cases where they can run: on a GPU if there is one, else in the interpreter."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


NUMERICS = ("triton_cases.py", "triton_topk_cases.py")
MEMORY_ACCESSES = "triton_memory_cases.py"


def run(cases: str) -> subprocess.CompletedProcess[str]:
    """Runs a file of cases. Memory accesses are seen in the interpreter alone, whatever devices
    there are."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if cases == MEMORY_ACCESSES or not torch.cuda.is_available():
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "pytest", str(HERE / cases)],
        env=environment,
        cwd=HERE.parents[1],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.fixture(scope="module")
def finished() -> dict[str, subprocess.CompletedProcess[str]]:
    """All files, side by side: the interpreter uses one processor."""
    files = (*NUMERICS, MEMORY_ACCESSES)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(files, pool.map(run, files), strict=True))


@pytest.mark.parametrize("cases", NUMERICS)
def test_numerics(cases, finished):
    assert finished[cases].returncode == 0, finished[cases].stdout
    assert " passed" in finished[cases].stdout and "skipped" not in finished[cases].stdout


def test_memory_accesses(finished):
    assert finished[MEMORY_ACCESSES].returncode == 0, finished[MEMORY_ACCESSES].stdout
    assert " passed" in finished[MEMORY_ACCESSES].stdout
    assert "skipped" not in finished[MEMORY_ACCESSES].stdout
