"""Measures what rounding the logits costs.

It reports the relative error of the loss's gradient with respect to the hidden states, against
float64, when the logits between the GEMMs are stored in a cheaper format, and when the gradient
with respect to the logits is rounded before the last GEMM. With a shared head, delta = z_T - z_S =
(h_T - h_S) W^T can replace z_T. The formats are emulated on a CPU: float32 GEMMs, one rounding to
the format, then float64. Scaling h_T - h_S sets each mean KL. The last line of stdout is JSON.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import measure
from bench.measure import progress
from bench.tables import logit_formats_table

TEMPERATURE, CLIP = 1.0, 0.06
LOGIT_STD, LARGEST_PEAK = 2.4, 25.0
FLOAT16_SCALE = 256.0
"""the gradient with respect to a logit is at most 1; times 256, small entries stay above float16's
smallest positive value, 6e-8"""
MEAN_KLS = [0.0002, 0.002, 0.02, 0.2]


class Case(NamedTuple):
    student: Tensor
    """(N, H) float32; all three tensors hold values that bfloat16 represents exactly"""
    teacher: Tensor
    weight: Tensor
    """(V, H)"""


def bfloat16(tensor: Tensor) -> Tensor:
    return tensor.to(torch.bfloat16).to(tensor.dtype)


def mean_kl(student: Tensor, teacher: Tensor, weight: Tensor) -> float:
    """Returns KL(teacher, student) in nats, float64."""
    log_p = torch.log_softmax(student.double() @ weight.double().T / TEMPERATURE, dim=-1)
    log_q = torch.log_softmax(teacher.double() @ weight.double().T / TEMPERATURE, dim=-1)
    return (log_q.exp() * (log_q - log_p)).sum(dim=-1).mean().item()


def make_case(seed: int, target_kl: float, num_rows: int, hidden: int, vocab_size: int) -> Case:
    """Returns rows with one peak each, and a teacher whose mean KL is within a few percent of the
    target."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab_size, hidden, generator=generator) * LOGIT_STD / hidden**0.5
    weight = bfloat16(weight)
    direction = weight[torch.randint(vocab_size, (num_rows,), generator=generator)]
    direction = direction / direction.square().sum(dim=1, keepdim=True)
    student = torch.randn(num_rows, hidden, generator=generator)
    student += direction * LARGEST_PEAK * torch.rand(num_rows, 1, generator=generator)
    student = bfloat16(student)
    noise = torch.randn(num_rows, hidden, generator=generator)
    scale = target_kl**0.5
    for _ in range(4):
        teacher = bfloat16(student + scale * noise)
        scale *= (target_kl / mean_kl(student, teacher, weight)) ** 0.5
    return Case(student, bfloat16(student + scale * noise), weight)


def logit_gradient(student_logits: Tensor, delta: Tensor) -> Tensor:
    """Returns (N, V) float64: the gradient of the clipped forward KL with respect to z_S; z_T = z_S
    + delta."""
    log_p = torch.log_softmax(student_logits.double() / TEMPERATURE, dim=-1)
    log_q = torch.log_softmax((student_logits.double() + delta.double()) / TEMPERATURE, dim=-1)
    q = log_q.exp()
    unclipped = torch.where(q * (log_q - log_p) <= CLIP, q, 0.0)
    return (log_p.exp() * unclipped.sum(dim=-1, keepdim=True) - unclipped) / TEMPERATURE


def logits_and_delta(case: Case) -> dict[str, tuple[int, Tensor, Tensor]]:
    """Returns, by format, bytes per vocabulary entry for both models' logits; z_S; z_T - z_S."""
    transposed = case.weight.T
    student, teacher = case.student @ transposed, case.teacher @ transposed
    difference = case.teacher - case.student
    delta = difference @ transposed
    delta_of_rounded = bfloat16(difference) @ transposed

    def apart(z_s: Tensor, z_t: Tensor) -> tuple[Tensor, Tensor]:
        return z_s, z_t.double() - z_s.double()

    return {
        "z_S bf16, z_T bf16": (4, *apart(bfloat16(student), bfloat16(teacher))),
        "z_S bf16, delta bf16": (4, bfloat16(student), bfloat16(delta)),
        "z_S fp32, delta bf16": (6, student, bfloat16(delta)),
        "z_S fp32, delta bf16, of h_T - h_S in bf16": (6, student, bfloat16(delta_of_rounded)),
        "z_S fp32, delta fp32, of h_T - h_S in bf16": (8, student, delta_of_rounded),
        "z_S fp32, z_T fp32": (8, *apart(student, teacher)),
    }


def rounded_gradients() -> dict[str, Callable[[Tensor], Tensor]]:
    """Formats of the gradient with respect to the logits in the last GEMM."""

    def float16(gradient: Tensor) -> Tensor:
        return (gradient * FLOAT16_SCALE).to(torch.float16).double() / FLOAT16_SCALE

    return {
        "gradient by the logits bf16": bfloat16,
        "gradient by the logits fp16, scaled by 256": float16,
    }


def errors_of(case: Case) -> dict[str, tuple[int, float]]:
    """Returns, by format, the bytes per vocabulary entry and the relative error of the gradient of
    h_S."""
    weight = case.weight.double()
    exact_student = case.student.double() @ weight.T
    exact_delta = (case.teacher.double() - case.student.double()) @ weight.T
    exact_logit_gradient = logit_gradient(exact_student, exact_delta)
    exact = exact_logit_gradient @ weight
    found = {}
    for name, (size, student_logits, delta) in logits_and_delta(case).items():
        gradient = logit_gradient(student_logits, delta) @ weight
        found[name] = size, measure.relative_error(gradient, exact)
    for name, rounded in rounded_gradients().items():
        gradient = rounded(exact_logit_gradient) @ weight
        found[name] = 2, measure.relative_error(gradient, exact)
    found["result bf16"] = 0, measure.relative_error(bfloat16(exact), exact)
    return found


def run(
    num_rows: int,
    hidden: int,
    vocab_size: int,
    mean_kls: list[float],
    num_seeds: int,
    command: str,
) -> dict[str, Any]:
    """Measures every format at every mean KL; returns the JSON that the command prints."""
    by_format: dict[str, dict[str, Any]] = {}
    for target_kl in mean_kls:
        errors: dict[str, list[float]] = {}
        for seed in range(num_seeds):
            progress(f"mean KL {target_kl:g}, seed {seed}")
            case = make_case(seed, target_kl, num_rows, hidden, vocab_size)
            for name, (size, error) in errors_of(case).items():
                by_format.setdefault(name, {"format": name, "bytes": size, "errors": []})
                errors.setdefault(name, []).append(error)
        for name, values in errors.items():
            cell = {"median": statistics.median(values), "largest": max(values)}
            by_format[name]["errors"].append(cell)
    return {
        "name": "logit_formats",
        **measure.environment(torch.device("cpu"), command),
        "num_rows": num_rows,
        "hidden": hidden,
        "vocab_size": vocab_size,
        "mean_kls": mean_kls,
        "num_seeds": num_seeds,
        "formats": list(by_format.values()),
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.logit_formats", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--num-rows", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab-size", type=int, default=151936)
    parser.add_argument("--mean-kls", type=float, nargs="+", default=MEAN_KLS)
    parser.add_argument("--num-seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args(argv)
    result = run(
        arguments.num_rows,
        arguments.hidden,
        arguments.vocab_size,
        arguments.mean_kls,
        arguments.num_seeds,
        " ".join(["python -m bench.logit_formats", *argv]),
    )
    print(logit_formats_table(result))
    measure.emit(result, arguments.output)


if __name__ == "__main__":
    main(sys.argv[1:])
