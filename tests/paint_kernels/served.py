"""A teacher that serves its top-k, and the comparison with the float64 reference."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from paint_kernels import PaintLossOutput, paint_loss_from_topk, reference_topk

TAILS = ("bucket", "renormalise", "drop")
TOLERANCE = 2e-4
VALUES = (
    "loss",
    "token_loss",
    "token_kl",
    "student_entropy",
    "teacher_entropy",
    "entropy_ratio",
    "clipped_mass",
)


@dataclass(frozen=True)
class Served:
    student: Tensor
    weight: Tensor
    ids: Tensor
    logprobs: Tensor
    cu_seqlens: Tensor
    bias: Tensor | None = None

    def trainable(self, dtype: torch.dtype | None = None, *, head: bool = True) -> "Served":
        return replace(
            self,
            student=self._copy(self.student, dtype, True),
            weight=self._copy(self.weight, dtype, head),
            bias=None if self.bias is None else self._copy(self.bias, dtype, head),
        )

    @staticmethod
    def _copy(tensor: Tensor, dtype: torch.dtype | None, trained: bool) -> Tensor:
        return tensor.detach().to(dtype, copy=True).requires_grad_(trained)

    @property
    def trained(self) -> dict[str, Tensor]:
        """What gets a gradient, by name."""
        every = {"student": self.student, "weight": self.weight, "bias": self.bias}
        return {name: one for name, one in every.items() if one is not None and one.requires_grad}

    def loss(self, function: Callable[..., PaintLossOutput], **settings: Any) -> PaintLossOutput:
        tensors = self.student, self.weight, self.ids, self.logprobs, self.cu_seqlens
        own = {} if self.bias is None else {"lm_head_bias": self.bias}
        return function(*tensors, **own, **settings)


def serve(batch: Any, num_ids: int, *, ragged: bool = True, seed: int = 0) -> Served:
    """The teacher of a batch as a server that lists `num_ids` tokens, or, `ragged`, fewer in some
    rows: shuffled, with padding anywhere."""
    generator = torch.Generator().manual_seed(seed)
    own = batch.weight if batch.teacher_weight is None else batch.teacher_weight
    logprobs = torch.log_softmax(batch.teacher.double().cpu() @ own.double().cpu().T, dim=-1)
    top = torch.topk(logprobs, num_ids, dim=-1)
    shuffled = torch.rand(top.indices.shape, generator=generator).argsort(dim=-1)
    ids, values = top.indices.gather(1, shuffled), top.values.gather(1, shuffled)
    if ragged:
        kept = torch.randint(0, num_ids + 1, (len(ids), 1), generator=generator)
        hidden = torch.rand(ids.shape, generator=generator).argsort(dim=-1) >= kept
        ids = torch.where(hidden, -1, ids)
        values = torch.where(hidden, float("nan"), values)
    device = batch.student.device
    values = values.to(batch.student.dtype)
    return Served(
        *(batch.student, batch.weight, ids.to(device), values.to(device)),
        *(batch.cu_seqlens, batch.bias),
    )


def error_of(actual: Tensor, expected: Tensor) -> float:
    difference = (actual.detach().double() - expected.detach().double()).norm().item()
    norm = expected.detach().double().norm().item()
    return difference / norm if norm > 0 else difference


def clear_clip(served: Served, around: float, **settings: Any) -> float:
    """A clip near `around` that no summand comes close to: there the gradient jumps."""
    exact = served.trainable(torch.float64)

    def mass(clip: float) -> Tensor:
        settings["pointwise_clip"] = clip
        return exact.loss(reference_topk.paint_loss_from_topk, **settings).clipped_mass

    for step in range(20):
        clip = around * (0.9 + 0.01 * step)
        if torch.equal(mass(clip * (1 - 1e-4)), mass(clip * (1 + 1e-4))):
            return clip
    raise AssertionError("no clear clip")


def check_served(
    served: Served,
    *,
    head: bool = True,
    tolerance: float = TOLERANCE,
    backend: str = "torch",
    **settings: Any,
) -> PaintLossOutput:
    """Loss, every per-token value and every gradient, with an upstream gradient other than 1."""
    mine, exact_inputs = served.trainable(head=head), served.trainable(torch.float64, head=head)
    chunk_rows = settings.pop("chunk_rows", None)
    output = mine.loss(paint_loss_from_topk, backend=backend, chunk_rows=chunk_rows, **settings)
    exact = exact_inputs.loss(reference_topk.paint_loss_from_topk, **settings)
    assert torch.equal(output.selected, exact.selected)
    for name in VALUES:
        error = error_of(getattr(output, name), getattr(exact, name))
        assert error < tolerance, (name, error)
    upstream = 1.7 + torch.arange(exact.loss.numel(), dtype=torch.float64).to(exact.loss.device)
    upstream = upstream.view(exact.loss.shape)
    trained = mine.trained
    actual = torch.autograd.grad(output.loss, list(trained.values()), upstream.to(output.loss))
    expected = torch.autograd.grad(exact.loss, list(exact_inputs.trained.values()), upstream)
    for name, gradient, correct in zip(trained, actual, expected, strict=True):
        assert gradient.shape == correct.shape and gradient.dtype == trained[name].dtype
        assert error_of(gradient, correct) < tolerance, (name, error_of(gradient, correct))
    return output
