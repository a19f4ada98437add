"""Time, extra memory and accuracy of one call, and what they were measured with."""

import json
import math
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.losses import FORWARD_KL, JSD_WEIGHT, Gradients, Inputs, Objective, Shape, Variant
from paint_kernels import entropy_ratio, reference

ROOT = Path(__file__).parent.parent
PACKAGES = (
    *("torch", "triton", "liger-kernel", "cut-cross-entropy", "quack-kernels"),
    "flash-linear-attention",
)
LIMITS = {torch.float32: 1e-3, torch.bfloat16: 5e-3}
"""largest relative gradient error of a variant whose speed is reported. Rounding a result to
bfloat16 costs 1.7e-3 by itself, rounding the gradient by the logits before the last GEMM as much
again."""
LIMIT_BEFORE_ROUNDING = 1e-3
ROW_BYTES = 8 + 8 + 2
"""moved for one token's vocabulary entry between the GEMMs, with float32 logits of two models:
read for the statistics (2 x 4), read again for loss and gradient (2 x 4), and a bfloat16 gradient
written"""


class Exact(NamedTuple):
    grad_hidden: Tensor
    """(n, H) float64"""
    token_divergence: Tensor
    """(n,) float64, unclipped, in nats"""
    grad_weight: Tensor | None


def exact_gradient(
    inputs: Inputs, objective: Objective, rollout: int, *, with_weight: bool = False
) -> Exact:
    """The float64 gradient of the mean over all N tokens, at one rollout's rows.

    By the reference, 256 rows at a time: its selection first, then its loss of the target so made.
    """
    start, end = inputs.cu_seqlens[rollout : rollout + 2].tolist()
    num_tokens = len(inputs.student)
    student = inputs.student.detach()[start:end].double()
    teacher = inputs.teacher[start:end].double()
    weight = inputs.weight.double().requires_grad_(with_weight)
    parts = [slice(first, first + 256) for first in range(0, end - start, 256)]
    selected = exact_selection(student, teacher, weight, objective, parts)
    grad_hidden, divergence = [], []
    grad_weight = torch.zeros_like(weight) if with_weight else None
    for part in parts:
        leaf = student[part].requires_grad_()
        if objective.divergence == "logprobs":
            token_ids = inputs.token_ids[start:end][part]
            token_loss = -reference.token_logprobs(leaf, weight, token_ids).logprobs
            divergence.append(token_loss.detach())
        else:
            logits = reference.project(leaf, weight)
            target = reference.project(teacher[part], weight.detach())
            k = objective.interpolation_weight
            target = reference.interpolate(target, logits.detach(), selected[part], k)
            output = reference.paint_loss_from_logits(
                logits,
                target,
                torch.tensor([0, len(leaf)]),
                temperature=objective.temperature,
                divergence=objective.divergence,
                jsd_weight=JSD_WEIGHT,
                pointwise_clip=objective.pointwise_clip,
                top_fraction=0.0,
                reduction="none",
            )
            token_loss = output.loss
            divergence.append(output.token_kl)
        wanted = (leaf, weight) if with_weight else (leaf,)
        part_gradients = torch.autograd.grad(token_loss.sum() / num_tokens, wanted)
        grad_hidden.append(part_gradients[0])
        if grad_weight is not None:
            grad_weight += part_gradients[1]
    return Exact(torch.cat(grad_hidden), torch.cat(divergence), grad_weight)


def exact_selection(
    student: Tensor, teacher: Tensor, weight: Tensor, objective: Objective, parts: list[slice]
) -> Tensor:
    """(n,) bool: positions of one rollout that are interpolated."""
    if objective.interpolation_weight == 0:
        return torch.zeros(len(student), dtype=torch.bool, device=student.device)
    entropies = [
        torch.cat(
            [
                reference.token_stats(
                    hidden[part], weight, temperature=objective.temperature
                ).entropy
                for part in parts
            ]
        )
        for hidden in (student, teacher)
    ]
    ratio = entropy_ratio(entropies[1], entropies[0])
    bounds = torch.tensor([0, len(student)])
    return reference.select_top_fraction(ratio, bounds, objective.top_fraction)


def seconds_once(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def times_on_gpu(call: Callable[[], Any], device: torch.device, seconds: float) -> list[float]:
    """In seconds, after a call that warms up: 5 to 30 of them, as many as the seconds allow."""
    estimate = seconds_once(call, device)
    repeats = min(30, max(5, math.ceil(seconds / max(estimate, 1e-6))))
    return [seconds_once(call, device) for _ in range(repeats)]


def times_round_robin(
    calls: dict[str, Callable[[], Any]], device: torch.device, rounds: int
) -> dict[str, list[float]]:
    """In seconds; calls alternate, so that what slows the machine for a while slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(rounds + 1):
        for name, call in calls.items():
            duration = seconds_once(call, device)
            if round_number > 0:  # the first round warms up
                times[name].append(duration)
    return times


def extra_bytes_on_gpu(call: Callable[[], Any]) -> tuple[int, Any]:
    """Peak of what one call allocates beyond what was there before, and its result, included."""
    call()  # libraries' workspaces and compiled kernels come with the first call
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, result


def peak_bytes() -> int:
    """Largest resident set that this process ever had, or since `extra_bytes_on_cpu` reset it."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where ru_maxrss starts at the parent's peak
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes * (1 if platform.system() == "Darwin" else 1024)


def extra_bytes_on_cpu(call: Callable[[], Any]) -> int:
    """Growth of this process's peak in one call, its results included; for one call a process."""
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")  # Linux: forget the peak of compiling and loading
    before = peak_bytes()
    kept = call()
    after = peak_bytes()
    del kept
    return after - before


def dtype_on(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def join(parts: list[Exact]) -> Exact:
    grad_weight = None
    if parts[0].grad_weight is not None:
        grad_weight = sum(part.grad_weight for part in parts if part.grad_weight is not None)
        assert isinstance(grad_weight, Tensor)
    return Exact(
        torch.cat([part.grad_hidden for part in parts]),
        torch.cat([part.token_divergence for part in parts]),
        grad_weight,
    )


class Accuracy:
    """Gradients against float64 at the first and the last rollout; exact ones are computed once."""

    def __init__(self, inputs: Inputs, shape: Shape) -> None:
        self.inputs, self.num_tokens = inputs, shape.num_tokens
        last = shape.num_rollouts - 1
        self.rollouts = sorted({0, last})
        rows = [range(*inputs.cu_seqlens[r : r + 2].tolist()) for r in self.rollouts]
        self.rows = torch.tensor([row for part in rows for row in part])
        self.known: dict[Objective, Exact] = {}

    def exact(self, objective: Objective) -> Exact:
        if objective not in self.known:
            parts = [exact_gradient(self.inputs, objective, r) for r in self.rollouts]
            self.known[objective] = join(parts)
        return self.known[objective]

    def mean_kl(self) -> float:
        """KL(teacher, student) in nats, over the checked rollouts."""
        return self.exact(FORWARD_KL).token_divergence.mean().item()

    def errors(self, variant: Variant, result: Gradients) -> dict[str, float]:
        """Of a result for all inputs; where the head trains, also of the head's gradient."""
        exact = self.exact(variant.objective)
        rows = self.rows.to(result[0].device)
        errors = {"gradient_error": relative_error(result[0][rows], exact.grad_hidden)}
        if variant.trains_head:
            errors["head_gradient_error"] = self.head_error(variant)
        return errors

    def error_before_rounding(self, variant: Variant) -> float:
        assert variant.float32_rows is not None
        rows = self.rows.to(self.inputs.student.device)
        actual = variant.float32_rows(self.inputs)[rows]
        return relative_error(actual, self.exact(variant.objective).grad_hidden)

    def head_error(self, variant: Variant) -> float:
        """Of a run on the checked rollouts alone: an exact sum over all tokens would take long."""
        few = self.few_rollouts()
        parts = [
            exact_gradient(few, variant.objective, r, with_weight=True)
            for r in range(len(self.rollouts))
        ]
        expected = join(parts).grad_weight
        assert expected is not None
        return relative_error(variant.run(few)[1], expected)

    def few_rollouts(self) -> Inputs:
        rows = self.rows.to(self.inputs.student.device)
        student = self.inputs.student.detach()[rows].requires_grad_()
        cu_seqlens = self.inputs.cu_seqlens[: len(self.rollouts) + 1]
        return Inputs(
            student,
            self.inputs.teacher[rows],
            self.inputs.weight,
            cu_seqlens,
            self.inputs.token_ids[rows],
        )


def failure(errors: dict[str, float], dtype: torch.dtype) -> str:
    """Empty where every error is within its limit; NaN is within none."""
    limits = dict.fromkeys(errors, LIMITS[dtype])
    if "gradient_error_before_rounding" in errors:
        limits["gradient_error_before_rounding"] = LIMIT_BEFORE_ROUNDING
    failed = [f"{errors[name]:.1e}" for name in errors if not errors[name] <= limits[name]]
    return f"failed accuracy: {', '.join(failed)}" if failed else ""


def summary_of_times(times: list[float]) -> dict[str, float]:
    return {
        "median_ms": 1e3 * statistics.median(times),
        "fastest_ms": 1e3 * min(times),
        "slowest_ms": 1e3 * max(times),
        "repeats": len(times),
    }


def git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """The checkout's, or what BENCH_COMMIT says where there is none; empty where neither is."""
    head = git("rev-parse", "HEAD") if shutil.which("git") else ""
    if not head:
        return os.environ.get("BENCH_COMMIT", "")
    return head + ("+changes" if git("status", "--porcelain") else "")


def versions() -> dict[str, str]:
    """Of Python and of every package in a comparison that is installed."""
    names = {item.metadata["Name"]: item.version for item in metadata.distributions()}
    installed = {name.lower().replace("_", "-"): names[name] for name in names if name}
    found = {name: installed[name] for name in PACKAGES if name in installed}
    return {"python": platform.python_version(), **found, **cuda_version()}


def cuda_version() -> dict[str, str]:
    return {"cuda": str(torch.version.cuda)} if torch.cuda.is_available() else {}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}"


def environment(device: torch.device, command: str) -> dict[str, Any]:
    return {
        "command": command,
        "commit": commit(),
        "device": device_name(device),
        "num_threads": torch.get_num_threads(),
        "versions": versions(),
    }


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def emit(result: dict[str, Any], output: Path | None) -> None:
    """JSON as the last line of stdout, and in a file where one is asked for."""
    line = json.dumps(result)
    if output:
        output.write_text(line + "\n")
    print(line)
