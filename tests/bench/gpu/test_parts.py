"""The GPU check on a CPU: a small run without optional packages, and parts that fail or hang."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from bench import gpu_check
from bench.gpu import kernels, parts, questions, tests
from bench.gpu.parts import Part
from bench.measure import ROOT
from paint_kernels import _triton_backend

# A machine with a GPU may lack these. No finder finds them, as if they were not installed.
WITHOUT = """
import sys

ABSENT = {"jaxtyping", "pydantic", "datasets", "math_verify", "vllm", "trl", "liger_kernel",
          "cut_cross_entropy", "quack", "fla", "matplotlib", "pytest_timeout"}


class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *arguments):
        if name.split(".")[0] in ABSENT:
            return None
        return self.finder.find_spec(name, *arguments)

    def __getattr__(self, name):
        return getattr(self.finder, name)


sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def test_a_small_run_without_optional_packages(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    variables = {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    variables["PYTEST_ADDOPTS"] = "-p no:timeout"
    environment = {**os.environ, **variables}
    absent = subprocess.run([sys.executable, "-c", "import jaxtyping"], env=environment)
    assert absent.returncode != 0
    options = ["--quick", "--output", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu_check", "--device", "cpu", *options],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (results,) = tmp_path.glob("gpu-check-*.json")
    result = json.loads(results.read_text())
    assert result["versions"]["torch"] == torch.__version__
    assert "CPU" in result["device"]
    by_name = {row["part"]: row for row in result["parts"]}
    assert [row["status"] for row in by_name.values()] == (
        ["passed", "passed", "skipped", "passed", "passed", "passed", "skipped"]
    )
    for name, row in by_name.items():
        assert name in done.stdout
        assert 0 <= row["seconds"] <= row.get("limit_s", 0)
    for group in ("triton", "others"):
        counted = by_name["tests"]["found"][group]
        assert counted["passed"] > 0
        assert counted["failed"] == counted["not_run"] == 0
    steps = by_name["steps"]["found"]
    assert steps["plain"]["losses"] == pytest.approx(steps["paint_loss"]["losses"], rel=1e-3)
    assert steps["paint_loss"]["adapter_weights_changed"] > 0
    (file,) = tmp_path.glob("kernels-*.json")
    rows = json.loads(file.read_text())["groups"][0]["rows"]
    timed = {row["variant"] for row in rows if row["median_ms"] > 0}
    assert timed == {"gemms", "paint_loss", "paint_loss, trainable head", "plain"}


SLOW = """
import subprocess, sys, time

def run(job):
    job.save(begun=True)
    print("waiting", flush=True)
    subprocess.run([sys.executable, "-c", "import time; time.sleep(300)"])
"""
BROKEN = """
def run(job):
    assert job.attempt("good", lambda: 1 + 1) == 2
    assert job.attempt("bad", lambda: 1 / 0) is None
    return "half of it"
"""
CRASHED = """
import os

def run(job):
    print("about to crash", flush=True)
    os._exit(3)
"""
GOOD = """
def run(job):
    job.save(seen=str(job.device))
    return "all is well"
"""


def test_parts_that_fail_or_hang(tmp_path, monkeypatch, capsys):
    planted = []
    texts = {"slow": SLOW, "broken": BROKEN, "crashed": CRASHED, "good": GOOD}
    for (name, text), share in zip(texts.items(), (0.1, 0.3, 0.3, 0.3), strict=True):
        (tmp_path / f"{name}_part.py").write_text(text)
        planted.append(Part(name, f"{name}_part", share))
    monkeypatch.setattr(parts, "PARTS", tuple(planted))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    status = gpu_check.main(["--device", "cpu", "--output", str(tmp_path), "--seconds", "150"])
    assert status == 1
    (results,) = tmp_path.glob("gpu-check-*.json")
    rows = {row["part"]: row for row in json.loads(results.read_text())["parts"]}
    statuses = {name: row["status"] for name, row in rows.items()}
    assert statuses == {
        "slow": "stopped",
        "broken": "failed",
        "crashed": "failed",
        "good": "passed",
    }
    assert rows["slow"]["found"] == {"begun": True}
    assert rows["slow"]["text"] == "stopped after 15 s; last line: waiting"
    assert rows["broken"]["found"] == {"good": 2, "summary": "half of it"}
    assert rows["broken"]["text"] == "bad: ZeroDivisionError: division by zero; half of it"
    assert "Traceback" in "".join(rows["broken"]["last_lines"])
    assert rows["crashed"]["text"] == "exit status 3: about to crash"
    assert rows["good"]["found"] == {"seen": "cpu", "summary": "all is well"}
    # The next part's limit follows from the time that the slow part took.
    assert 30 < rows["broken"]["limit_s"] <= 45
    assert rows["good"]["limit_s"] > 45
    printed = capsys.readouterr().out
    assert "all is well" in printed and "ZeroDivisionError" in printed


OUTCOMES = """
import pytest

@pytest.fixture
def breaks():
    yield
    raise RuntimeError("in the teardown")

def test_passes(): pass
def test_fails(): assert False
@pytest.mark.skip
def test_is_skipped(): pass
def test_breaks_afterwards(breaks): pass
def test_passes_too(): pass
def test_ends_the_process(): import os; os._exit(9)
def test_passes_last(): pass
"""


def test_every_outcome_is_counted(tmp_path):
    (tmp_path / "test_outcomes.py").write_text(OUTCOMES)
    command = [sys.executable, "-m", "bench.gpu.tests"]
    for index in range(2):
        result = str(tmp_path / f"others-{index}.jsonl")
        arguments = [result, str(index), "2", str(tmp_path / "test_outcomes.py")]
        subprocess.run([*command, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL)
    counted = tests.tally(tmp_path, "others")
    # The test that ends its process reports nothing.
    failed = [name.rpartition("::")[2] for name in counted.pop("failed_tests")]
    assert failed == ["test_breaks_afterwards", "test_fails"]
    assert counted == {"passed": 3, "failed": 2, "skipped": 1, "not_run": 1}


def test_shares_add_up_to_one_and_modules_exist():
    assert sum(part.share for part in parts.PARTS) == pytest.approx(1.0)
    for part in parts.PARTS:
        assert (ROOT / f"{part.module.replace('.', '/')}.py").exists()


def test_unknown_parts_and_devices(tmp_path):
    with pytest.raises(ValueError, match="--parts: got nonsense; choose from"):
        gpu_check.main(["--device", "cpu", "--output", str(tmp_path), "--parts", "tests,nonsense"])
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no usable CUDA device"):
            gpu_check.main(["--device", "cuda", "--output", str(tmp_path)])


def test_tiles_reach_the_kernels(monkeypatch):
    """Every row kernel is launched with the requested tile and warps."""
    launched = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *_, LANES, num_warps, **__: launched.append((LANES, num_warps))

    recorder = SimpleNamespace(stats_kernel=Recorder(), loss_kernel=Recorder())
    monkeypatch.setattr(_triton_backend, "kernels", recorder)
    student, teacher, gradient = torch.zeros(3, 4, 5000)
    marks = torch.zeros(4, dtype=torch.bool)
    with questions.tiles_of(128, 2):
        questions.row_work(student, teacher, marks, gradient, 1.0)
    assert launched == [(128, 2)] * 2  # both models' statistics are one launch
    questions.row_work(student, teacher, marks, gradient, 1.0)
    assert (128, 2) not in launched[2:]


def test_verdicts():
    assert questions.verdict("", 100.0, 98.0)["verdict"] == "not worth it"
    assert questions.verdict("", 100.0, 90.0)["saved"] == pytest.approx(0.1)
    assert questions.verdict("", 100.0, 90.0)["verdict"] == "worth it"
    rows = {"small": questions.verdict("", 1.0, 0.99), "large": {"saved": 0.5, "verdict": "x"}}
    assert questions.answer(rows) == "+50.0%, x"


def kernel_group(**changes):
    row = {"variant": "paint_loss", "kind": "ours", "status": "measured", "median_ms": 180.0}
    row |= {"ratio_to_floor": 1.2, "extra_bytes": 3_000_000_000, "gradient_error": 2e-3}
    row |= {"gradient_error_before_rounding": 4e-4, **changes}
    shape = {"hidden": 4096, "num_tokens": 32768}
    return {"group": "PAINT", "shape": shape, "rows": [row], "fastest_peer": None}


def test_targets():
    assert kernels.missed_targets([kernel_group()]) == []
    missed = kernels.missed_targets([kernel_group(ratio_to_floor=1.3, extra_bytes=5e9)])
    assert missed == [
        "ratio_to_floor is 1.3, the target 1.25",
        "extra_bytes is 5e+09, the target 4e+09",
    ]
    slow = {**kernel_group(), "fastest_peer": {"variant": "other", "ratio": 1.5}}
    assert kernels.missed_targets([slow]) == ["1.50 x as fast as other, not twice"]
    assert kernels.missed_targets([{**slow, "rows": []}])[0] == "ratio_to_floor is not known"
    assert "1.200 x three GEMMs, 180.0 ms, 3.00 GB extra, error 4.0e-04" in kernels.line(slow)
