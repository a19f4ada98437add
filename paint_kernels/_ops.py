"""The loss as opaque operators: torch.compile sees one node and does not trace the chunk loop.

The forward pass computes the gradient by the hidden states (or logits), one unweighted row per
token. The backward pass scales it out of place, so that any upstream gradient and any number of
backward passes work. The head's gradient sums over tokens, so it needs their weights. The forward
pass has them for a reduced loss. For per-token losses the backward pass recomputes the logits.
"""

import torch
from torch import Tensor

from paint_kernels import _loss, _topk
from paint_kernels._checks import check_cu_seqlens_values
from paint_kernels._matmul import compute_dtype
from paint_kernels._plan import largest_chunk, most_rows, plan_chunks
from paint_kernels._settings import LossSettings, takes_settings
from paint_kernels._sources import HiddenSource, LogitsSource


def no_autocast(tensor: Tensor) -> torch.autocast:
    """Disables autocast, which would round the logits to half precision."""
    return torch.autocast(tensor.device.type, enabled=False)


def no_second_derivative() -> None:
    """Refuses create_graph: the kept gradients are constants, so it would miss terms."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "paint_kernels has first derivatives only: call backward without create_graph."
        )


def reduced(token_loss: Tensor, token_weights: Tensor | None) -> Tensor:
    # A copy, because the outputs of an operator must not share memory.
    return token_loss.clone() if token_weights is None else (token_loss * token_weights).sum()


def upstream_of(grad_loss: Tensor, token_weights: Tensor | None) -> Tensor:
    """Returns the (N,) gradient of the final scalar by each token's loss."""
    return grad_loss if token_weights is None else grad_loss * token_weights


def scaled_rows(rows: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    # `out` casts on the fly. A product followed by a cast would hold a float32 copy.
    scaled = rows.new_empty(rows.shape, dtype=dtype)
    return torch.mul(rows, upstream[:, None], out=scaled)


@torch.library.custom_op("paint_kernels::paint_loss", mutates_args=())
@takes_settings
def paint_loss(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor | None,
    cu_seqlens: Tensor,
    token_weights: Tensor | None,
    with_hidden_gradient: bool,
    with_weight_gradient: bool,
    settings: LossSettings,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns loss, (6, N) token values, (N,) selected, grad_hidden, grad_weight (or empty).

    Rows of grad_hidden are unweighted, in float32 or better. They are rounded to the dtype of the
    hidden states once, after the upstream gradient has scaled them. The teacher's top-k has an
    operator of its own.
    """
    assert settings.teacher_top_k is None
    check_cu_seqlens_values(cu_seqlens, student_hidden_states.shape[0])
    teacher_weight = lm_head_weight if teacher_lm_head_weight is None else teacher_lm_head_weight
    vocab_size, hidden_size = lm_head_weight.shape
    most = most_rows(vocab_size, hidden_size, lm_head_weight.device)
    full = _loss.finds_statistics_first(settings)
    chunks = plan_chunks(cu_seqlens, len(student_hidden_states), most, full=full)
    with no_autocast(student_hidden_states):
        source = HiddenSource(
            (student_hidden_states, lm_head_weight),
            (teacher_hidden_states, teacher_weight),
            token_weights,
            rows_per_chunk=largest_chunk(chunks),
            temperature=settings.temperature,
            with_hidden_gradient=with_hidden_gradient,
            with_weight_gradient=with_weight_gradient and token_weights is not None,
            backend=settings.backend,
        )
        values = _loss.run_loss(source, chunks, cu_seqlens, settings)
    loss = reduced(values.table[0], token_weights)
    return loss, values.table, values.selected, source.grad_hidden, source.grad_weight


@paint_loss.register_fake
def _(
    student_hidden_states,
    teacher_hidden_states,
    lm_head_weight,
    teacher_lm_head_weight,
    cu_seqlens,
    token_weights,
    with_hidden_gradient,
    with_weight_gradient,
    *settings,
):
    num_tokens = student_hidden_states.shape[0]
    tensors = [student_hidden_states, teacher_hidden_states, lm_head_weight]
    if teacher_lm_head_weight is not None:
        tensors.append(teacher_lm_head_weight)
    dtype = compute_dtype(*tensors)
    new = student_hidden_states.new_empty
    in_forward = with_weight_gradient and token_weights is not None
    return (
        new((num_tokens,) if token_weights is None else (), dtype=dtype),
        new((6, num_tokens), dtype=dtype),
        new((num_tokens,), dtype=torch.bool),
        new(student_hidden_states.shape if with_hidden_gradient else (0,), dtype=dtype),
        lm_head_weight.new_empty(lm_head_weight.shape, dtype=dtype)
        if in_forward
        else lm_head_weight.new_empty((0,)),
    )


def _paint_loss_setup(ctx, inputs, output):
    student, teacher, weight, teacher_weight, _, token_weights, _, with_weight, *settings = inputs
    _, _, selected, grad_hidden, grad_weight = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.settings, ctx.num_inputs = settings, len(inputs)
    ctx.hidden_dtype, ctx.weight_dtype = student.dtype, weight.dtype
    ctx.with_weight = with_weight
    redone = (None,) * 5
    if with_weight and token_weights is None:
        redone = (student, teacher, weight, teacher_weight, selected)
    ctx.save_for_backward(token_weights, grad_hidden, grad_weight, *redone)


def _paint_loss_backward(ctx, grad_loss, *_):
    no_second_derivative()
    grads: list[Tensor | None] = [None] * ctx.num_inputs
    if grad_loss is None:
        return tuple(grads)
    token_weights, grad_hidden, grad_weight, *redone = ctx.saved_tensors
    upstream = upstream_of(grad_loss, token_weights)
    if ctx.needs_input_grad[0]:
        grads[0] = scaled_rows(grad_hidden, upstream, ctx.hidden_dtype)
    if ctx.needs_input_grad[2]:
        if token_weights is None:
            full = paint_loss_weight_gradient(*redone, upstream, *ctx.settings)
            grads[2] = full.to(ctx.weight_dtype)
        else:
            scaled = grad_weight.new_empty(grad_weight.shape, dtype=ctx.weight_dtype)
            grads[2] = torch.mul(grad_weight, grad_loss, out=scaled)
    return tuple(grads)


paint_loss.register_autograd(_paint_loss_backward, setup_context=_paint_loss_setup)


@torch.library.custom_op("paint_kernels::paint_loss_weight_gradient", mutates_args=())
@takes_settings
def paint_loss_weight_gradient(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor | None,
    selected: Tensor,
    token_weights: Tensor,
    settings: LossSettings,
) -> Tensor:
    """Returns the gradient of sum(token_weights * token_loss) by the head, float32 or better."""
    teacher_weight = lm_head_weight if teacher_lm_head_weight is None else teacher_lm_head_weight
    vocab_size, hidden_size = lm_head_weight.shape
    most = most_rows(vocab_size, hidden_size, lm_head_weight.device)
    with no_autocast(student_hidden_states):
        source = HiddenSource(
            (student_hidden_states, lm_head_weight),
            (teacher_hidden_states, teacher_weight),
            token_weights,
            rows_per_chunk=min(most, len(student_hidden_states)),
            temperature=settings.temperature,
            with_hidden_gradient=False,
            with_weight_gradient=True,
            backend=settings.backend,
        )
        return _loss.run_weight_gradient(source, selected, settings)


@paint_loss_weight_gradient.register_fake
def _(student_hidden_states, teacher_hidden_states, lm_head_weight, teacher_lm_head_weight, *rest):
    tensors = [student_hidden_states, teacher_hidden_states, lm_head_weight]
    if teacher_lm_head_weight is not None:
        tensors.append(teacher_lm_head_weight)
    return torch.empty_like(lm_head_weight, dtype=compute_dtype(*tensors))


@torch.library.custom_op("paint_kernels::paint_loss_from_logits", mutates_args=())
@takes_settings
def paint_loss_from_logits(
    student_logits: Tensor,
    teacher_logits: Tensor,
    cu_seqlens: Tensor,
    token_weights: Tensor | None,
    with_gradient: bool,
    settings: LossSettings,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns loss, (6, N) token values, (N,) selected, grad_logits (or empty)."""
    check_cu_seqlens_values(cu_seqlens, student_logits.shape[0])
    if settings.teacher_top_k is not None:
        values, gradient = _topk.run_teacher_top_k_of_logits(
            student_logits, teacher_logits, cu_seqlens, settings, with_gradient=with_gradient
        )
        loss = reduced(values.table[0], token_weights)
        return loss, values.table, values.selected, gradient
    num_rows, vocab_size = student_logits.shape
    # Logits and gradient exist whole already. Chunks only bound the copies that are made of them.
    most = max(1, num_rows)
    row_major = student_logits.stride(1) == teacher_logits.stride(1) == 1
    if settings.backend == "torch" or not row_major:
        most = most_rows(vocab_size, vocab_size, student_logits.device)
    full = _loss.finds_statistics_first(settings)
    chunks = plan_chunks(cu_seqlens, num_rows, most, full=full)
    source = LogitsSource(
        student_logits,
        teacher_logits,
        rows_per_chunk=largest_chunk(chunks),
        with_gradient=with_gradient,
    )
    values = _loss.run_loss(source, chunks, cu_seqlens, settings)
    loss = reduced(values.table[0], token_weights)
    return loss, values.table, values.selected, source.grad_logits


@paint_loss_from_logits.register_fake
def _(student_logits, teacher_logits, cu_seqlens, token_weights, with_gradient, *settings):
    num_tokens = student_logits.shape[0]
    dtype = compute_dtype(student_logits, teacher_logits)
    new = student_logits.new_empty
    return (
        new((num_tokens,) if token_weights is None else (), dtype=dtype),
        new((6, num_tokens), dtype=dtype),
        new((num_tokens,), dtype=torch.bool),
        new(student_logits.shape if with_gradient else (0,)),
    )


def _from_logits_setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.num_inputs = len(inputs)
    ctx.save_for_backward(inputs[3], output[3])


def _from_logits_backward(ctx, grad_loss, *_):
    no_second_derivative()
    grads: list[Tensor | None] = [None] * ctx.num_inputs
    if grad_loss is not None and ctx.needs_input_grad[0]:
        token_weights, grad_logits = ctx.saved_tensors
        grads[0] = scaled_rows(
            grad_logits, upstream_of(grad_loss, token_weights), grad_logits.dtype
        )
    return tuple(grads)


paint_loss_from_logits.register_autograd(_from_logits_backward, setup_context=_from_logits_setup)
