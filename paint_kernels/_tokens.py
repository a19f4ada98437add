"""Statistics and log-probabilities of one model's tokens, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from paint_kernels._backends import row_functions
from paint_kernels._heads import Projection, add_bias_gradient, scale_rows
from paint_kernels._matmul import GradientProduct
from paint_kernels._plan import most_rows, row_slices
from paint_kernels._settings import TokenSettings
from paint_kernels._shards import Shard
from paint_kernels._sources import LogitGradients, chunk_buffer

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def rows_by_chunk(
    projection: Projection, settings: TokenSettings, shard: Shard
) -> tuple[list[slice], int]:
    """Returns the rows of each chunk, and the largest number of them."""
    weight = projection.head.weight
    vocab_size, hidden_size = weight.shape
    width = shard.planned_width(vocab_size)
    planned = settings.chunk_rows or most_rows(width, hidden_size, weight.device, 1)
    slices = row_slices(len(projection.hidden_states), planned)
    return slices, max((rows.stop - rows.start for rows in slices), default=0)


def logits_by_chunk(
    projection: Projection, settings: TokenSettings, shard: Shard
) -> Iterator[tuple[slice, Float[Tensor, "R V"]]]:
    """Yields the logits of one model by chunks, in one buffer that the caller may overwrite."""
    slices, most = rows_by_chunk(projection, settings, shard)
    weight, backend = projection.head.weight, settings.backend
    buffer = chunk_buffer(most, len(weight), projection.dtype, weight.device, backend)
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


def logit_gradients(
    projection: Projection,
    settings: TokenSettings,
    shard: Shard,
    *,
    with_weight_gradient: bool = False,
) -> LogitGradients:
    """Returns what takes the gradients by the logits of `logits_by_chunk`."""
    hidden_states, weight = projection.hidden_states, projection.head.weight
    return LogitGradients(
        projection,
        GradientProduct(hidden_states, weight, settings.temperature, projection.dtype),
        rows_per_chunk=rows_by_chunk(projection, settings, shard)[1],
        backend=settings.backend,
        with_weight_gradient=with_weight_gradient,
    )


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
    gradients = logit_gradients(projection, settings, shard)
    hidden_states, dtype = projection.hidden_states, projection.dtype
    values = hidden_states.new_empty(2, len(hidden_states), dtype=dtype)
    size = hidden_states.shape if with_hidden_gradient else (0,)
    grad_hidden = hidden_states.new_empty(size, dtype=dtype)
    if with_hidden_gradient:
        gradients.product.prepare_hidden()
    for rows, logits in logits_by_chunk(projection, settings, shard):
        gradient = gradients.of(logits, rows) if with_hidden_gradient else None
        values[0, rows], values[1, rows] = row_functions(settings.backend, shard).row_logprobs(
            logits,
            token_ids[rows],
            settings.temperature,
            gradient,
            gradient_scale=gradients.product.scale,
        )
        if gradient is not None:
            projection.through_cap(logits, rows, gradient)
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
    gradients = logit_gradients(
        projection, settings, shard, with_weight_gradient=with_weight_gradient
    )

    def gradient_of(rows: slice, logits: Float[Tensor, "R V"]) -> Float[Tensor, "R V"]:
        gradient = gradients.of(logits, rows)
        row_functions(settings.backend, shard).row_logprobs(
            logits,
            token_ids[rows],
            settings.temperature,
            gradient,
            gradient_scale=gradients.product.scale,
        )
        projection.through_cap(logits, rows, gradient)
        return gradient

    chunks = logits_by_chunk(projection, settings, shard)
    return sum_head_gradients(
        gradients, chunks, gradient_of, token_weights, with_bias=with_bias_gradient
    )


def sum_head_gradients(
    gradients: LogitGradients,
    chunks: Iterator[tuple[slice, Float[Tensor, "R V"]]],
    gradient_of: Callable[[slice, Float[Tensor, "R V"]], Float[Tensor, "R V"]],
    token_weights: Float[Tensor, " N"],
    *,
    with_bias: bool,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients by the head's weight and bias, or empty tensors, as sums over tokens.

    gradient_of: takes the rows of a chunk and their logits. Returns what `gradients.of` has given
        for these, filled with the gradient by h W^T over `Projection.factor`.
    """
    projection, with_weight = gradients.projection, gradients.grad_weight.ndim == 2
    weights, vocab_size = token_weights * projection.factor, len(projection.head.weight)
    gradients.product.prepare_head(weights)
    grad_bias = weights.new_zeros(vocab_size if with_bias else 0, dtype=projection.dtype)
    for rows, logits in chunks:
        gradient = gradient_of(rows, logits)
        if with_bias:
            add_bias_gradient(gradient, weights[rows], grad_bias)
        if with_weight:
            gradients.add(gradient, rows)
    gradients.finish()
    return gradients.grad_weight, grad_bias.div_(gradients.product.scale)
