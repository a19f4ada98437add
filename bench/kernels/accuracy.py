"""Checks the gradients of the variants against float64, on some of the rollouts."""

from typing import NamedTuple

import torch
from torch import Tensor

from bench.kernels.variants import Variant
from bench.losses import FORWARD_KL, JSD_WEIGHT, Gradients, Inputs, Objective, Shape
from bench.measure import relative_error
from paint_kernels import entropy_ratio, reference

LIMITS = {torch.float32: 1e-3, torch.bfloat16: 5e-3}
"""largest relative gradient error at which a variant is timed. Rounding the result to bfloat16
alone costs 1.7e-3; rounding the gradient with respect to the logits before the last GEMM costs as
much."""
LIMIT_BEFORE_ROUNDING = 1e-3
"""largest relative error of the float32 gradient before it is rounded to the inputs' dtype"""


class Exact(NamedTuple):
    grad_hidden: Tensor
    """(n, H) float64"""
    token_divergence: Tensor
    """(n,) float64, unclipped, in nats"""
    grad_weight: Tensor | None


def exact_gradient(
    inputs: Inputs, objective: Objective, rollout: int, *, with_weight: bool = False
) -> Exact:
    """Returns the float64 gradient of the loss's mean over all N tokens, at one rollout's rows.

    Uses the reference implementation, 256 rows at a time: first the selection of the whole
    rollout, then the loss against the interpolated target.
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
    """Returns (n,) bool: the interpolated positions of one rollout."""
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
    """Compares gradients with float64 at the first and the last rollout.

    The exact gradients of an objective are computed once and kept.
    """

    def __init__(self, inputs: Inputs, shape: Shape) -> None:
        self.inputs, self.num_tokens = inputs, shape.num_tokens
        last = len(inputs.cu_seqlens) - 2
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
        """Returns the mean KL(teacher, student) over the checked rollouts, in nats."""
        return self.exact(FORWARD_KL).token_divergence.mean().item()

    def errors(self, variant: Variant, result: Gradients) -> dict[str, float]:
        """Returns the relative errors of a result for all inputs; also of the head's gradient if it
        trains."""
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
        """Returns the relative error of the head's gradient, from a run on the checked rollouts
        only.

        The exact gradient of the head sums over all tokens, which would take too long.
        """
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
        lengths = self.inputs.cu_seqlens.diff()[self.rollouts]
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        return Inputs(
            student,
            self.inputs.teacher[rows],
            self.inputs.weight,
            cu_seqlens,
            self.inputs.token_ids[rows],
        )


def failure(errors: dict[str, float], dtype: torch.dtype) -> str:
    """Returns the reason why a variant fails; empty if every error is within its limit. NaN never
    is."""
    limits = dict.fromkeys(errors, LIMITS[dtype])
    if "gradient_error_before_rounding" in errors:
        limits["gradient_error_before_rounding"] = LIMIT_BEFORE_ROUNDING
    failed = [f"{errors[name]:.1e}" for name in errors if not errors[name] <= limits[name]]
    return f"failed accuracy: {', '.join(failed)}" if failed else ""
