"""Part "waits" of the GPU check: the losses never wait for the device; offsets past 2^31 are right.

PyTorch reports a wait as an error under `torch.cuda.set_sync_debug_mode("error")`.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.gpu.job import Job
from bench.losses import QWEN3_HIDDEN, QWEN3_VOCAB_SIZE, TEACHER_NOISE
from bench.measure import relative_error
from paint_kernels import paint_loss, paint_loss_from_logits, reference, token_logprobs

LENGTHS = (300, 2000, 0, 1500, 4392)
"""rollouts of several lengths, one of them empty and one longer than any chunk"""
VOCAB_SIZE, HIDDEN = QWEN3_VOCAB_SIZE, QWEN3_HIDDEN["1.7b"]
LARGE_NUM_TOKENS, CHECKED_TOKENS = 14500, 100
"""offset 2^31 lies in row 14,135; the last rollout lies beyond it"""
LARGE_BYTES_NEEDED = 8 * 2 * LARGE_NUM_TOKENS * VOCAB_SIZE
"""both models' logits, their noise, the saved gradient and the result, with a margin"""
LIMITS = {"token_loss": 1e-3, "token_kl": 1e-3, "gradient": 5e-3}
"""relative errors; the gradient of bfloat16 logits is rounded to bfloat16"""
AGREEMENT_LIMIT = 5e-3

Loss = Callable[[Tensor, Tensor], Tensor]


def without_waiting(call: Callable[[], Any]) -> Any:
    """Returns the result of a call; RuntimeError if the call waits for the device."""
    call()  # compiles the kernels, which may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    return result


def forward_backward(loss: Loss, hidden: Tensor, weight: Tensor, trains_head: bool) -> Tensor:
    """Computes the gradient of the hidden states, for a loss of any shape."""
    hidden = hidden.detach().requires_grad_()
    weight = weight.detach().requires_grad_(trains_head)
    result = loss(hidden, weight)
    wanted = [hidden, weight] if trains_head else [hidden]
    return torch.autograd.grad(result, wanted, torch.ones_like(result))[0]


def cases(device: torch.device) -> dict[str, Callable[[], Tensor]]:
    generator = torch.Generator(device).manual_seed(0)
    options = {"generator": generator, "device": device, "dtype": torch.bfloat16}
    num_tokens = sum(LENGTHS)
    weight = torch.randn(VOCAB_SIZE, HIDDEN, **options) * (2.4 / HIDDEN**0.5)
    student = torch.randn(num_tokens, HIDDEN, **options)
    teacher = student + TEACHER_NOISE * torch.randn(num_tokens, HIDDEN, **options)
    bounds = torch.tensor((0, *LENGTHS)).cumsum(0).to(torch.int32)
    ids = torch.randint(VOCAB_SIZE, (num_tokens,), generator=generator, device=device)

    def paint(hidden: Tensor, head: Tensor, *, where: str, reduction: str) -> Tensor:
        where_bounds = bounds_at[where]
        return paint_loss(hidden, teacher, head, where_bounds, reduction=reduction).loss

    def logprobs(hidden: Tensor, head: Tensor) -> Tensor:
        return token_logprobs(hidden, head, ids).logprobs

    bounds_at = {"CPU": bounds, "GPU": bounds.to(device)}
    found = {}
    for where in bounds_at:
        for trains_head in (False, True):
            for reduction in ("sequence_mean", "none"):
                loss = functools.partial(paint, where=where, reduction=reduction)
                call = functools.partial(forward_backward, loss, student, weight, trains_head)
                head = "trainable head" if trains_head else "frozen head"
                found[f"paint_loss, bounds on the {where}, {head}, {reduction}"] = call
    found["token_logprobs"] = functools.partial(forward_backward, logprobs, student, weight, True)
    return found


def check_cases(job: Job) -> int:
    """Runs all cases; returns how many did not wait.

    A gradient must not depend on the device of the bounds.
    """
    gradients = {}
    for name, call in cases(job.device).items():

        def checked(call: Callable[[], Tensor] = call, name: str = name) -> str:
            gradients[name] = without_waiting(call)
            return "did not wait"

        job.attempt(name, checked)
    for name, gradient in gradients.items():
        other = gradients.get(name.replace("on the CPU", "on the GPU"))
        if "on the CPU" not in name or other is None:
            continue
        error = relative_error(gradient, other)
        job.save(**{f"{name}: difference with bounds on the GPU": error})
        if not error <= AGREEMENT_LIMIT:
            job.failures.append(
                f"{name}: gradient differs by {error:.1e} from that with bounds on the GPU"
            )
    return len(gradients)


def large_logits(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (N, V) logits with one peak per row, and bounds with a short rollout past offset
    2^31."""
    generator = torch.Generator(device).manual_seed(1)
    options = {"generator": generator, "device": device, "dtype": torch.bfloat16}
    student = torch.randn(LARGE_NUM_TOKENS, VOCAB_SIZE, **options).mul_(2.4)
    rows = torch.arange(LARGE_NUM_TOKENS, device=device)
    student[rows, rows * 10 % VOCAB_SIZE] = 15.0
    teacher = torch.randn(LARGE_NUM_TOKENS, VOCAB_SIZE, **options).mul_(0.3).add_(student)
    bounds = [0, LARGE_NUM_TOKENS // 2, LARGE_NUM_TOKENS - CHECKED_TOKENS, LARGE_NUM_TOKENS]
    return student.requires_grad_(), teacher, torch.tensor(bounds, dtype=torch.int32)


def large_offsets(device: torch.device) -> dict[str, float]:
    """Returns the relative errors of the last rollout's values and gradients against float64."""
    free, _ = torch.cuda.mem_get_info(device)
    if free < LARGE_BYTES_NEEDED:
        needed = LARGE_BYTES_NEEDED / 2**30
        raise ValueError(
            f"{free / 2**30:.0f} GiB of device memory are free; {needed:.0f} GiB are needed"
        )
    student, teacher, bounds = large_logits(device)
    output = paint_loss_from_logits(student, teacher, bounds, reduction="sum")
    (gradient,) = torch.autograd.grad(output.loss, student)
    last = slice(LARGE_NUM_TOKENS - CHECKED_TOKENS, None)
    wide = student.detach()[last].double().requires_grad_()
    exact = reference.paint_loss_from_logits(
        wide, teacher[last].double(), torch.tensor([0, CHECKED_TOKENS]), reduction="sum"
    )
    (exact_gradient,) = torch.autograd.grad(exact.loss, wide)
    if not torch.equal(output.selected[last], exact.selected):
        raise ValueError("the selection past offset 2^31 differs from the one in float64")
    errors = {
        "token_loss": relative_error(output.token_loss[last], exact.token_loss),
        "token_kl": relative_error(output.token_kl[last], exact.token_kl),
        "gradient": relative_error(gradient[last], exact_gradient),
    }
    if not all(error <= LIMITS[name] for name, error in errors.items()):
        raise ValueError(f"errors past offset 2^31 are {errors}, above the limits {LIMITS}")
    return errors


def run(job: Job) -> str:
    num_passed = check_cases(job)
    torch.cuda.empty_cache()
    errors = job.attempt("large offsets", functools.partial(large_offsets, job.device))
    large = "failed" if errors is None else f"gradient error {errors['gradient']:.1e}"
    return f"{num_passed} cases did not wait; offsets past 2^31: {large}"
