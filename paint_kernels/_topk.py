"""Losses on a support: the k tokens of each row that the teacher names, and perhaps their tail.

Everything that the loss needs of a row are the K logits of its support, and so the loss of all N
rows is computed at once on (N, K) tensors, with the selection known. Of (R, V) logits there is at
most one product per model, and its chunks are forgotten one by one.

The tail of a support, all other tokens, is one entry whose logit is the log-sum-exp of theirs. Its
gradient by the hidden states is softmax(tail) @ weight, whatever the loss: the forward pass keeps
it, and the backward pass multiplies it by the loss's derivative.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from paint_kernels import _torch_backend
from paint_kernels._backends import row_functions, topk_functions
from paint_kernels._heads import Projection, scale_rows
from paint_kernels._loss import TokenValues
from paint_kernels._matmul import compute_dtype
from paint_kernels._settings import LossSettings, TokenSettings
from paint_kernels._shards import WHOLE, Shard
from paint_kernels._tokens import logit_gradients, logits_by_chunk, sum_head_gradients
from paint_kernels._weights import clear_rows, without_rows
from paint_kernels.selection import ranked_top_k, teacher_top_k_indices

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from paint_kernels._sources import LogitGradients

TAILS = ("bucket", "renormalise", "drop")
LEAST_TAIL = 1e-6
"""of the teacher's probability, where log-probabilities near float32 leave no certain rest"""
NOTHING = -1e29
"""A log-sum-exp below this is that of no finite logit."""


@dataclass
class SupportLoss:
    values: TokenValues
    gradient: Float[Tensor, "N K"]
    """of each token's loss by the student's h W^T on the support; empty if it was not wanted"""


def support_loss(
    student: Float[Tensor, "N K"],
    teacher: Float[Tensor, "N K"],
    cu_seqlens: Int[Tensor, " B+1"],
    settings: LossSettings,
    given: Bool[Tensor, " N"] | None,
    zero_weight: Bool[Tensor, " N"] | None,
    *,
    with_gradient: bool,
    gradient_scale: float = 1.0,
    drops_last: bool = False,
) -> SupportLoss:
    """Computes the loss of logits on a support, the same for both models in each row.

    Both are -inf where a row has fewer entries. K is small, so the row functions of PyTorch do for
    every backend. `given` is that of `run_loss`. The gradient has the rows of weight 0 too.
    """
    num_rows = len(student)
    table = torch.empty(6, num_rows, dtype=student.dtype, device=student.device)
    selected = torch.zeros(num_rows, dtype=torch.bool, device=student.device)
    values = TokenValues(table, selected, zero_weight)
    stats = _torch_backend.pair_stats(student, teacher, settings.temperature)
    table[2], table[3] = stats[0].entropy, stats[1].entropy
    if given is None:
        values.select(slice(None), cu_seqlens.to(student.device, non_blocking=True), settings)
    else:
        values.find_ratios(slice(None), settings)
        selected.copy_(given)
    gradient = student.new_empty(student.shape if with_gradient else (0,))
    found = _torch_backend.row_loss(
        student,
        teacher,
        selected if settings.interpolates else None,
        settings,
        gradient if with_gradient else None,
        gradient_scale=gradient_scale,
        drops_last=drops_last,
    )
    table[0], table[1], table[5] = found.token_loss, found.token_kl, found.clipped_mass
    return SupportLoss(values, gradient)


def of_tokens(settings: LossSettings) -> TokenSettings:
    """Returns the settings for logits of one model."""
    return TokenSettings(settings.temperature, settings.backend, settings.chunk_rows)


def top_k(
    logits: Float[Tensor, "R V"], k: int, shard: Shard
) -> tuple[Int[Tensor, "R k"], Float[Tensor, "R k"]]:
    """Returns the token ids of the k largest logits of all ranks, and these logits. Ties go to the
    lower id."""
    columns = teacher_top_k_indices(logits, min(k, logits.shape[1]))
    if shard.is_whole:
        return columns, logits.gather(1, columns)
    # Candidates in the order of their ids, because ties go to the first of them.
    columns = columns.sort(dim=-1).values
    own = torch.stack([(columns + shard.start).double(), logits.gather(1, columns).double()], dim=1)
    own = torch.nn.functional.pad(own, (0, k - own.shape[2]), value=-1.0)
    ids, values = shard.gather(own).unbind(2)
    ids, values = (one.permute(1, 0, 2).flatten(1) for one in (ids, values))
    chosen = ranked_top_k(values, ids >= 0, k)
    return ids.gather(1, chosen).long(), values.gather(1, chosen).to(logits.dtype)


def teacher_top_k(
    teacher: Projection, settings: LossSettings, shard: Shard
) -> tuple[Int[Tensor, "N k"], Float[Tensor, "N k"]]:
    """Returns the token ids of the teacher's k largest logits, and these logits."""
    assert settings.teacher_top_k is not None
    shape, device = (len(teacher.hidden_states), settings.teacher_top_k), teacher.head.weight.device
    ids = torch.empty(shape, dtype=torch.int64, device=device)
    largest = torch.empty(shape, dtype=teacher.dtype, device=device)
    for rows, logits in logits_by_chunk(teacher, of_tokens(settings), shard):
        ids[rows], largest[rows] = top_k(logits, settings.teacher_top_k, shard)
    return ids, largest


def gathered_support(
    student: Projection, ids: Int[Tensor, "N K"], settings: LossSettings, shard: Shard
) -> Float[Tensor, "N K"]:
    """Returns the student's logits of the ids, 0 where there is none, from these rows of the head
    alone."""
    rows = shard.local_ids(ids, len(student.head.weight))
    gathered = topk_functions(settings.backend).gathered_logits
    product = gathered(student.hidden_states, student.head.weight, rows).to(student.dtype)
    logits = student.from_product(product, slice(None), rows.clamp(min=0))
    return shard.sum(own_values(logits, rows))


def back_through_head(
    gradient: Float[Tensor, "N K"], student: Projection, logits: Float[Tensor, "N K"]
) -> None:
    """Turns the gradient by these logits into that by h W^T, in place. Overwrites the logits."""
    student.through_cap(logits, slice(None), gradient)
    scale_rows(gradient, student.factor)


def run_teacher_top_k(
    student: Projection,
    teacher: Projection,
    cu_seqlens: Int[Tensor, " B+1"],
    settings: LossSettings,
    shard: Shard,
    given: Bool[Tensor, " N"] | None = None,
    zero_weight: Bool[Tensor, " N"] | None = None,
    *,
    with_gradient: bool,
) -> tuple[Int[Tensor, "N k"], SupportLoss]:
    """Computes the loss on the teacher's k largest logits, and returns their ids with it."""
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    ids, teacher_logits = teacher_top_k(teacher, settings, shard)
    student_logits = gathered_support(student, ids, settings, shard).to(dtype)
    loss = support_loss(
        student_logits,
        teacher_logits.to(dtype),
        cu_seqlens,
        settings,
        given,
        zero_weight,
        with_gradient=with_gradient,
    )
    if with_gradient:
        back_through_head(loss.gradient, student, student_logits)
        clear_rows(loss.gradient, zero_weight)
    return ids, loss


def run_teacher_top_k_of_logits(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    temperatures: Float[Tensor, " N"] | None,
    cu_seqlens: Int[Tensor, " B+1"],
    settings: LossSettings,
    shard: Shard,
    given: Bool[Tensor, " N"] | None = None,
    zero_weight: Bool[Tensor, " N"] | None = None,
    *,
    with_gradient: bool,
) -> tuple[TokenValues, Tensor]:
    """Returns the values of the loss, and the gradient by the student's logits (or empty)."""
    assert settings.teacher_top_k is not None
    dtype = compute_dtype(student_logits, teacher_logits)
    ids, teacher = top_k(teacher_logits, settings.teacher_top_k, shard)
    columns = shard.local_ids(ids, student_logits.shape[1])
    index, foreign = columns.clamp(min=0), columns < 0
    student = shard.sum(student_logits.gather(1, index).to(dtype).masked_fill_(foreign, 0.0))
    teacher = teacher.to(dtype)
    if temperatures is not None:
        student, teacher = student / temperatures[:, None], teacher / temperatures[:, None]
    loss = support_loss(
        *(student, teacher, cu_seqlens, settings, given, zero_weight), with_gradient=with_gradient
    )
    if with_gradient and temperatures is not None:
        loss.gradient.div_(temperatures[:, None])
    if with_gradient:
        clear_rows(loss.gradient, zero_weight)
    size = student_logits.shape if with_gradient else (0,)
    gradient = torch.zeros(size, dtype=student_logits.dtype, device=student_logits.device)
    if with_gradient:
        gradient.scatter_add_(1, index, own_values(loss.gradient, columns).to(gradient.dtype))
    return loss.values, gradient


@dataclass
class Tail:
    """All tokens outside the support of each row."""

    logsumexp: Float[Tensor, " N"]
    """of the student's z / T; -inf where no token is outside"""
    hidden: Float[Tensor, "N H"]
    """its derivative by the hidden states, times T; empty if it was not wanted"""


def covering_ids(ids: Int[Tensor, "N K"]) -> Int[Tensor, "N K"]:
    """Returns the ids with another id of the row in place of padding; 0 in a row without any."""
    return torch.where(ids < 0, ids.amax(dim=1, keepdim=True).clamp(min=0), ids)


def split_support(
    projection: Projection,
    ids: Int[Tensor, "N K"],
    settings: LossSettings,
    shard: Shard,
    *,
    with_hidden: bool,
) -> tuple[Float[Tensor, "N K"], Tail]:
    """Returns the student's logits of the ids, -inf where there is none, and the tail. Its
    derivative is by the rank's own rows of the head."""
    student, in_chunks = projection.hidden_states, of_tokens(settings)
    gradients = logit_gradients(projection, untempered(in_chunks), shard)
    dtype = projection.dtype
    logits_of_ids = student.new_empty(ids.shape, dtype=dtype)
    logsumexp = student.new_empty(len(student), dtype=dtype)
    hidden = student.new_empty(student.shape if with_hidden else (0,), dtype=dtype)
    own = shard.local_ids(ids, len(projection.head.weight))
    if with_hidden:
        gradients.product.prepare_hidden()
    for rows, logits in logits_by_chunk(projection, in_chunks, shard):
        logits_of_ids[rows] = take_support(logits, own[rows])
        stats = row_functions(settings.backend, shard).row_stats(logits, settings.temperature)
        logsumexp[rows] = stats.logsumexp
        if with_hidden:
            shares = tail_shares(gradients, logits, own[rows], logsumexp[rows], rows, settings)
            gradients.product.hidden(shares, out=hidden[rows])
    if with_hidden:
        gradients.product.unscale_hidden(hidden)
        scale_rows(hidden, projection.factor)
    logsumexp.masked_fill_(logsumexp < NOTHING, -math.inf)
    logits_of_ids = shard.sum(logits_of_ids)
    return logits_of_ids.masked_fill_(ids < 0, -math.inf), Tail(logsumexp, hidden)


def take_support(logits: Float[Tensor, "R V"], ids: Int[Tensor, "R K"]) -> Float[Tensor, "R K"]:
    """Returns the logits of the ids, 0 where there is none, and overwrites them by -inf."""
    found = logits.gather(1, covering_ids(ids)).masked_fill_(ids < 0, 0.0)
    fill_support(logits, ids, -math.inf)
    return found


def fill_support(logits: Float[Tensor, "R V"], ids: Int[Tensor, "R K"], value: float) -> None:
    """Overwrites the logits of the ids."""
    covering = covering_ids(ids)
    # A row without an id, of which `covering` has the first column, keeps all.
    kept = logits.gather(1, covering)
    filled = torch.where((ids >= 0).any(dim=1, keepdim=True), value, kept)
    logits.scatter_(1, covering, filled)


def own_values(values: Float[Tensor, "N K"], ids: Int[Tensor, "N K"]) -> Float[Tensor, "N K"]:
    """Returns the values, 0 where there is no id."""
    return values.masked_fill(ids < 0, 0.0)


def untempered(settings: TokenSettings) -> TokenSettings:
    """Returns the settings of the products with `tail_shares`, which are at most 1."""
    return dataclasses.replace(settings, temperature=1.0)


def tail_shares(
    gradients: LogitGradients,
    logits: Float[Tensor, "R V"],
    ids: Int[Tensor, "R K"],
    logsumexp: Float[Tensor, " R"],
    rows: slice,
    settings: LossSettings,
) -> Float[Tensor, "R V"]:
    """Returns the derivative of the logits' log-sum-exp, in the dtype and scale of its
    products: softmax(logits / T), or 0 in rows that are -inf throughout, after `through_cap`.

    Overwrites the logits, which are those that `take_support` leaves of these rows.
    """
    shares = gradients.of(logits, rows)
    finite = torch.where(logsumexp < NOTHING, math.inf, logsumexp)
    topk_functions(settings.backend).softmax_rows(
        logits, finite, settings.temperature, shares, gradients.product.scale
    )
    if gradients.projection.head.softcap is not None:
        # A share of 0 times the slope of a logit of -inf would be NaN.
        fill_support(logits, ids, 0.0)
        gradients.projection.through_cap(logits, rows, shares)
    return shares


def teacher_support(
    ids: Int[Tensor, "N K"], logprobs: Float[Tensor, "N K"], *, with_tail: bool
) -> Float[Tensor, "N K'"]:
    """Returns the teacher's log-probabilities, float64, -inf where there is no id, and as a last
    column the logarithm of what is left of 1."""
    log_q = torch.where(ids >= 0, logprobs.double(), -math.inf)
    if not with_tail:
        return log_q
    mass = log_q.exp().sum(dim=-1, keepdim=True)
    tail = torch.log1p(-mass.clamp(max=1 - LEAST_TAIL))
    return torch.cat([log_q, tail], dim=1)


def run_loss_from_topk(
    student: Projection,
    ids: Int[Tensor, "N K"],
    teacher_logprobs: Float[Tensor, "N K"],
    cu_seqlens: Int[Tensor, " B+1"],
    tail: str,
    settings: LossSettings,
    shard: Shard = WHOLE,
    given: Bool[Tensor, " N"] | None = None,
    zero_weight: Bool[Tensor, " N"] | None = None,
    *,
    with_hidden_gradient: bool,
    with_gradient: bool,
) -> tuple[SupportLoss, Tail | None]:
    """Computes the loss of a served teacher's top-k.

    The gradient on the support is that by h W^T of the ids, and by the log-sum-exp of the tail over
    T, which `Tail.hidden` has T times.
    """
    with_tail = tail != "renormalise"
    target = teacher_support(ids, teacher_logprobs, with_tail=with_tail)
    rest = None
    if with_tail:
        chosen, rest = split_support(
            student, ids, settings, shard, with_hidden=with_hidden_gradient
        )
    else:
        chosen = gathered_support(student, ids, settings, shard).masked_fill_(ids < 0, -math.inf)
    logits = chosen / settings.temperature
    if rest is not None:
        logits = torch.cat([logits, rest.logsumexp[:, None]], dim=1)
        # Nothing is left to the teacher where its ids are the whole vocabulary, and a row without
        # ids is a row without a distribution.
        absent = (rest.logsumexp == -math.inf) | (ids < 0).all(dim=1)
        target[:, -1].masked_fill_(absent, -math.inf)
        logits[:, -1].masked_fill_(absent, -math.inf)
    loss = support_loss(
        *(logits, target.to(student.dtype), cu_seqlens),
        dataclasses.replace(settings, temperature=1.0),
        *(given, zero_weight),
        with_gradient=with_gradient,
        gradient_scale=1 / settings.temperature,
        drops_last=tail == "drop",
    )
    if with_gradient:
        of_ids = loss.gradient[:, : ids.shape[1]]
        back_through_head(of_ids, student, own_values(chosen, ids))
        clear_rows(loss.gradient, zero_weight)
    if rest is not None and with_hidden_gradient:
        clear_rows(rest.hidden, zero_weight)
    return loss, rest


def hidden_gradient(
    values: Float[Tensor, "N K'"],
    ids: Int[Tensor, "N K"],
    weight: Float[Tensor, "V H"],
    tail_hidden: Float[Tensor, "N H"] | None,
    backend: str,
    shard: Shard,
    dtype: torch.dtype,
) -> Float[Tensor, "N H"]:
    """Returns the gradient by the hidden states, in `dtype`, from that on the support."""
    num_ids, own = ids.shape[1], shard.local_ids(ids, len(weight))
    rest = None if tail_hidden is None else (tail_hidden, values[:, num_ids])
    # Shares of several ranks are rounded when they have been added up.
    shape, summed = (len(ids), weight.shape[1]), dtype if shard.is_whole else values.dtype
    out = torch.empty(shape, dtype=summed, device=weight.device)
    chosen = own_values(values[:, :num_ids], own)
    topk_functions(backend).hidden_gradient(chosen, weight, own, rest, out)
    return shard.sum(out).to(dtype)


def head_gradients(
    values: Float[Tensor, "N K'"],
    ids: Int[Tensor, "N K"],
    student: Projection,
    zero_weight: Bool[Tensor, " N"] | None,
    tail_logsumexp: Float[Tensor, " N"] | None,
    settings: LossSettings,
    shard: Shard,
    *,
    with_weight: bool,
    with_bias: bool,
) -> tuple[Tensor, Tensor]:
    """Computes the gradients by the head's weight and bias from that on the support, float32 or
    better, or empty tensors. For a tail, the logits are computed again."""
    num_ids, weight = ids.shape[1], student.head.weight
    own = shard.local_ids(ids, len(weight))
    hidden_states = without_rows(student.hidden_states, zero_weight)
    if tail_logsumexp is None:
        by_weight = values.new_zeros(weight.shape if with_weight else (0,))
        by_bias = values.new_zeros(len(weight) if with_bias else 0)
    else:
        if zero_weight is not None:
            tail_logsumexp = tail_logsumexp.masked_fill(zero_weight, math.inf)
        student = dataclasses.replace(student, hidden_states=hidden_states)
        by_weight, by_bias = tail_head_gradients(
            *(student, own, tail_logsumexp, values[:, num_ids], settings, shard),
            with_weight=with_weight,
            with_bias=with_bias,
        )
    chosen = own_values(values[:, :num_ids], own)
    if with_weight:
        add_head_gradient = topk_functions(settings.backend).add_head_gradient
        add_head_gradient(chosen, hidden_states, own, by_weight)
    if with_bias:
        by_bias.index_add_(0, own.clamp(min=0).flatten(), chosen.flatten())
    return by_weight, by_bias


def tail_head_gradients(
    student: Projection,
    ids: Int[Tensor, "N K"],
    logsumexp: Float[Tensor, " N"],
    values: Float[Tensor, " N"],
    settings: LossSettings,
    shard: Shard,
    *,
    with_weight: bool,
    with_bias: bool,
) -> tuple[Tensor, Tensor]:
    """Computes the gradients by the head's weight and bias, or empty tensors, from `values`, those
    by the log-sum-exp of the tail.

    ids: rows of the rank's head. logsumexp: of the tail, inf in rows that are to have no share.
    """
    in_chunks = of_tokens(settings)
    gradients = logit_gradients(
        student, untempered(in_chunks), shard, with_weight_gradient=with_weight
    )

    def gradient_of(rows: slice, logits: Float[Tensor, "R V"]) -> Float[Tensor, "R V"]:
        take_support(logits, ids[rows])
        return tail_shares(gradients, logits, ids[rows], logsumexp[rows], rows, settings)

    chunks = logits_by_chunk(student, in_chunks, shard)
    by_weight, by_bias = sum_head_gradients(
        gradients, chunks, gradient_of, values, with_bias=with_bias
    )
    return by_weight.to(values.dtype), by_bias
