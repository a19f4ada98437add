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
from paint_kernels._tokens import logit_gradients, logits_by_chunk
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
    given: Bool[Tensor, " N"] | None = None,
    *,
    with_gradient: bool,
    gradient_scale: float = 1.0,
    drops_last: bool = False,
) -> SupportLoss:
    """Computes the loss of logits on a support, the same for both models in each row.

    Both are -inf where a row has fewer entries. K is small, so the row functions of PyTorch do for
    every backend. `given` is that of `run_loss`.
    """
    num_rows = len(student)
    table = torch.empty(6, num_rows, dtype=student.dtype, device=student.device)
    selected = torch.zeros(num_rows, dtype=torch.bool, device=student.device)
    values = TokenValues(table, selected)
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


def run_teacher_top_k(
    student: Projection,
    teacher: Projection,
    cu_seqlens: Int[Tensor, " B+1"],
    settings: LossSettings,
    shard: Shard,
    given: Bool[Tensor, " N"] | None = None,
    *,
    with_gradient: bool,
) -> tuple[Int[Tensor, "N k"], SupportLoss]:
    """Computes the loss on the teacher's k largest logits, and returns their ids with it."""
    dtype, every = torch.promote_types(student.dtype, teacher.dtype), slice(None)
    ids, teacher_logits = teacher_top_k(teacher, settings, shard)
    gathered = topk_functions(settings.backend).gathered_logits
    rows = shard.local_ids(ids, len(student.head.weight))
    product = gathered(student.hidden_states, student.head.weight, rows).to(dtype)
    student_logits = student.from_product(product, every, rows.clamp(min=0))
    student_logits = shard.sum(student_logits.masked_fill_(rows < 0, 0.0))
    loss = support_loss(
        student_logits,
        teacher_logits.to(dtype),
        cu_seqlens,
        settings,
        given,
        with_gradient=with_gradient,
    )
    if with_gradient:
        student.through_cap(student_logits, every, loss.gradient)
        scale_rows(loss.gradient, student.factor)
    return ids, loss


def run_teacher_top_k_of_logits(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    temperatures: Float[Tensor, " N"] | None,
    cu_seqlens: Int[Tensor, " B+1"],
    settings: LossSettings,
    shard: Shard,
    given: Bool[Tensor, " N"] | None = None,
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
    loss = support_loss(student, teacher, cu_seqlens, settings, given, with_gradient=with_gradient)
    if with_gradient and temperatures is not None:
        loss.gradient.div_(temperatures[:, None])
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
            shares = tail_shares(gradients, logits, rows, logsumexp[rows], settings)
            gradients.product.hidden(shares, out=hidden[rows])
    if with_hidden:
        gradients.product.unscale_hidden(hidden)
    logsumexp.masked_fill_(logsumexp < NOTHING, -math.inf)
    logits_of_ids = shard.sum(logits_of_ids)
    return logits_of_ids.masked_fill_(ids < 0, -math.inf), Tail(logsumexp, hidden)


def take_support(logits: Float[Tensor, "R V"], ids: Int[Tensor, "R K"]) -> Float[Tensor, "R K"]:
    """Returns the logits of the ids, 0 where there is none, and overwrites them by -inf."""
    covering = covering_ids(ids)
    found = logits.gather(1, covering)
    # A row without an id, of which `covering` has the first column, keeps all.
    logits.scatter_(1, covering, torch.where((ids >= 0).any(dim=1, keepdim=True), -math.inf, found))
    return found.masked_fill_(ids < 0, 0.0)


def own_values(values: Float[Tensor, "N K"], ids: Int[Tensor, "N K"]) -> Float[Tensor, "N K"]:
    """Returns the values, 0 where there is no id."""
    return values.masked_fill(ids < 0, 0.0)


def untempered(settings: TokenSettings) -> TokenSettings:
    """Returns the settings of the products with `tail_shares`, which are at most 1."""
    return dataclasses.replace(settings, temperature=1.0)


def tail_shares(
    gradients: LogitGradients,
    logits: Float[Tensor, "R V"],
    rows: slice,
    logsumexp: Float[Tensor, " R"],
    settings: LossSettings,
) -> Float[Tensor, "R V"]:
    """Returns softmax(logits / T), in the dtype and scale of the products with it; 0 in rows that
    are -inf throughout. May overwrite the logits."""
    shares = gradients.of(logits, rows)
    finite = torch.where(logsumexp < NOTHING, math.inf, logsumexp)
    topk_functions(settings.backend).softmax_rows(
        logits, finite, settings.temperature, shares, gradients.product.scale
    )
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
    *,
    with_hidden_gradient: bool,
    with_gradient: bool,
) -> tuple[SupportLoss, Tail | None]:
    """Computes the loss of a served teacher's top-k.

    The gradient on the support is that by the raw logits of the ids, and by the log-sum-exp of the
    tail over T, which `Tail.hidden` has T times.
    """
    dtype = student.dtype
    with_tail = tail != "renormalise"
    target = teacher_support(ids, teacher_logprobs, with_tail=with_tail)
    rest = None
    if with_tail:
        chosen, rest = split_support(
            student, ids, settings, shard, with_hidden=with_hidden_gradient
        )
        logits = torch.cat([chosen / settings.temperature, rest.logsumexp[:, None]], dim=1)
        # Nothing is left to the teacher where its ids are the whole vocabulary, and a row without
        # ids is a row without a distribution.
        absent = (rest.logsumexp == -math.inf) | (ids < 0).all(dim=1)
        target[:, -1].masked_fill_(absent, -math.inf)
        logits[:, -1].masked_fill_(absent, -math.inf)
    else:
        gathered = topk_functions(settings.backend).gathered_logits
        rows = shard.local_ids(ids, len(student.head.weight))
        logits = gathered(student.hidden_states, student.head.weight, rows)
        if not shard.is_whole:
            logits = shard.sum(own_values(logits, rows)).masked_fill_(ids < 0, -math.inf)
        logits = logits / settings.temperature
    loss = support_loss(
        logits,
        target.to(dtype),
        cu_seqlens,
        dataclasses.replace(settings, temperature=1.0),
        with_gradient=with_gradient,
        gradient_scale=1 / settings.temperature,
        drops_last=tail == "drop",
    )
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


def bias_gradient(
    values: Float[Tensor, "N K"], ids: Int[Tensor, "N K"], bias: Float[Tensor, " V"], shard: Shard
) -> Float[Tensor, " V"]:
    """Returns the gradient by the head's bias, in its dtype, from that on the support."""
    own = shard.local_ids(ids, len(bias))
    total = values.new_zeros(bias.shape)
    total.index_add_(0, own.clamp(min=0).flatten(), own_values(values, own).flatten())
    return total.to(bias.dtype)


def weight_gradient(
    values: Float[Tensor, "N K'"],
    ids: Int[Tensor, "N K"],
    student: Projection,
    tail_logsumexp: Float[Tensor, " N"] | None,
    settings: LossSettings,
    shard: Shard,
) -> Float[Tensor, "V H"]:
    """Computes the gradient by the head from that on the support, float32 or better. For a tail,
    the logits are computed again."""
    num_ids, weight = ids.shape[1], student.head.weight
    own = shard.local_ids(ids, len(weight))
    if tail_logsumexp is None:
        gradient = torch.zeros(weight.shape, dtype=values.dtype, device=weight.device)
    else:
        in_chunks = of_tokens(settings)
        gradients = logit_gradients(
            student, untempered(in_chunks), shard, with_weight_gradient=True
        )
        gradients.product.prepare_head(values[:, num_ids])
        for rows, logits in logits_by_chunk(student, in_chunks, shard):
            take_support(logits, own[rows])
            shares = tail_shares(gradients, logits, rows, tail_logsumexp[rows], settings)
            gradients.add(shares, rows)
        gradients.finish()
        gradient = gradients.grad_weight
    chosen = own_values(values[:, :num_ids], own)
    topk_functions(settings.backend).add_head_gradient(chosen, student.hidden_states, own, gradient)
    return gradient
