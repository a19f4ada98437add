"""Opaque operators for losses on the teacher's top-k, built like those of the loss in `_ops`.

The forward pass keeps each token's gradient on its support, k numbers, and the backward pass
computes those by the hidden states and the head from it.
"""

import torch
from torch import Tensor

from paint_kernels import _topk
from paint_kernels._checks import (
    check_cu_seqlens_values,
    check_temperatures_values,
    check_topk_values,
)
from paint_kernels._heads import Head, Heads, Projection, logits_dtype
from paint_kernels._matmul import compute_dtype
from paint_kernels._ops import (
    fake_loss_outputs,
    loss_outputs,
    no_autocast,
    no_second_derivative,
    upstream_of,
)
from paint_kernels._settings import LossSettings, fields_of, input_names, takes_fields
from paint_kernels._shards import Shard


@takes_fields
def _paint_loss_teacher_top_k(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    heads: Heads,
    cu_seqlens: Tensor,
    token_weights: Tensor | None,
    temperatures: Tensor | None,
    given_selection: Tensor | None,
    with_gradient: bool,
    settings: LossSettings,
    shard: Shard,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns loss, (6, N) token values, (N,) selected, the (N, k) columns of the teacher's largest
    logits, and the gradient by the student's h W^T there (or empty)."""
    check_cu_seqlens_values(cu_seqlens, student_hidden_states.shape[0])
    check_temperatures_values(temperatures)
    with no_autocast(student_hidden_states):
        ids, found = _topk.run_teacher_top_k(
            Projection(student_hidden_states, heads.student, temperatures, settings.backend),
            Projection(teacher_hidden_states, heads.teacher, temperatures, settings.backend),
            cu_seqlens,
            settings,
            shard,
            given_selection,
            with_gradient=with_gradient,
        )
    return *loss_outputs(found.values, token_weights), ids, found.gradient


TEACHER_TOP_K_INPUTS = input_names(_paint_loss_teacher_top_k)
paint_loss_teacher_top_k = torch.library.custom_op(
    "paint_kernels::paint_loss_teacher_top_k", _paint_loss_teacher_top_k, mutates_args=()
)


@paint_loss_teacher_top_k.register_fake
@takes_fields
def _(
    student_hidden_states,
    teacher_hidden_states,
    heads: Heads,
    cu_seqlens,
    token_weights,
    temperatures,
    given_selection,
    with_gradient,
    settings: LossSettings,
    *shard,
):
    dtype = logits_dtype(student_hidden_states, teacher_hidden_states, heads)
    shape = student_hidden_states.shape[0], settings.teacher_top_k
    new = student_hidden_states.new_empty
    return (
        *fake_loss_outputs(student_hidden_states, token_weights, dtype),
        new(shape, dtype=torch.int64),
        new(shape if with_gradient else (0,), dtype=dtype),
    )


def _teacher_top_k_setup(ctx, inputs, output):
    given = dict(zip(TEACHER_TOP_K_INPUTS, inputs, strict=True))
    _, _, _, ids, gradient = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.settings = *fields_of(LossSettings, given), *fields_of(Shard, given)
    ctx.shard = Shard(*fields_of(Shard, given))
    names = "token_weights", "student_hidden_states", "lm_head_weight", "lm_head_bias"
    ctx.save_for_backward(gradient, ids, *(given[name] for name in names))


def _teacher_top_k_backward(ctx, grad_loss, *_):
    no_second_derivative()
    if grad_loss is None:
        return (None,) * len(TEACHER_TOP_K_INPUTS)
    gradient, ids, token_weights, student, weight, bias = ctx.saved_tensors
    values = gradient * upstream_of(grad_loss, token_weights)[:, None]
    needed = dict(zip(TEACHER_TOP_K_INPUTS, ctx.needs_input_grad, strict=True))
    support = values, ids, student, weight, None, *ctx.settings
    grads: dict[str, Tensor] = {}
    if needed["student_hidden_states"]:
        grads["student_hidden_states"] = support_hidden_gradient(*support)
    if needed["lm_head_weight"]:
        grads["lm_head_weight"] = support_weight_gradient(*support)
    if needed["lm_head_bias"]:
        grads["lm_head_bias"] = _topk.bias_gradient(values, ids, bias, ctx.shard)
    return tuple(grads.get(name) for name in TEACHER_TOP_K_INPUTS)


paint_loss_teacher_top_k.register_autograd(
    _teacher_top_k_backward, setup_context=_teacher_top_k_setup
)


@takes_fields
def _paint_loss_from_topk(
    student_hidden_states: Tensor,
    lm_head_weight: Tensor,
    teacher_token_ids: Tensor,
    teacher_logprobs: Tensor,
    cu_seqlens: Tensor,
    token_weights: Tensor | None,
    with_hidden_gradient: bool,
    with_weight_gradient: bool,
    tail: str,
    settings: LossSettings,
    shard: Shard,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns loss, (6, N) token values, (N,) selected, the gradient on the support, the tail's
    log-sum-exp and its derivative by the hidden states. The last three may be empty."""
    check_cu_seqlens_values(cu_seqlens, student_hidden_states.shape[0])
    vocab_size = shard.vocab_size(lm_head_weight.shape[0])
    check_topk_values(teacher_token_ids, teacher_logprobs, vocab_size)
    with no_autocast(student_hidden_states):
        found, rest = _topk.run_loss_from_topk(
            Projection(student_hidden_states, Head(lm_head_weight)),
            teacher_token_ids.long(),
            teacher_logprobs,
            cu_seqlens,
            tail,
            settings,
            shard,
            with_hidden_gradient=with_hidden_gradient,
            with_gradient=with_hidden_gradient or with_weight_gradient,
        )
    empty = found.gradient.new_empty
    logsumexp, hidden = (empty(0), empty(0)) if rest is None else (rest.logsumexp, rest.hidden)
    return *loss_outputs(found.values, token_weights), found.gradient, logsumexp, hidden


FROM_TOPK_INPUTS = input_names(_paint_loss_from_topk)
paint_loss_from_topk = torch.library.custom_op(
    "paint_kernels::paint_loss_from_topk", _paint_loss_from_topk, mutates_args=()
)


@paint_loss_from_topk.register_fake
def _(
    student_hidden_states,
    lm_head_weight,
    teacher_token_ids,
    teacher_logprobs,
    cu_seqlens,
    token_weights,
    with_hidden_gradient,
    with_weight_gradient,
    tail,
    *settings,
):
    num_tokens, num_ids = teacher_token_ids.shape
    with_tail = tail != "renormalise"
    with_gradient = with_hidden_gradient or with_weight_gradient
    dtype = compute_dtype(student_hidden_states, lm_head_weight)
    new = student_hidden_states.new_empty
    hidden = student_hidden_states.shape if with_tail and with_hidden_gradient else (0,)
    return (
        *fake_loss_outputs(student_hidden_states, token_weights, dtype),
        new((num_tokens, num_ids + with_tail) if with_gradient else (0,), dtype=dtype),
        new((num_tokens,) if with_tail else (0,), dtype=dtype),
        new(hidden, dtype=dtype),
    )


def _from_topk_setup(ctx, inputs, output):
    given = dict(zip(FROM_TOPK_INPUTS, inputs, strict=True))
    _, _, _, gradient, logsumexp, hidden = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.settings = *fields_of(LossSettings, given), *fields_of(Shard, given)
    rest = (None, None) if given["tail"] == "renormalise" else (logsumexp, hidden)
    names = "token_weights", "teacher_token_ids", "student_hidden_states", "lm_head_weight"
    ctx.save_for_backward(gradient, *rest, *(given[name] for name in names))


def _from_topk_backward(ctx, grad_loss, *_):
    no_second_derivative()
    if grad_loss is None:
        return (None,) * len(FROM_TOPK_INPUTS)
    gradient, logsumexp, hidden, token_weights, *support = ctx.saved_tensors
    values = gradient * upstream_of(grad_loss, token_weights)[:, None]
    needed = dict(zip(FROM_TOPK_INPUTS, ctx.needs_input_grad, strict=True))
    grads: dict[str, Tensor] = {}
    if needed["student_hidden_states"]:
        by_hidden = support_hidden_gradient(values, *support, hidden, *ctx.settings)
        grads["student_hidden_states"] = by_hidden
    if needed["lm_head_weight"]:
        by_weight = support_weight_gradient(values, *support, logsumexp, *ctx.settings)
        grads["lm_head_weight"] = by_weight
    return tuple(grads.get(name) for name in FROM_TOPK_INPUTS)


paint_loss_from_topk.register_autograd(_from_topk_backward, setup_context=_from_topk_setup)


@torch.library.custom_op("paint_kernels::support_hidden_gradient", mutates_args=())
@takes_fields
def support_hidden_gradient(
    values: Tensor,
    token_ids: Tensor,
    student_hidden_states: Tensor,
    lm_head_weight: Tensor,
    tail_hidden: Tensor | None,
    settings: LossSettings,
    shard: Shard,
) -> Tensor:
    """Returns the gradient by the hidden states, in their dtype, from that on the support."""
    ids = token_ids.long()
    with no_autocast(values):
        return _topk.hidden_gradient(
            *(values, ids, lm_head_weight, tail_hidden, settings.backend, shard),
            student_hidden_states.dtype,
        )


@support_hidden_gradient.register_fake
def _(values, token_ids, student_hidden_states, *rest):
    return torch.empty_like(student_hidden_states, memory_format=torch.contiguous_format)


@torch.library.custom_op("paint_kernels::support_weight_gradient", mutates_args=())
@takes_fields
def support_weight_gradient(
    values: Tensor,
    token_ids: Tensor,
    student_hidden_states: Tensor,
    lm_head_weight: Tensor,
    tail_logsumexp: Tensor | None,
    settings: LossSettings,
    shard: Shard,
) -> Tensor:
    """Returns the gradient by the head, in its dtype, from that on the support."""
    student = Projection(student_hidden_states, Head(lm_head_weight))
    with no_autocast(values):
        gradient = _topk.weight_gradient(
            values, token_ids.long(), student, tail_logsumexp, settings, shard
        )
    return gradient.to(lm_head_weight.dtype)


@support_weight_gradient.register_fake
def _(values, token_ids, student_hidden_states, lm_head_weight, *rest):
    return torch.empty_like(lm_head_weight, memory_format=torch.contiguous_format)
