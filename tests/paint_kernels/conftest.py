"""Inputs of every kind, and the comparison with the float64 reference that most tests end in."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from paint_kernels import LossSettings, PaintLossOutput, _matmul, reference
from paint_kernels._heads import Heads
from paint_kernels._shards import WHOLE

TOLERANCE = 2e-4
VALUES = (
    "token_loss",
    "token_kl",
    "student_entropy",
    "teacher_entropy",
    "entropy_ratio",
    "clipped_mass",
)


@dataclass(frozen=True)
class Batch:
    student: Tensor
    teacher: Tensor
    weight: Tensor
    teacher_weight: Tensor | None
    cu_seqlens: Tensor
    bias: Tensor | None = None
    teacher_bias: Tensor | None = None

    def to(self, dtype: torch.dtype) -> "Batch":
        names = ("student", "teacher", "weight", "teacher_weight", "bias", "teacher_bias")
        given = {name: getattr(self, name) for name in names}
        cast = {name: one.detach().to(dtype) for name, one in given.items() if one is not None}
        return replace(self, **cast)

    def double(self) -> "Batch":
        return self.to(torch.float64)

    def trainable(self, head: bool = True) -> "Batch":
        return replace(
            self,
            student=self.student.detach().clone().requires_grad_(),
            weight=self.weight.detach().clone().requires_grad_(head),
            bias=None if self.bias is None else self.bias.detach().clone().requires_grad_(head),
        )

    def loss(self, function: Callable[..., PaintLossOutput], **settings: Any) -> PaintLossOutput:
        return function(
            self.student,
            self.teacher,
            self.weight,
            self.cu_seqlens,
            lm_head_bias=self.bias,
            teacher_lm_head_weight=self.teacher_weight,
            teacher_lm_head_bias=self.teacher_bias,
            **settings,
        )


def make_batch(
    lengths: tuple[int, ...] = (5, 0, 1, 11),
    vocab_size: int = 203,
    *,
    hidden: int = 16,
    teacher_hidden: int | None = None,
    noise: float | None = None,
    bias: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Batch:
    """Independent teachers, or with `noise` a teacher that far from the student: a small KL.

    bias: of both heads, if the teacher has its own.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(device)

    num_tokens = sum(lengths)
    student, weight = randn(num_tokens, hidden), randn(vocab_size, hidden) * 0.7
    teacher, teacher_weight = randn(num_tokens, hidden), None
    if noise is not None:
        teacher = student + noise * teacher
    if teacher_hidden is not None:
        teacher = randn(num_tokens, teacher_hidden)
        teacher_weight = randn(vocab_size, teacher_hidden) * 0.7
    bounds = torch.tensor((0, *lengths)).cumsum(0).to(torch.int32).to(device)
    batch = Batch(student, teacher, weight, teacher_weight, bounds)
    if not bias:
        return batch
    own = None if teacher_hidden is None else randn(vocab_size)
    return replace(batch, bias=randn(vocab_size), teacher_bias=own)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """By norm; absolute where nothing is expected."""
    difference = (actual.detach().double() - expected.detach().double()).norm()
    norm = expected.detach().double().norm()
    return (difference / norm if norm > 0 else difference).item()


def pointwise_terms(batch: Batch, **settings: Any) -> Tensor:
    """f(v) of every token and entry, float64, as the clip sees them."""
    batch, temperature = batch.double(), settings.get("temperature", 1.0)
    selected = batch.loss(reference.paint_loss, **settings).selected
    numbers = settings.get("logit_scale", 1.0), settings.get("logit_softcap")
    student = reference.head_logits(batch.student, batch.weight, batch.bias, *numbers)
    teacher_head = (batch.weight, batch.bias, *numbers)
    if batch.teacher_weight is not None:
        own = settings.get("teacher_logit_scale", 1.0), settings.get("teacher_logit_softcap")
        teacher_head = (batch.teacher_weight, batch.teacher_bias, *own)
    teacher = reference.head_logits(batch.teacher, *teacher_head)
    weight = settings.get("interpolation_weight", 0.03)
    target = reference.interpolate(teacher, student, selected, weight)
    return reference.divergence_terms(
        reference.log_probabilities(student, temperature),
        reference.log_probabilities(target, temperature),
        settings.get("divergence", "forward_kl"),
        settings.get("jsd_weight", 0.5),
    )


def clear_clip(terms: Tensor, around: float = 0.06) -> float:
    """A clip near `around` with no f close to it: f crossing the clip is a true discontinuity."""
    candidates = around * torch.linspace(0.8, 1.2, 41, dtype=torch.float64, device=terms.device)
    distance = (terms.flatten()[:, None] - candidates).abs().amin(dim=0)
    best = distance.argmax()
    assert distance[best] > 1e-5 * around
    return candidates[best].item()


def gradients(output: PaintLossOutput, batch: Batch, upstream: Tensor) -> list[Tensor]:
    inputs = (batch.student, batch.weight, batch.bias)
    wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    return list(torch.autograd.grad(output.loss, wanted, upstream.to(output.loss)))


def check_against_reference(
    function: Callable[..., PaintLossOutput],
    batch: Batch,
    *,
    head: bool = True,
    tolerance: float = TOLERANCE,
    backend: str = "torch",
    **settings: Any,
) -> PaintLossOutput:
    """Loss, every per-token value and every gradient, with an upstream gradient other than 1."""
    batch = batch.trainable(head)
    exact_batch = batch.double().trainable(head)
    chunk_rows = settings.pop("chunk_rows", None)
    exact = exact_batch.loss(reference.paint_loss, **settings)
    output = batch.loss(function, backend=backend, chunk_rows=chunk_rows, **settings)
    assert torch.equal(output.selected, exact.selected)
    assert relative_error(output.loss, exact.loss) < tolerance
    for name in VALUES:
        error = relative_error(getattr(output, name), getattr(exact, name))
        assert error < tolerance, (name, error)
    upstream = 1.7 + torch.arange(max(exact.loss.numel(), 1), dtype=torch.float64)
    upstream = upstream[: exact.loss.numel()].view(exact.loss.shape).to(exact.loss.device)
    actual = gradients(output, batch, upstream)
    for gradient, expected in zip(actual, gradients(exact, exact_batch, upstream), strict=True):
        assert gradient.shape == expected.shape
        assert relative_error(gradient, expected) < tolerance
    return output


@pytest.fixture(scope="session")
def build() -> Callable[..., Batch]:
    return make_batch


@pytest.fixture(scope="session")
def error() -> Callable[[Tensor, Tensor], float]:
    return relative_error


@pytest.fixture(scope="session")
def check() -> Callable[..., PaintLossOutput]:
    return check_against_reference


@pytest.fixture(scope="session")
def clip_for() -> Callable[..., float]:
    def clip(batch: Batch, around: float = 0.06, **settings: Any) -> float:
        return clear_clip(pointwise_terms(batch, **settings), around)

    return clip


def operator_gradients(
    batch: Batch,
    *,
    temperatures: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    **settings: Any,
) -> tuple[Tensor, ...]:
    """By the hidden states, unweighted rows before their last rounding, and by the head's weight
    and, if it has one, bias; then all in float64."""
    own = {"temperature": 0.9, "top_fraction": 0.3, "interpolation_weight": 0.3, "backend": "torch"}
    arguments = LossSettings(**own | settings).keywords()
    token_weights = torch.linspace(0.1, 1.3, len(batch.student)).to(batch.student.device) / 1000
    tensors = (batch.weight, batch.bias, batch.teacher_weight, batch.teacher_bias)
    has_bias = batch.bias is not None
    _, _, _, *actual = torch.ops.paint_kernels.paint_loss(
        *(batch.student, batch.teacher, *Heads(*tensors, scale, softcap).arguments()),
        *(batch.cu_seqlens, token_weights, None, temperatures, None, True, True, has_bias),
        *(*arguments.values(), *WHOLE.arguments()),
    )
    exact = batch.double().trainable()
    del arguments["backend"], arguments["chunk_rows"]
    if temperatures is not None:
        arguments["temperature"] = temperatures
    arguments |= {"logit_scale": scale, "logit_softcap": softcap}
    loss = exact.loss(reference.paint_loss, reduction="none", **arguments).loss
    (exact_rows,) = torch.autograd.grad(loss.sum(), exact.student, retain_graph=True)
    by_head = [exact.weight] if exact.bias is None else [exact.weight, exact.bias]
    exact_head = torch.autograd.grad((loss * token_weights).sum(), by_head)
    return (*actual[: 2 + has_bias], exact_rows, *exact_head)


@pytest.fixture(scope="session")
def row_gradients() -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    return operator_gradients


@pytest.fixture
def half_products_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The half-precision path of a GPU; without one, its product in float32."""
    if torch.cuda.is_available():
        return
    halves = (torch.bfloat16, torch.float16)

    def runs_in_half(hidden_states: Tensor, weight: Tensor) -> bool:
        return hidden_states.dtype == weight.dtype and weight.dtype in halves

    def half_product(a: Tensor, b: Tensor, out: Tensor, *, add: bool) -> None:
        assert a.dtype == b.dtype and a.dtype in halves and out.dtype == torch.float32
        if not add:
            out.zero_()
        out.add_(a.float() @ b.float())

    monkeypatch.setattr(_matmul, "runs_in_half", runs_in_half)
    monkeypatch.setattr(_matmul, "half_product", half_product)


@pytest.fixture
def head_products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """The rows of every product for the head's gradient, and whether it added to another."""
    found = []
    head = _matmul.GradientProduct.head

    def counted(self: Any, gradient: Tensor, rows: Any, out: Tensor, *, add: bool) -> None:
        found.append((len(gradient), add))
        head(self, gradient, rows, out, add=add)

    monkeypatch.setattr(_matmul.GradientProduct, "head", counted)
    return found
