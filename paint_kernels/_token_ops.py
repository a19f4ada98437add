"""Opaque operators for the tokens of one model, built like those of the loss in `_ops`."""

import torch
from torch import Tensor

from paint_kernels import _tokens
from paint_kernels._checks import check_token_ids_values
from paint_kernels._matmul import compute_dtype
from paint_kernels._ops import no_autocast, no_second_derivative, scaled_rows


@torch.library.custom_op("paint_kernels::token_stats", mutates_args=())
def token_stats(
    hidden_states: Tensor, lm_head_weight: Tensor, temperature: float, backend: str
) -> Tensor:
    """Returns (2, N): logsumexp and entropy."""
    with no_autocast(hidden_states):
        return _tokens.run_stats(hidden_states, lm_head_weight, temperature, backend)


@token_stats.register_fake
def _(hidden_states, lm_head_weight, temperature, backend):
    dtype = compute_dtype(hidden_states, lm_head_weight)
    return hidden_states.new_empty((2, hidden_states.shape[0]), dtype=dtype)


@torch.library.custom_op("paint_kernels::token_logprobs", mutates_args=())
def token_logprobs(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    token_ids: Tensor,
    with_hidden_gradient: bool,
    temperature: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (N,) log-probabilities, (N,) entropies, and grad_hidden (or empty)."""
    check_token_ids_values(token_ids, lm_head_weight.shape[0])
    with no_autocast(hidden_states):
        values, grad_hidden = _tokens.run_logprobs(
            hidden_states,
            lm_head_weight,
            token_ids,
            temperature,
            backend,
            with_hidden_gradient=with_hidden_gradient,
        )
    return values[0].clone(), values[1].clone(), grad_hidden


@token_logprobs.register_fake
def _(hidden_states, lm_head_weight, token_ids, with_hidden_gradient, temperature, backend):
    dtype = compute_dtype(hidden_states, lm_head_weight)
    num_tokens = hidden_states.shape[0]
    return (
        hidden_states.new_empty((num_tokens,), dtype=dtype),
        hidden_states.new_empty((num_tokens,), dtype=dtype),
        hidden_states.new_empty(hidden_states.shape if with_hidden_gradient else (0,), dtype=dtype),
    )


def _token_logprobs_setup(ctx, inputs, output):
    hidden_states, weight, token_ids, _, temperature, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.settings, ctx.hidden_dtype = (temperature, backend), hidden_states.dtype
    redone = (None,) * 3
    if ctx.needs_input_grad[1]:
        redone = (hidden_states, weight, token_ids)
    ctx.save_for_backward(output[2], *redone)


def _token_logprobs_backward(ctx, grad_logprobs, *_):
    no_second_derivative()
    grad_hidden, *redone = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * 6
    if grad_logprobs is not None and ctx.needs_input_grad[0]:
        grads[0] = scaled_rows(grad_hidden, grad_logprobs, ctx.hidden_dtype)
    if grad_logprobs is not None and ctx.needs_input_grad[1]:
        full = token_logprobs_weight_gradient(*redone, grad_logprobs, *ctx.settings)
        grads[1] = full.to(redone[1].dtype)
    return tuple(grads)


token_logprobs.register_autograd(_token_logprobs_backward, setup_context=_token_logprobs_setup)


@torch.library.custom_op("paint_kernels::token_logprobs_weight_gradient", mutates_args=())
def token_logprobs_weight_gradient(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    token_ids: Tensor,
    token_weights: Tensor,
    temperature: float,
    backend: str,
) -> Tensor:
    """Returns the gradient of sum(token_weights * logprobs) by the head, float32 or better."""
    with no_autocast(hidden_states):
        return _tokens.run_logprobs_weight_gradient(
            hidden_states, lm_head_weight, token_ids, token_weights, temperature, backend
        )


@token_logprobs_weight_gradient.register_fake
def _(hidden_states, lm_head_weight, *rest):
    dtype = compute_dtype(hidden_states, lm_head_weight)
    return torch.empty_like(lm_head_weight, dtype=dtype)
