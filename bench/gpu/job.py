"""The input of one part of `python -m bench.gpu_check`, and how it saves its results.

Every result is written immediately, so that a part that is stopped later loses none.
"""

import json
import platform
import re
import shutil
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import measure

PACKAGES = (
    *("torch", "triton", "transformers", "peft", "safetensors", "numpy", "pytest", "hypothesis"),
    *("rich", "pydantic", "trl"),
    *("liger-kernel", "cut-cross-entropy", "quack-kernels", "flash-linear-attention"),
)
WORTH_IT = 0.03
"""share of the time that a change has to save to be worth its complexity"""


@dataclass
class Job:
    device: torch.device
    quick: bool
    output: Path
    """directory of the results"""
    found_file: Path
    """this part's own results"""
    deadline: float
    """value of time.monotonic at which the part is stopped"""
    environment: dict[str, Any]
    """device, versions and commit, for results with their own file"""
    found: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def save(self, **found: Any) -> None:
        self.found.update(found)
        content = {"found": self.found, "failures": self.failures}
        whole = self.found_file.with_suffix(".new")
        whole.write_text(json.dumps(content))
        whole.replace(self.found_file)

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def attempt(self, name: str, call: Callable[[], Any]) -> Any:
        """Saves the result of `call` under `name` and returns it; None if the call failed.

        An error is printed and fails the part, but does not end it: GPU time is scarce, and the
        remaining results are still of use.
        """
        begin = time.perf_counter()
        try:
            result = call()
        except Exception as error:
            traceback.print_exc()
            lines = str(error).strip().splitlines() or [""]
            self.failures.append(f"{name}: {type(error).__name__}: {lines[0][:200]}")
            self.save()
            return None
        print(f"{name}: {time.perf_counter() - begin:.1f} s", flush=True)
        self.save(**{name: result})
        return result


def milliseconds(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Returns the time of one call: median over three batches of `repeats` calls, after a warm-up
    call."""
    call()

    def batch() -> None:
        for _ in range(repeats):
            call()

    seconds = [measure.seconds_once(batch, device) / repeats for _ in range(3)]
    return 1e3 * statistics.median(seconds)


def first_line(*command: str) -> str:
    """Returns the first line that a command prints; empty if it is absent or fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else ""


def describe_environment(device: torch.device, command: str) -> dict[str, Any]:
    """Returns `measure.environment` with the versions of the packages that the check uses."""
    versions = {name: measure.version(name) for name in PACKAGES if measure.version(name)}
    if device.type == "cuda":
        versions["cuda"] = str(torch.version.cuda)
        query = ("--query-gpu=driver_version", "--format=csv,noheader")
        versions["driver"] = first_line("nvidia-smi", *query)
    return {
        "command": command,
        "commit": measure.commit(),
        "device": measure.device_name(device),
        "num_threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **versions},
    }


def slug(device: torch.device) -> str:
    """Returns the device's name as part of a file name: nvidia-h100-80gb-hbm3, x86-64-cpu."""
    name = f"{platform.machine()} cpu"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
