"""Heads whose rows lie on several ranks: equal to one process, with the stated collectives."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize(("num_ranks", "backend"), [(2, "torch"), (4, "torch"), (2, "triton")])
def test_ranks_equal_one_process(num_ranks, backend):
    """All in one program, because its imports take longer than its cases."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])]),
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("TRITON_INTERPRET", None)
    if backend == "triton":
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, str(HERE / "vocab_ranks.py"), str(num_ranks), backend],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.endswith("all passed\n")
