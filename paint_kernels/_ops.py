"""The loss as opaque operators: torch.compile sees one node and does not trace the chunk loop.

The forward pass computes the gradient by the hidden states (or logits), one unweighted row per
token. The backward pass scales it out of place, so that any upstream gradient and any number of
backward passes work. The head's gradient sums over tokens, so it needs their weights. The forward
pass has them for a reduced loss. For per-token losses the backward pass recomputes the logits.
"""

from typing import Any

import torch
from torch import Tensor

from paint_kernels import _loss, _topk
from paint_kernels._checks import check_cu_seqlens_values, check_temperatures_values
from paint_kernels._heads import Heads, Projection, logits_dtype
from paint_kernels._matmul import compute_dtype
from paint_kernels._plan import largest_chunk, most_rows, plan_chunks
from paint_kernels._settings import LossSettings, fields_of, input_names, takes_fields
from paint_kernels._shards import Shard
from paint_kernels._sources import HiddenSource, LogitsSource
from paint_kernels._weights import weighted


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
    if token_weights is None:
        # A copy, because the outputs of an operator must not share memory.
        return token_loss.clone()
    return weighted(token_loss, token_weights).sum()


def loss_outputs(
    values: _loss.TokenValues, token_weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the loss, the (6, N) token values and the (N,) selection, the first outputs of every
    operator of a loss."""
    return reduced(values.table[0], token_weights), values.table, values.selected


def fake_loss_outputs(
    rows: Tensor, token_weights: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the same without values, for an operator's fake. rows: one for each token."""
    num_tokens, new = rows.shape[0], rows.new_empty
    return (
        new((num_tokens,) if token_weights is None else (), dtype=dtype),
        new((6, num_tokens), dtype=dtype),
        new((num_tokens,), dtype=torch.bool),
    )


def upstream_of(grad_loss: Tensor, token_weights: Tensor | None) -> Tensor:
    """Returns the (N,) gradient of the final scalar by each token's loss."""
    return grad_loss if token_weights is None else grad_loss * token_weights


def rounded_product(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns gradient * factor (0-d) in another dtype, without a copy in its own."""
    return torch.mul(gradient, factor, out=gradient.new_empty(gradient.shape, dtype=dtype))


def scaled_rows(rows: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    # `out` casts on the fly. A product followed by a cast would hold a float32 copy.
    scaled = rows.new_empty(rows.shape, dtype=dtype)
    return torch.mul(rows, upstream[:, None], out=scaled)


def _hidden_source(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    heads: Heads,
    token_weights: Tensor | None,
    zero_weight: Tensor | None,
    temperatures: Tensor | None,
    settings: LossSettings,
    shard: Shard,
    **wanted: Any,
) -> HiddenSource:
    return HiddenSource(
        Projection(student_hidden_states, heads.student, temperatures, settings.backend),
        Projection(teacher_hidden_states, heads.teacher, temperatures, settings.backend),
        token_weights,
        temperature=settings.temperature,
        backend=settings.backend,
        shard=shard,
        zero_weight=zero_weight,
        **wanted,
    )


def _rows_of_a_chunk(head: Tensor, settings: LossSettings, shard: Shard) -> int:
    num_rows, hidden_size = head.shape
    width = shard.planned_width(num_rows)
    return settings.chunk_rows or most_rows(width, hidden_size, head.device)


@takes_fields
def _paint_loss(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    heads: Heads,
    cu_seqlens: Tensor,
    token_weights: Tensor | None,
    zero_weight: Tensor | None,
    temperatures: Tensor | None,
    given_selection: Tensor | None,
    with_hidden_gradient: bool,
    with_weight_gradient: bool,
    with_bias_gradient: bool,
    settings: LossSettings,
    shard: Shard,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns loss, (6, N) token values, (N,) selected, and the gradients by the student's hidden
    states, weight and bias, or empty tensors.

    Rows of grad_hidden are unweighted, in float32 or better. They are rounded to the dtype of the
    hidden states once, after the upstream gradient has scaled them. The teacher's top-k has an
    operator of its own.
    """
    assert settings.teacher_top_k is None
    check_cu_seqlens_values(cu_seqlens, student_hidden_states.shape[0])
    check_temperatures_values(temperatures)
    most = _rows_of_a_chunk(heads.lm_head_weight, settings, shard)
    full = _loss.finds_statistics_first(settings)
    chunks = plan_chunks(cu_seqlens, len(student_hidden_states), most, full=full)
    with no_autocast(student_hidden_states):
        source = _hidden_source(
            *(student_hidden_states, teacher_hidden_states, heads),
            *(token_weights, zero_weight, temperatures, settings, shard),
            rows_per_chunk=largest_chunk(chunks),
            with_hidden_gradient=with_hidden_gradient,
            with_weight_gradient=with_weight_gradient and token_weights is not None,
            with_bias_gradient=with_bias_gradient and token_weights is not None,
        )
        values = _loss.run_loss(source, chunks, cu_seqlens, settings, given_selection)
    by_head = source.grad_weight, source.grad_bias
    return *loss_outputs(values, token_weights), source.grad_hidden, *by_head


PAINT_LOSS_INPUTS = input_names(_paint_loss)
paint_loss = torch.library.custom_op("paint_kernels::paint_loss", _paint_loss, mutates_args=())


@paint_loss.register_fake
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
    with_hidden_gradient,
    with_weight_gradient,
    with_bias_gradient,
    *settings,
):
    dtype = logits_dtype(student_hidden_states, teacher_hidden_states, heads)
    size = student_hidden_states.shape if with_hidden_gradient else (0,)
    in_forward = token_weights is not None
    return (
        *fake_loss_outputs(student_hidden_states, token_weights, dtype),
        student_hidden_states.new_empty(size, dtype=dtype),
        *empty_head_gradients(
            heads.lm_head_weight,
            dtype,
            with_weight_gradient and in_forward,
            with_bias_gradient and in_forward,
        ),
    )


def empty_head_gradients(
    weight: Tensor, dtype: torch.dtype, with_weight: bool, with_bias: bool
) -> tuple[Tensor, Tensor]:
    """Returns the gradients by a head's weight and bias, without values, as an operator's fake."""
    return (
        weight.new_empty(weight.shape if with_weight else (0,), dtype=dtype),
        weight.new_empty((weight.shape[0] if with_bias else 0,), dtype=dtype),
    )


def _paint_loss_setup(ctx, inputs, output):
    given = dict(zip(PAINT_LOSS_INPUTS, inputs, strict=True))
    heads = Heads(*fields_of(Heads, given))
    _, _, selected, grad_hidden, grad_weight, grad_bias = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.settings = *fields_of(LossSettings, given), *fields_of(Shard, given)
    ctx.dtypes = given["student_hidden_states"].dtype, heads.lm_head_weight.dtype
    ctx.bias_dtype = None if heads.lm_head_bias is None else heads.lm_head_bias.dtype
    redone = ()
    by_head = given["with_weight_gradient"] or given["with_bias_gradient"]
    if by_head and given["token_weights"] is None:
        tensors, ctx.head_numbers = heads.arguments()[:4], heads.arguments()[4:]
        hidden_states = given["student_hidden_states"], given["teacher_hidden_states"]
        redone = (*hidden_states, *tensors, selected, given["zero_weight"], given["temperatures"])
    ctx.save_for_backward(given["token_weights"], grad_hidden, grad_weight, grad_bias, *redone)


def _paint_loss_backward(ctx, grad_loss, *_):
    no_second_derivative()
    if grad_loss is None:
        return (None,) * len(PAINT_LOSS_INPUTS)
    token_weights, grad_hidden, grad_weight, grad_bias, *redone = ctx.saved_tensors
    needed = dict(zip(PAINT_LOSS_INPUTS, ctx.needs_input_grad, strict=True))
    by_weight, by_bias = needed["lm_head_weight"], needed["lm_head_bias"]
    upstream, factor = upstream_of(grad_loss, token_weights), grad_loss
    grads: dict[str, Tensor] = {}
    if needed["student_hidden_states"]:
        grads["student_hidden_states"] = scaled_rows(grad_hidden, upstream, ctx.dtypes[0])
    if redone and (by_weight or by_bias):
        *inputs, selected, zero_weight, temperatures = redone
        grad_weight, grad_bias = paint_loss_head_gradient(
            *(*inputs, *ctx.head_numbers),
            *(selected, upstream, zero_weight, temperatures),
            *(by_weight, by_bias, *ctx.settings),
        )
        factor = grad_loss.new_ones(())
    if by_weight:
        grads["lm_head_weight"] = rounded_product(grad_weight, factor, ctx.dtypes[1])
    if by_bias:
        grads["lm_head_bias"] = rounded_product(grad_bias, factor, ctx.bias_dtype)
    return tuple(grads.get(name) for name in PAINT_LOSS_INPUTS)


paint_loss.register_autograd(_paint_loss_backward, setup_context=_paint_loss_setup)


@torch.library.custom_op("paint_kernels::paint_loss_head_gradient", mutates_args=())
@takes_fields
def paint_loss_head_gradient(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    heads: Heads,
    selected: Tensor,
    token_weights: Tensor,
    zero_weight: Tensor | None,
    temperatures: Tensor | None,
    with_weight_gradient: bool,
    with_bias_gradient: bool,
    settings: LossSettings,
    shard: Shard,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of sum(token_weights * token_loss) by the student's weight and bias, or
    empty tensors, float32 or better."""
    most = _rows_of_a_chunk(heads.lm_head_weight, settings, shard)
    with no_autocast(student_hidden_states):
        source = _hidden_source(
            *(student_hidden_states, teacher_hidden_states, heads),
            *(token_weights, zero_weight, temperatures, settings, shard),
            rows_per_chunk=min(most, len(student_hidden_states)),
            with_hidden_gradient=False,
            with_weight_gradient=with_weight_gradient,
            with_bias_gradient=with_bias_gradient,
        )
        _loss.run_head_gradient(source, selected, settings)
    return source.grad_weight, source.grad_bias


@paint_loss_head_gradient.register_fake
@takes_fields
def _(
    student_hidden_states,
    teacher_hidden_states,
    heads: Heads,
    selected,
    token_weights,
    zero_weight,
    temperatures,
    with_weight_gradient,
    with_bias_gradient,
    *settings,
):
    dtype = logits_dtype(student_hidden_states, teacher_hidden_states, heads)
    wanted = with_weight_gradient, with_bias_gradient
    return empty_head_gradients(heads.lm_head_weight, dtype, *wanted)


@takes_fields
def _paint_loss_from_logits(
    student_logits: Tensor,
    teacher_logits: Tensor,
    cu_seqlens: Tensor,
    token_weights: Tensor | None,
    zero_weight: Tensor | None,
    temperatures: Tensor | None,
    given_selection: Tensor | None,
    with_gradient: bool,
    settings: LossSettings,
    shard: Shard,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns loss, (6, N) token values, (N,) selected, grad_logits (or empty)."""
    check_cu_seqlens_values(cu_seqlens, student_logits.shape[0])
    check_temperatures_values(temperatures)
    if settings.teacher_top_k is not None:
        values, gradient = _topk.run_teacher_top_k_of_logits(
            *(student_logits, teacher_logits, temperatures, cu_seqlens, settings, shard),
            *(given_selection, zero_weight),
            with_gradient=with_gradient,
        )
        return *loss_outputs(values, token_weights), gradient
    num_rows, num_columns = student_logits.shape
    # Logits and gradient exist whole already. Chunks only bound the copies that are made of them.
    row_major = student_logits.stride(1) == teacher_logits.stride(1) == 1
    # Ranks may have other layouts, but must have the same chunks.
    copies = temperatures is not None or not row_major or not shard.is_whole
    most = settings.chunk_rows or max(1, num_rows)
    if settings.chunk_rows is None and (settings.backend == "torch" or copies):
        width = shard.planned_width(num_columns)
        most = most_rows(width, width, student_logits.device)
    full = _loss.finds_statistics_first(settings)
    chunks = plan_chunks(cu_seqlens, num_rows, most, full=full)
    source = LogitsSource(
        student_logits,
        teacher_logits,
        temperatures,
        rows_per_chunk=largest_chunk(chunks),
        with_gradient=with_gradient,
        shard=shard,
        zero_weight=zero_weight,
    )
    values = _loss.run_loss(source, chunks, cu_seqlens, settings, given_selection)
    return *loss_outputs(values, token_weights), source.grad_logits


FROM_LOGITS_INPUTS = input_names(_paint_loss_from_logits)
paint_loss_from_logits = torch.library.custom_op(
    "paint_kernels::paint_loss_from_logits", _paint_loss_from_logits, mutates_args=()
)


@paint_loss_from_logits.register_fake
def _(
    student_logits,
    teacher_logits,
    cu_seqlens,
    token_weights,
    zero_weight,
    temperatures,
    given_selection,
    with_gradient,
    *settings,
):
    dtype = compute_dtype(student_logits, teacher_logits)
    return (
        *fake_loss_outputs(student_logits, token_weights, dtype),
        student_logits.new_empty(student_logits.shape if with_gradient else (0,)),
    )


def _from_logits_setup(ctx, inputs, output):
    given = dict(zip(FROM_LOGITS_INPUTS, inputs, strict=True))
    _, _, _, grad_logits = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(given["token_weights"], grad_logits)


def _from_logits_backward(ctx, grad_loss, *_):
    no_second_derivative()
    grads: dict[str, Tensor] = {}
    needed = dict(zip(FROM_LOGITS_INPUTS, ctx.needs_input_grad, strict=True))
    if grad_loss is not None and needed["student_logits"]:
        token_weights, grad_logits = ctx.saved_tensors
        upstream = upstream_of(grad_loss, token_weights)
        grads["student_logits"] = scaled_rows(grad_logits, upstream, grad_logits.dtype)
    return tuple(grads.get(name) for name in FROM_LOGITS_INPUTS)


paint_loss_from_logits.register_autograd(_from_logits_backward, setup_context=_from_logits_setup)
