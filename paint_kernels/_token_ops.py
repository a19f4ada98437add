"""Opaque operators for the tokens of one model, built like those of the loss in `_ops`."""

import torch
from torch import Tensor

from paint_kernels import _tokens
from paint_kernels._checks import check_temperatures_values, check_token_ids_values
from paint_kernels._heads import Head, Projection
from paint_kernels._ops import (
    empty_head_gradients,
    no_autocast,
    no_second_derivative,
    scaled_rows,
)
from paint_kernels._settings import TokenSettings, fields_of, input_names, takes_fields
from paint_kernels._shards import Shard


@torch.library.custom_op("paint_kernels::token_stats", mutates_args=())
@takes_fields
def token_stats(
    hidden_states: Tensor,
    head: Head,
    temperatures: Tensor | None,
    settings: TokenSettings,
    shard: Shard,
) -> Tensor:
    """Returns (2, N): logsumexp and entropy."""
    check_temperatures_values(temperatures)
    with no_autocast(hidden_states):
        return _tokens.run_stats(
            Projection(hidden_states, head, temperatures, settings.backend), settings, shard
        )


@token_stats.register_fake
@takes_fields
def _(hidden_states, head: Head, temperatures, *settings):
    dtype = head.logits_dtype(hidden_states)
    return hidden_states.new_empty((2, hidden_states.shape[0]), dtype=dtype)


@takes_fields
def _token_logprobs(
    hidden_states: Tensor,
    head: Head,
    token_ids: Tensor,
    temperatures: Tensor | None,
    with_hidden_gradient: bool,
    settings: TokenSettings,
    shard: Shard,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (N,) log-probabilities, (N,) entropies, and grad_hidden (or empty)."""
    check_token_ids_values(token_ids, shard.vocab_size(head.weight.shape[0]))
    check_temperatures_values(temperatures)
    with no_autocast(hidden_states):
        values, grad_hidden = _tokens.run_logprobs(
            Projection(hidden_states, head, temperatures, settings.backend),
            token_ids,
            settings,
            shard,
            with_hidden_gradient=with_hidden_gradient,
        )
    return values[0].clone(), values[1].clone(), grad_hidden


LOGPROBS_INPUTS = input_names(_token_logprobs)
token_logprobs = torch.library.custom_op(
    "paint_kernels::token_logprobs", _token_logprobs, mutates_args=()
)


@token_logprobs.register_fake
@takes_fields
def _(hidden_states, head: Head, token_ids, temperatures, with_hidden_gradient, *settings):
    dtype = head.logits_dtype(hidden_states)
    num_tokens = hidden_states.shape[0]
    return (
        hidden_states.new_empty((num_tokens,), dtype=dtype),
        hidden_states.new_empty((num_tokens,), dtype=dtype),
        hidden_states.new_empty(hidden_states.shape if with_hidden_gradient else (0,), dtype=dtype),
    )


def _token_logprobs_setup(ctx, inputs, output):
    given = dict(zip(LOGPROBS_INPUTS, inputs, strict=True))
    # PyTorch's own last input comes after these here.
    needed = dict(zip(LOGPROBS_INPUTS, ctx.needs_input_grad, strict=False))
    _, _, grad_hidden = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.numbers = given["scale"], given["softcap"]
    ctx.settings = *fields_of(TokenSettings, given), *fields_of(Shard, given)
    ctx.hidden_dtype = given["hidden_states"].dtype
    redone = ()
    if needed["weight"] or needed["bias"]:
        names = "hidden_states", "weight", "bias", "token_ids", "temperatures"
        redone = [given[name] for name in names]
    ctx.save_for_backward(grad_hidden, *redone)


def _token_logprobs_backward(ctx, grad_logprobs, *_):
    no_second_derivative()
    if grad_logprobs is None:
        return (None,) * len(LOGPROBS_INPUTS)
    grad_hidden, *redone = ctx.saved_tensors
    needed = dict(zip(LOGPROBS_INPUTS, ctx.needs_input_grad, strict=True))
    grads: dict[str, Tensor] = {}
    if needed["hidden_states"]:
        grads["hidden_states"] = scaled_rows(grad_hidden, grad_logprobs, ctx.hidden_dtype)
    wanted = needed["weight"], needed["bias"]
    if any(wanted):
        hidden_states, weight, bias, token_ids, temperatures = redone
        by_weight, by_bias = token_logprobs_head_gradient(
            *(hidden_states, weight, bias, *ctx.numbers),
            *(token_ids, temperatures, grad_logprobs, *wanted, *ctx.settings),
        )
        if needed["weight"]:
            grads["weight"] = by_weight.to(weight.dtype)
        if needed["bias"]:
            grads["bias"] = by_bias.to(bias.dtype)
    return tuple(grads.get(name) for name in LOGPROBS_INPUTS)


token_logprobs.register_autograd(_token_logprobs_backward, setup_context=_token_logprobs_setup)


@torch.library.custom_op("paint_kernels::token_logprobs_head_gradient", mutates_args=())
@takes_fields
def token_logprobs_head_gradient(
    hidden_states: Tensor,
    head: Head,
    token_ids: Tensor,
    temperatures: Tensor | None,
    token_weights: Tensor,
    with_weight_gradient: bool,
    with_bias_gradient: bool,
    settings: TokenSettings,
    shard: Shard,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of sum(token_weights * logprobs) by the head's weight and bias, or
    empty tensors, float32 or better."""
    with no_autocast(hidden_states):
        return _tokens.run_logprobs_head_gradient(
            Projection(hidden_states, head, temperatures, settings.backend),
            token_ids,
            token_weights,
            settings,
            shard,
            with_weight_gradient=with_weight_gradient,
            with_bias_gradient=with_bias_gradient,
        )


@token_logprobs_head_gradient.register_fake
@takes_fields
def _(
    hidden_states,
    head: Head,
    token_ids,
    temperatures,
    token_weights,
    with_weight_gradient,
    with_bias_gradient,
    *settings,
):
    dtype = head.logits_dtype(hidden_states)
    wanted = with_weight_gradient, with_bias_gradient
    return empty_head_gradients(head.weight, dtype, *wanted)
