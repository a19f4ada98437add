"""The output head of a model: from hidden states to logits, and the gradient's way back."""

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from paint_kernels._matmul import compute_dtype, project
from paint_kernels._precision import full_precision

BIAS_TILE = 2**14
"""columns of the gradient by the logits that are converted to float32 at a time"""


@dataclass(frozen=True)
class Head:
    """Logits z = softcap * tanh(scale * (h W^T + b) / softcap), without a cap scale * (h W^T + b).

    The order is that of the models in transformers: Cohere and Granite scale, Gemma 2 caps. The
    elementwise part runs in place, on the rows of one chunk: in PyTorch a bias or a scale reads and
    writes 8 bytes per float32 logit, a cap 24.

    weight: (V, H). bias: (V,), or None. scale, softcap: above 0; no softcap is None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def arguments(self) -> tuple[Tensor, Tensor | None, float, float | None]:
        """Returns the fields as positional arguments of the operators."""
        return self.weight, self.bias, self.scale, self.softcap

    def logits_dtype(self, hidden_states: Tensor) -> torch.dtype:
        """Returns float32, or float64 where one of the tensors is."""
        bias = () if self.bias is None else (self.bias,)
        return compute_dtype(hidden_states, self.weight, *bias)

    def from_product(self, product: Tensor, columns: Tensor | None = None) -> Tensor:
        """Turns rows of h W^T into logits, in place.

        columns: (R, k) int64, where the product has only these columns of each row.
        """
        if self.bias is not None:
            product.add_(self.bias if columns is None else self.bias[columns])
        if self.softcap is not None:
            return product.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap)
        return product if self.scale == 1 else product.mul_(self.scale)

    @property
    def is_product(self) -> bool:
        """Whether logits are h W^T and no more."""
        return self.bias is None and self.scale == 1 and self.softcap is None


@dataclass(frozen=True)
class Projection:
    """The rows of one model: N hidden states, the head, and the temperatures of the tokens.

    hidden_states: (N, H). temperatures: (N,), which divide the logits here; None where one number
    does that later, in the row functions, at no cost. Dividing reads and writes 8 bytes per float32
    logit in PyTorch. backend: of the elementwise work on whole rows of logits. Triton does all of
    it in one pass: 8 bytes.
    """

    hidden_states: Tensor
    head: Head
    temperatures: Tensor | None
    backend: str

    def from_product(
        self, product: Tensor, rows: slice | Tensor, columns: Tensor | None = None
    ) -> Tensor:
        """Turns h W^T of these rows into their logits z, or z / T, in place.

        columns: as in `Head.from_product`; for few of them PyTorch does it with every backend.
        """
        head = self.head
        if head.is_product and self.temperatures is None:
            return product
        temperatures = None if self.temperatures is None else self.temperatures[rows]
        if self.backend == "triton" and columns is None:
            from paint_kernels import _triton_heads

            numbers = head.scale, head.softcap
            _triton_heads.logits_from_product(product, head.bias, *numbers, temperatures)
            return product
        logits = head.from_product(product, columns)
        return logits if temperatures is None else logits.div_(temperatures[:, None])

    def logits(self, rows: slice, out: Tensor) -> Tensor:
        """Computes the (R, V) logits of these rows in `out`."""
        product = project(self.hidden_states[rows], self.head.weight, out=out)
        return self.from_product(product, rows)

    def through_cap(self, logits: Tensor, rows: slice | Tensor, *gradients: Tensor) -> None:
        """Multiplies gradients by these rows' logits, in place, by the derivative of the logits by
        h W^T over `factor`: 1 - (z / softcap)^2, or 1 without a cap. May overwrite the logits."""
        softcap = self.head.softcap
        if softcap is None:
            return
        temperatures = None if self.temperatures is None else self.temperatures[rows]
        if self.backend == "triton":
            from paint_kernels import _triton_heads

            for gradient in gradients:
                _triton_heads.gradient_through_cap(gradient, logits, softcap, temperatures)
            return
        if temperatures is not None:
            logits.mul_(temperatures[:, None])
        one = logits.new_ones(())
        slope = torch.addcmul(one, logits, logits, value=-1 / softcap**2, out=logits)
        for gradient in gradients:
            gradient.mul_(slope)

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits: float32, or float64 where one of the tensors is."""
        return self.head.logits_dtype(self.hidden_states)

    @property
    def factor(self) -> float | Tensor:
        """What `through_cap` leaves out: a number, or (N,). It multiplies sums over many entries,
        in float32, where the gradient by the logits may be float16."""
        return self.head.scale if self.temperatures is None else self.head.scale / self.temperatures


def scale_rows(rows: Tensor, factor: float | Tensor) -> None:
    """Multiplies the (N, H) rows by `Projection.factor`, in place."""
    if isinstance(factor, Tensor):
        rows.mul_(factor[:, None])
    elif factor != 1:
        rows.mul_(factor)


@full_precision()
def add_bias_gradient(gradient: Tensor, weights: Tensor, out: Tensor) -> None:
    """Adds the (V,) sum over rows of weights (R,) * gradient (R, V) to `out`, in its dtype."""
    for part, total in zip(gradient.split(BIAS_TILE, 1), out.split(BIAS_TILE), strict=True):
        total += weights @ part.to(out.dtype)


def cap_or_none(softcap: float | None) -> float | None:
    """Returns None for a cap of inf, which says that there is none."""
    return None if softcap == math.inf else softcap


@dataclass(frozen=True)
class Heads:
    """The heads of both models, as callers give them and operators take them: tensors, then
    numbers.

    What is None of the teacher is the student's if the teacher has no weight of its own, else
    nothing: no bias, a scale of 1, no cap. A cap of inf is none. Shapes and bounds are those of
    `Head`.
    """

    lm_head_weight: Tensor
    lm_head_bias: Tensor | None = None
    teacher_lm_head_weight: Tensor | None = None
    teacher_lm_head_bias: Tensor | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    teacher_logit_scale: float | None = None
    teacher_logit_softcap: float | None = None

    @property
    def student(self) -> Head:
        softcap = cap_or_none(self.logit_softcap)
        return Head(self.lm_head_weight, self.lm_head_bias, self.logit_scale, softcap)

    @property
    def teacher(self) -> Head:
        own = self.teacher_lm_head_weight
        like = self.student if own is None else Head(own)
        given = {
            "bias": self.teacher_lm_head_bias,
            "scale": self.teacher_logit_scale,
            "softcap": self.teacher_logit_softcap,
        }
        like = replace(like, **{name: one for name, one in given.items() if one is not None})
        return replace(like, softcap=cap_or_none(like.softcap))

    def arguments(self) -> tuple[Tensor | float | None, ...]:
        """Returns the fields as positional arguments of the operators."""
        return tuple(getattr(self, field.name) for field in fields(self))


def logits_dtype(student: Tensor, teacher: Tensor, heads: Heads) -> torch.dtype:
    """Returns the dtype of the logits of both models, from their hidden states."""
    own = heads.teacher.logits_dtype(teacher)
    return torch.promote_types(heads.student.logits_dtype(student), own)
