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
from paint_kernels._ops import (
    empty_head_gradients,
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
    zero_weight: Tensor | None,
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
            *(given_selection, zero_weight),
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
    zero_weight,
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
    ctx.mark_non_differentiable(*output[1:])
    head = Heads(*fields_of(Heads, given)).student
    ctx.head_names = "lm_head_weight", "lm_head_bias"
    _keep_support(ctx, given, head, ids, gradient, None, None)


def _keep_support(ctx, given, head: Head, ids, gradient, tail_logsumexp, tail_hidden) -> None:
    """Saves what both losses need for their gradients. given: their inputs by name."""
    ctx.set_materialize_grads(False)
    ctx.input_names, ctx.head_numbers = tuple(given), (head.scale, head.softcap)
    ctx.settings = *fields_of(LossSettings, given), *fields_of(Shard, given)
    names = "token_weights", "zero_weight", "temperatures", "student_hidden_states"
    kept = gradient, ids, tail_logsumexp, tail_hidden, head.weight, head.bias
    ctx.save_for_backward(*kept, *(given[name] for name in names))


def _backward(ctx, grad_loss, *_):
    no_second_derivative()
    if grad_loss is None:
        return (None,) * len(ctx.input_names)
    gradient, ids, tail_logsumexp, tail_hidden, weight, bias, *by_token = ctx.saved_tensors
    token_weights, zero_weight, temperatures, student = by_token
    values = gradient * upstream_of(grad_loss, token_weights)[:, None]
    needed = dict(zip(ctx.input_names, ctx.needs_input_grad, strict=True))
    grads: dict[str, Tensor] = {}
    if needed["student_hidden_states"]:
        grads["student_hidden_states"] = support_hidden_gradient(
            values, ids, student, weight, tail_hidden, *ctx.settings
        )
    wanted = [needed[name] for name in ctx.head_names]
    if any(wanted):
        by_head = support_head_gradient(
            *(values, ids, student, weight, bias, *ctx.head_numbers),
            *(temperatures, zero_weight, tail_logsumexp, *wanted, *ctx.settings),
        )
        grads |= dict(zip(ctx.head_names, by_head, strict=True))
    return tuple(grads.get(name) if needed[name] else None for name in ctx.input_names)


paint_loss_teacher_top_k.register_autograd(_backward, setup_context=_teacher_top_k_setup)


@takes_fields
def _paint_loss_from_topk(
    student_hidden_states: Tensor,
    head: Head,
    teacher_token_ids: Tensor,
    teacher_logprobs: Tensor,
    cu_seqlens: Tensor,
    token_weights: Tensor | None,
    zero_weight: Tensor | None,
    temperatures: Tensor | None,
    given_selection: Tensor | None,
    with_hidden_gradient: bool,
    with_head_gradient: bool,
    tail: str,
    settings: LossSettings,
    shard: Shard,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns loss, (6, N) token values, (N,) selected, the gradient on the support, the tail's
    log-sum-exp and its derivative by the hidden states. The last three may be empty."""
    check_cu_seqlens_values(cu_seqlens, student_hidden_states.shape[0])
    check_temperatures_values(temperatures)
    vocab_size = shard.vocab_size(head.weight.shape[0])
    check_topk_values(teacher_token_ids, teacher_logprobs, zero_weight, vocab_size)
    with no_autocast(student_hidden_states):
        found, rest = _topk.run_loss_from_topk(
            Projection(student_hidden_states, head, temperatures, settings.backend),
            teacher_token_ids.long(),
            teacher_logprobs,
            cu_seqlens,
            tail,
            settings,
            shard,
            *(given_selection, zero_weight),
            with_hidden_gradient=with_hidden_gradient,
            with_gradient=with_hidden_gradient or with_head_gradient,
        )
    empty = found.gradient.new_empty
    logsumexp, hidden = (empty(0), empty(0)) if rest is None else (rest.logsumexp, rest.hidden)
    return *loss_outputs(found.values, token_weights), found.gradient, logsumexp, hidden


FROM_TOPK_INPUTS = input_names(_paint_loss_from_topk)
paint_loss_from_topk = torch.library.custom_op(
    "paint_kernels::paint_loss_from_topk", _paint_loss_from_topk, mutates_args=()
)


@paint_loss_from_topk.register_fake
@takes_fields
def _(
    student_hidden_states,
    head: Head,
    teacher_token_ids,
    teacher_logprobs,
    cu_seqlens,
    token_weights,
    zero_weight,
    temperatures,
    given_selection,
    with_hidden_gradient,
    with_head_gradient,
    tail,
    *settings,
):
    num_tokens, num_ids = teacher_token_ids.shape
    with_tail = tail != "renormalise"
    with_gradient = with_hidden_gradient or with_head_gradient
    dtype = head.logits_dtype(student_hidden_states)
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
    ctx.mark_non_differentiable(*output[1:])
    head = Head(*fields_of(Head, given))
    ctx.head_names = "weight", "bias"
    rest = (None, None) if given["tail"] == "renormalise" else (logsumexp, hidden)
    _keep_support(ctx, given, head, given["teacher_token_ids"], gradient, *rest)


paint_loss_from_topk.register_autograd(_backward, setup_context=_from_topk_setup)


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


@torch.library.custom_op("paint_kernels::support_head_gradient", mutates_args=())
@takes_fields
def support_head_gradient(
    values: Tensor,
    token_ids: Tensor,
    student_hidden_states: Tensor,
    head: Head,
    temperatures: Tensor | None,
    zero_weight: Tensor | None,
    tail_logsumexp: Tensor | None,
    with_weight_gradient: bool,
    with_bias_gradient: bool,
    settings: LossSettings,
    shard: Shard,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients by the head's weight and bias, in their dtypes, from that on the
    support, or empty tensors."""
    student = Projection(student_hidden_states, head, temperatures, settings.backend)
    with no_autocast(values):
        by_weight, by_bias = _topk.head_gradients(
            *(values, token_ids.long(), student),
            *(zero_weight, tail_logsumexp, settings, shard),
            with_weight=with_weight_gradient,
            with_bias=with_bias_gradient,
        )
    return by_weight.to(head.weight.dtype), by_bias.to(_bias_dtype(head))


def _bias_dtype(head: Head) -> torch.dtype:
    return head.weight.dtype if head.bias is None else head.bias.dtype


@support_head_gradient.register_fake
@takes_fields
def _(
    values,
    token_ids,
    student_hidden_states,
    head: Head,
    temperatures,
    zero_weight,
    tail_logsumexp,
    with_weight_gradient,
    with_bias_gradient,
    *settings,
):
    wanted = with_weight_gradient, with_bias_gradient
    by_weight, by_bias = empty_head_gradients(head.weight, head.weight.dtype, *wanted)
    return by_weight, by_bias.to(_bias_dtype(head))
