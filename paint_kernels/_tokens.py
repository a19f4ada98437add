"""Statistics and log-probabilities of one model's tokens, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from paint_kernels._backends import row_functions
from paint_kernels._matmul import GradientProduct, compute_dtype, project
from paint_kernels._plan import most_rows, row_slices
from paint_kernels._sources import chunk_buffer

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def logits_by_chunk(
    hidden_states: Float[Tensor, "N H"], weight: Float[Tensor, "V H"], backend: str
) -> Iterator[tuple[slice, Float[Tensor, "R V"]]]:
    """Yields the logits of one model by chunks, in one buffer that the caller may overwrite."""
    vocab_size, hidden_size = weight.shape
    slices = row_slices(len(hidden_states), most_rows(vocab_size, hidden_size, weight.device))
    most = max((rows.stop - rows.start for rows in slices), default=0)
    dtype = compute_dtype(hidden_states, weight)
    buffer = chunk_buffer(most, vocab_size, dtype, weight.device, backend)
    for rows in slices:
        hidden = hidden_states[rows]
        yield rows, project(hidden, weight, out=buffer[: len(hidden)])


def run_stats(
    hidden_states: Float[Tensor, "N H"],
    weight: Float[Tensor, "V H"],
    temperature: float,
    backend: str,
) -> Float[Tensor, "2 N"]:
    """Returns (2, N): logsumexp and entropy."""
    dtype = compute_dtype(hidden_states, weight)
    stats = torch.empty(2, len(hidden_states), dtype=dtype, device=weight.device)
    for rows, logits in logits_by_chunk(hidden_states, weight, backend):
        stats[0, rows], stats[1, rows] = row_functions(backend).row_stats(logits, temperature)
    return stats


class LogprobsGradient:
    """Buffers for gradients by the logits, in the dtype and scale of the gradient products."""

    def __init__(
        self,
        hidden_states: Float[Tensor, "N H"],
        weight: Float[Tensor, "V H"],
        temperature: float,
        backend: str,
    ) -> None:
        self.dtype = compute_dtype(hidden_states, weight)
        self.product = GradientProduct(hidden_states, weight, temperature, self.dtype)
        self.buffer, self.backend = None, backend

    def of(self, logits: Float[Tensor, "R V"]) -> Float[Tensor, "R V"]:
        # In place only with PyTorch: a Triton lane may read an entry that another has overwritten.
        if self.product.dtype == self.dtype and self.backend == "torch":
            return logits
        if self.buffer is None:
            num_rows, vocab_size = logits.shape
            self.buffer = chunk_buffer(
                num_rows, vocab_size, self.product.dtype, logits.device, self.backend
            )
        return self.buffer[: len(logits)]


def run_logprobs(
    hidden_states: Float[Tensor, "N H"],
    weight: Float[Tensor, "V H"],
    token_ids: Int[Tensor, " N"],
    temperature: float,
    backend: str,
    *,
    with_hidden_gradient: bool,
) -> tuple[Float[Tensor, "2 N"], Tensor]:
    """Returns (2, N) log-probabilities and entropies, and the unweighted gradient by the hidden
    states."""
    gradients = LogprobsGradient(hidden_states, weight, temperature, backend)
    values = torch.empty(2, len(hidden_states), dtype=gradients.dtype, device=weight.device)
    size = hidden_states.shape if with_hidden_gradient else (0,)
    grad_hidden = hidden_states.new_empty(size, dtype=gradients.dtype)
    if with_hidden_gradient:
        gradients.product.prepare_hidden()
    for rows, logits in logits_by_chunk(hidden_states, weight, backend):
        gradient = gradients.of(logits) if with_hidden_gradient else None
        values[0, rows], values[1, rows] = row_functions(backend).row_logprobs(
            logits, token_ids[rows], temperature, gradient, gradient_scale=gradients.product.scale
        )
        if gradient is not None:
            gradients.product.hidden(gradient, out=grad_hidden[rows])
    if with_hidden_gradient:
        gradients.product.unscale_hidden(grad_hidden)
    return values, grad_hidden


def run_logprobs_weight_gradient(
    hidden_states: Float[Tensor, "N H"],
    weight: Float[Tensor, "V H"],
    token_ids: Int[Tensor, " N"],
    token_weights: Float[Tensor, " N"],
    temperature: float,
    backend: str,
) -> Float[Tensor, "V H"]:
    gradients = LogprobsGradient(hidden_states, weight, temperature, backend)
    gradients.product.prepare_head(token_weights)
    grad_weight = torch.zeros_like(weight, dtype=gradients.dtype)
    for rows, logits in logits_by_chunk(hidden_states, weight, backend):
        gradient = gradients.of(logits)
        row_functions(backend).row_logprobs(
            logits, token_ids[rows], temperature, gradient, gradient_scale=gradients.product.scale
        )
        gradients.product.head(gradient, rows, out=grad_weight)
    gradients.product.unscale_head(grad_weight)
    return grad_weight
