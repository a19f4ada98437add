"""Statistics and log-probabilities of one model's tokens, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from paint_kernels._backends import row_functions
from paint_kernels._heads import Projection, add_bias_gradient, scale_rows
from paint_kernels._matmul import GradientProduct
from paint_kernels._plan import most_rows, row_slices
from paint_kernels._settings import TokenSettings
from paint_kernels._shards import Shard
from paint_kernels._sources import chunk_buffer

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def logits_by_chunk(
    projection: Projection, settings: TokenSettings, shard: Shard
) -> Iterator[tuple[slice, Float[Tensor, "R V"]]]:
    """Yields the logits of one model by chunks, in one buffer that the caller may overwrite."""
    weight, num_rows = projection.head.weight, len(projection.hidden_states)
    vocab_size, hidden_size = weight.shape
    width = shard.planned_width(vocab_size)
    planned = settings.chunk_rows or most_rows(width, hidden_size, weight.device, 1)
    slices = row_slices(num_rows, planned)
    most = max((rows.stop - rows.start for rows in slices), default=0)
    buffer = chunk_buffer(most, vocab_size, projection.dtype, weight.device, settings.backend)
    for rows in slices:
        yield rows, projection.logits(rows, out=buffer[: rows.stop - rows.start])


def run_stats(
    projection: Projection, settings: TokenSettings, shard: Shard
) -> Float[Tensor, "2 N"]:
    """Returns (2, N): logsumexp and entropy."""
    hidden_states = projection.hidden_states
    stats = hidden_states.new_empty(2, len(hidden_states), dtype=projection.dtype)
    functions = row_functions(settings.backend, shard)
    for rows, logits in logits_by_chunk(projection, settings, shard):
        stats[0, rows], stats[1, rows] = functions.row_stats(logits, settings.temperature)
    return stats


class LogprobsGradient:
    """Buffers for gradients by the logits, in the dtype and scale of the gradient products."""

    def __init__(self, projection: Projection, settings: TokenSettings) -> None:
        self.projection, self.backend = projection, settings.backend
        self.dtype = projection.dtype
        hidden_states, weight = projection.hidden_states, projection.head.weight
        self.product = GradientProduct(hidden_states, weight, settings.temperature, self.dtype)
        self.buffer = None

    def of(self, logits: Float[Tensor, "R V"]) -> Float[Tensor, "R V"]:
        # In place only with PyTorch: a Triton lane may read an entry that another has overwritten.
        # The slope of a cap needs the logits after their gradient.
        in_place = self.backend == "torch" and self.projection.head.softcap is None
        if in_place and self.product.dtype == self.dtype:
            return logits
        if self.buffer is None:
            num_rows, vocab_size = logits.shape
            self.buffer = chunk_buffer(
                num_rows, vocab_size, self.product.dtype, logits.device, self.backend
            )
        return self.buffer[: len(logits)]

    def through_head(
        self, gradient: Float[Tensor, "R V"], logits: Float[Tensor, "R V"], rows: slice
    ) -> None:
        """Turns the gradient by the logits into that by h W^T over `Projection.factor`."""
        slope = self.projection.slope_(logits, rows)
        if slope is not None:
            gradient.mul_(slope)


def run_logprobs(
    projection: Projection,
    token_ids: Int[Tensor, " N"],
    settings: TokenSettings,
    shard: Shard,
    *,
    with_hidden_gradient: bool,
) -> tuple[Float[Tensor, "2 N"], Tensor]:
    """Returns (2, N) log-probabilities and entropies, and the unweighted gradient by the hidden
    states, of the whole head."""
    gradients = LogprobsGradient(projection, settings)
    hidden_states = projection.hidden_states
    values = hidden_states.new_empty(2, len(hidden_states), dtype=gradients.dtype)
    size = hidden_states.shape if with_hidden_gradient else (0,)
    grad_hidden = hidden_states.new_empty(size, dtype=gradients.dtype)
    if with_hidden_gradient:
        gradients.product.prepare_hidden()
    for rows, logits in logits_by_chunk(projection, settings, shard):
        gradient = gradients.of(logits) if with_hidden_gradient else None
        values[0, rows], values[1, rows] = row_functions(settings.backend, shard).row_logprobs(
            logits,
            token_ids[rows],
            settings.temperature,
            gradient,
            gradient_scale=gradients.product.scale,
        )
        if gradient is not None:
            gradients.through_head(gradient, logits, rows)
            gradients.product.hidden(gradient, out=grad_hidden[rows])
    if with_hidden_gradient:
        gradients.product.unscale_hidden(grad_hidden)
        scale_rows(grad_hidden, projection.factor)
        grad_hidden = shard.sum(grad_hidden)
    return values, grad_hidden


def run_logprobs_head_gradient(
    projection: Projection,
    token_ids: Int[Tensor, " N"],
    token_weights: Float[Tensor, " N"],
    settings: TokenSettings,
    shard: Shard,
    *,
    with_weight_gradient: bool,
    with_bias_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients by the head's weight and bias, or empty tensors."""
    gradients = LogprobsGradient(projection, settings)
    weight, scale = projection.head.weight, gradients.product.scale
    weights = token_weights * projection.factor
    gradients.product.prepare_head(weights)
    size = weight.shape if with_weight_gradient else (0,)
    grad_weight = weight.new_zeros(size, dtype=gradients.dtype)
    grad_bias = weight.new_zeros(len(weight) if with_bias_gradient else 0, dtype=gradients.dtype)
    for rows, logits in logits_by_chunk(projection, settings, shard):
        gradient = gradients.of(logits)
        row_functions(settings.backend, shard).row_logprobs(
            logits, token_ids[rows], settings.temperature, gradient, gradient_scale=scale
        )
        gradients.through_head(gradient, logits, rows)
        if with_bias_gradient:
            add_bias_gradient(gradient, weights[rows], grad_bias)
        if with_weight_gradient:
            gradients.product.head(gradient, rows, out=grad_weight)
    gradients.product.unscale_head(grad_weight)
    return grad_weight, grad_bias.div_(scale)
