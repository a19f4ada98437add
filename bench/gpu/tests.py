"""Part "tests" of the GPU check: the tests of paint_kernels, in several processes at once.

`python -m bench.gpu.tests RESULT_FILE INDEX COUNT FILE...` is one of these processes: it runs every
COUNT-th test of the files and writes one line of JSON per result.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from bench.gpu.job import Job
from bench.measure import ROOT

FOLDER = ROOT / "tests" / "paint_kernels"
TRITON_CASES = "triton_cases.py"
RUNS_TRITON_CASES = "test_triton_backend.py"
NUM_PROCESSES = 4
"""per group of tests; on a GPU they share the device, and most of the time is compilation"""
QUICK_SHARE = 20
"""--quick runs every 20th test"""
SECONDS_TO_REPORT = 5.0
# Overrides settings of pyproject.toml that fail with other versions of pytest or without its
# plugins, and does not turn the warnings of other library versions into errors.
OPTIONS = (
    *("-q", "--tb=short", "--import-mode=importlib", "-p", "no:cacheprovider"),
    *("-o", "addopts=", "-o", "filterwarnings=default", f"--rootdir={ROOT}"),
)


class Shard:
    """A pytest plugin that runs every `count`-th test and writes a line per result to a file."""

    def __init__(self, result_file: Path, index: int, count: int) -> None:
        self.result_file, self.index, self.count = result_file, index, count

    def write(self, **line: Any) -> None:
        with self.result_file.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = items[self.index :: self.count]
        self.write(collected=len(items))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.write(test=report.nodeid, outcome="failed")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.write(test=report.nodeid, outcome=report.outcome)


def test_files() -> tuple[list[Path], list[str]]:
    """Returns the test files that can run here, and why others cannot."""
    files = [*sorted(FOLDER.glob("test_*.py")), FOLDER / TRITON_CASES]
    # This file would run the Triton cases a second time.
    files = [file for file in files if file.name != RUNS_TRITON_CASES]
    if importlib.util.find_spec("hypothesis"):
        return files, []
    needing = [file for file in files if "hypothesis" in file.read_text()]
    names = ", ".join(file.name for file in needing)
    return [file for file in files if file not in needing], [
        f"hypothesis is not installed (pip install hypothesis): {names} cannot run"
    ]


def start(job: Job, files: list[Path], index: int, count: int, folder: Path) -> subprocess.Popen:
    group = "triton" if files[0].name == TRITON_CASES else "others"
    variables = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "HYPOTHESIS_STORAGE_DIRECTORY": str(folder / "hypothesis"),
    }
    if job.device.type == "cpu" and group == "triton":
        variables["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "bench.gpu.tests", str(folder / f"{group}-{index}.jsonl")]
    command += [str(index), str(count), *map(str, files)]
    return subprocess.Popen(command, cwd=ROOT, env=variables)


def tally(folder: Path, group: str) -> dict[str, Any]:
    """Counts of one group's tests by outcome, and the names of those that failed."""
    lines = [
        json.loads(line)
        for file in sorted(folder.glob(f"{group}-*.jsonl"))
        for line in file.read_text().splitlines()
    ]
    collected = sum(line.get("collected", 0) for line in lines)
    by_outcome = {
        outcome: sorted({line["test"] for line in lines if line.get("outcome") == outcome})
        for outcome in ("passed", "failed", "skipped")
    }
    # A test may pass and then fail in its teardown.
    passed = set(by_outcome["passed"]) - set(by_outcome["failed"])
    numbers = {"passed": len(passed), "failed": len(by_outcome["failed"])}
    numbers["skipped"] = len(by_outcome["skipped"])
    numbers["not_run"] = max(0, collected - sum(numbers.values()))
    return {**numbers, "failed_tests": by_outcome["failed"]}


def run(job: Job) -> str:
    files, absent = test_files()
    groups = {
        "triton": [file for file in files if file.name == TRITON_CASES],
        "others": [file for file in files if file.name != TRITON_CASES],
    }
    shards = range(1) if job.quick else range(NUM_PROCESSES)
    count = QUICK_SHARE if job.quick else NUM_PROCESSES
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        running = [
            start(job, of_group, index, count, folder)
            for of_group in groups.values()
            if of_group
            for index in shards
        ]
        exit_codes = [wait(process, job.seconds_left() - SECONDS_TO_REPORT) for process in running]
        counted = {group: tally(folder, group) for group in groups}
    job.save(**counted, exit_codes=exit_codes, absent=absent)
    problems = []
    for group, of_group in counted.items():
        problems += of_group["failed_tests"]
        if of_group["not_run"]:
            problems.append(f"{of_group['not_run']} tests of {group} did not run")
    # 5: no test was collected, as in a group with fewer tests than processes.
    if not problems and any(code not in (0, 5) for code in exit_codes):
        problems.append(f"exit codes of pytest: {exit_codes}")
    job.failures += problems
    named = {"triton": TRITON_CASES, "others": "other files"}
    counts = [
        f"{named[group]}: {of_group['passed']} passed, {of_group['failed']} failed, "
        f"{of_group['skipped']} skipped, {of_group['not_run']} not run"
        for group, of_group in counted.items()
    ]
    return "; ".join([*counts, *absent])


def wait(process: subprocess.Popen, seconds: float) -> int:
    """Waits for a process; returns its exit code, or -9 if it was killed after `seconds`."""
    try:
        return process.wait(timeout=max(0.0, seconds))
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def main(argv: list[str]) -> int:
    result_file, index, count, *files = argv
    shard = Shard(Path(result_file), int(index), int(count))
    return int(pytest.main([*OPTIONS, *files], plugins=[shard]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
