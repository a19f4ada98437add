"""Time, memory and accuracy of `paint_loss` on a CPU against plain PyTorch.

    OMP_NUM_THREADS=2 python -m bench.kernels --output kernels.json

Both sides compute the same loss of the same inputs, forward and backward, with a frozen shared
head. Times are medians of runs that alternate in one process. Extra memory is the growth of the
peak resident set (ru_maxrss) over what it was with the inputs in place, each side in a process of
its own. Gradient errors are relative, by norm, against float64 on the first rollout. The last line
printed is JSON.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from paint_kernels import entropy_ratio, paint_loss, reference, select_top_fraction

TEMPERATURE, CLIP, TOP_FRACTION, INTERPOLATION = 1.1, 0.06, 0.03, 0.03


class Inputs(NamedTuple):
    student: Tensor
    teacher: Tensor
    weight: Tensor
    cu_seqlens: Tensor


def make_inputs(num_rollouts: int, num_tokens: int, hidden: int, vocab_size: int) -> Inputs:
    """A teacher close to the student, and logits with a standard deviation of about 2.4."""
    torch.manual_seed(0)
    student = torch.randn(num_tokens, hidden)
    teacher = student + 0.2 * torch.randn(num_tokens, hidden)
    weight = torch.randn(vocab_size, hidden).mul_(2.4 / hidden**0.5)
    cu_seqlens = torch.linspace(0, num_tokens, num_rollouts + 1).round().int()
    return Inputs(student.requires_grad_(), teacher, weight, cu_seqlens)


def plain_loss(student: Tensor, teacher: Tensor, weight: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The loss as one writes it with the logits of all tokens at hand."""
    student_logits = student @ weight.T
    log_p_student = torch.log_softmax(student_logits / TEMPERATURE, dim=-1)
    with torch.no_grad():
        teacher_logits = teacher @ weight.T
        log_p_target = torch.log_softmax(teacher_logits / TEMPERATURE, dim=-1)
        teacher_entropy = -(log_p_target.exp() * log_p_target).sum(dim=-1)
        student_entropy = -(log_p_student.exp() * log_p_student).sum(dim=-1)
        ratio = entropy_ratio(teacher_entropy, student_entropy)
        rows = select_top_fraction(ratio, cu_seqlens, TOP_FRACTION)
        mixed = (1 - INTERPOLATION) * teacher_logits[rows] + INTERPOLATION * student_logits[rows]
        log_p_target[rows] = torch.log_softmax(mixed / TEMPERATURE, dim=-1)
        del teacher_logits
    f = log_p_target.exp() * (log_p_target - log_p_student)
    token_loss = f.clamp(max=CLIP).sum(dim=-1)
    return torch.stack(
        [part.mean() for part in token_loss.split(cu_seqlens.diff().tolist())]
    ).mean()


def fused_loss(student: Tensor, teacher: Tensor, weight: Tensor, cu_seqlens: Tensor) -> Tensor:
    return paint_loss(
        student,
        teacher,
        weight,
        cu_seqlens,
        temperature=TEMPERATURE,
        pointwise_clip=CLIP,
        top_fraction=TOP_FRACTION,
        interpolation_weight=INTERPOLATION,
        backend="torch",
    ).loss


SIDES: dict[str, Callable[..., Tensor]] = {"paint_kernels": fused_loss, "plain": plain_loss}


def gradient(loss: Callable[..., Tensor], inputs: Inputs) -> Tensor:
    return torch.autograd.grad(loss(*inputs), inputs.student)[0]


def measure_seconds(inputs: Inputs, repeats: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    for repeat in range(repeats + 1):
        for name, loss in SIDES.items():
            start = time.perf_counter()
            gradient(loss, inputs)
            if repeat > 0:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def peak_bytes() -> int:
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes * (1 if platform.system() == "Darwin" else 1024)


def extra_bytes_here(name: str, shape: dict[str, int]) -> int:
    """Growth of this process's peak; a tiny run first loads what the libraries load once."""
    gradient(SIDES[name], make_inputs(2, 8, 16, 64))
    inputs = make_inputs(**shape)
    before = peak_bytes()
    gradient(SIDES[name], inputs)
    return peak_bytes() - before


def measure_extra_bytes(shape: dict[str, int]) -> dict[str, int]:
    """Each side in a fresh process. To be called while this one is small: a child inherits its
    peak."""
    measured = {}
    for name in SIDES:
        command = [sys.executable, "-m", "bench.kernels", "--memory-of", name]
        for key, value in shape.items():
            command += [f"--{key.replace('_', '-')}", str(value)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        measured[name] = int(done.stdout)
    return measured


def gradient_errors(inputs: Inputs) -> dict[str, float]:
    """On the first rollout: the sequence mean makes its gradient independent of the others."""
    end = int(inputs.cu_seqlens[1])
    student = inputs.student.detach()[:end].double().requires_grad_()
    exact = reference.paint_loss(
        student,
        inputs.teacher[:end].double(),
        inputs.weight.double(),
        inputs.cu_seqlens[:2],
        temperature=TEMPERATURE,
        pointwise_clip=CLIP,
        top_fraction=TOP_FRACTION,
        interpolation_weight=INTERPOLATION,
        denominator=len(inputs.cu_seqlens) - 1,
    )
    (expected,) = torch.autograd.grad(exact.loss, student)
    errors = {}
    for name, loss in SIDES.items():
        difference = gradient(loss, inputs)[:end].double() - expected
        errors[name] = (difference.norm() / expected.norm()).item()
    return errors


def run(shape: dict[str, int], repeats: int) -> dict[str, Any]:
    extra_bytes = measure_extra_bytes(shape)
    inputs = make_inputs(**shape)
    seconds = measure_seconds(inputs, repeats)
    return {
        "name": "paint_loss_cpu",
        "shape": shape,
        "time_ratio": seconds["paint_kernels"] / seconds["plain"],
        "memory_ratio": extra_bytes["paint_kernels"] / extra_bytes["plain"],
        "seconds": seconds,
        "extra_bytes": extra_bytes,
        "gradient_relative_error": gradient_errors(inputs),
        "device": f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}",
        "num_threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def print_table(result: dict[str, Any]) -> None:
    print(f"forward and backward at {result['shape']}, {result['num_threads']} threads")
    print(f"{'':14}{'seconds':>10}{'extra MB':>12}{'gradient error':>18}")
    for name in SIDES:
        seconds, megabytes = result["seconds"][name], result["extra_bytes"][name] / 1e6
        error = result["gradient_relative_error"][name]
        print(f"{name:14}{seconds:10.3f}{megabytes:12.1f}{error:18.1e}")
    print(f"{'ratio':14}{result['time_ratio']:10.3f}{result['memory_ratio']:12.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--num-rollouts", type=int, default=8)
    parser.add_argument("--num-tokens", type=int, default=512, help="of all rollouts together")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocab-size", type=int, default=151936)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    parser.add_argument("--memory-of", choices=list(SIDES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape = {
        name: getattr(arguments, name)
        for name in ("num_rollouts", "num_tokens", "hidden", "vocab_size")
    }
    if arguments.memory_of:
        print(extra_bytes_here(arguments.memory_of, shape))
        return
    result = run(shape, arguments.repeats)
    print_table(result)
    line = json.dumps(result)
    if arguments.output:
        arguments.output.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
