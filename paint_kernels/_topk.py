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
from paint_kernels._tokens import LogprobsGradient, logits_by_chunk
from paint_kernels.selection import teacher_top_k_indices

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

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


def teacher_top_k(
    teacher: Projection, settings: LossSettings
) -> tuple[Int[Tensor, "N k"], Float[Tensor, "N k"]]:
    """Returns the columns of the teacher's k largest logits, and these logits."""
    assert settings.teacher_top_k is not None
    shape, device = (len(teacher.hidden_states), settings.teacher_top_k), teacher.head.weight.device
    ids = torch.empty(shape, dtype=torch.int64, device=device)
    largest = torch.empty(shape, dtype=teacher.dtype, device=device)
    for rows, logits in logits_by_chunk(teacher, of_tokens(settings)):
        ids[rows] = teacher_top_k_indices(logits, settings.teacher_top_k)
        torch.gather(logits, 1, ids[rows], out=largest[rows])
    return ids, largest


def run_teacher_top_k(
    student: Projection,
    teacher: Projection,
    cu_seqlens: Int[Tensor, " B+1"],
    settings: LossSettings,
    given: Bool[Tensor, " N"] | None = None,
    *,
    with_gradient: bool,
) -> tuple[Int[Tensor, "N k"], SupportLoss]:
    """Computes the loss on the teacher's k largest logits, and returns their columns with it."""
    dtype, every = torch.promote_types(student.dtype, teacher.dtype), slice(None)
    ids, teacher_logits = teacher_top_k(teacher, settings)
    gathered = topk_functions(settings.backend).gathered_logits
    product = gathered(student.hidden_states, student.head.weight, ids).to(dtype)
    student_logits = student.from_product(product, every, ids)
    loss = support_loss(
        student_logits,
        teacher_logits.to(dtype),
        cu_seqlens,
        settings,
        given,
        with_gradient=with_gradient,
    )
    if with_gradient:
        slope = student.slope_(student_logits, every)
        if slope is not None:
            loss.gradient.mul_(slope)
        scale_rows(loss.gradient, student.factor)
    return ids, loss


def run_teacher_top_k_of_logits(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    temperatures: Float[Tensor, " N"] | None,
    cu_seqlens: Int[Tensor, " B+1"],
    settings: LossSettings,
    given: Bool[Tensor, " N"] | None = None,
    *,
    with_gradient: bool,
) -> tuple[TokenValues, Tensor]:
    """Returns the values of the loss, and the gradient by the student's logits (or empty)."""
    assert settings.teacher_top_k is not None
    dtype = compute_dtype(student_logits, teacher_logits)
    ids = teacher_top_k_indices(teacher_logits, settings.teacher_top_k)
    student, teacher = (one.gather(1, ids).to(dtype) for one in (student_logits, teacher_logits))
    if temperatures is not None:
        student, teacher = student / temperatures[:, None], teacher / temperatures[:, None]
    loss = support_loss(student, teacher, cu_seqlens, settings, given, with_gradient=with_gradient)
    if with_gradient and temperatures is not None:
        loss.gradient.div_(temperatures[:, None])
    size = student_logits.shape if with_gradient else (0,)
    gradient = torch.zeros(size, dtype=student_logits.dtype, device=student_logits.device)
    if with_gradient:
        gradient.scatter_(1, ids, loss.gradient.to(gradient.dtype))
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
    *,
    with_hidden: bool,
) -> tuple[Float[Tensor, "N K"], Tail]:
    """Returns the student's logits of the ids, -inf where there is none, and the tail."""
    student, in_chunks = projection.hidden_states, of_tokens(settings)
    gradients = LogprobsGradient(projection, dataclasses.replace(in_chunks, temperature=1.0))
    logits_of_ids = student.new_empty(ids.shape, dtype=gradients.dtype)
    logsumexp = student.new_empty(len(student), dtype=gradients.dtype)
    hidden = student.new_empty(student.shape if with_hidden else (0,), dtype=gradients.dtype)
    covering = covering_ids(ids)
    if with_hidden:
        gradients.product.prepare_hidden()
    for rows, logits in logits_by_chunk(projection, in_chunks):
        torch.gather(logits, 1, covering[rows], out=logits_of_ids[rows])
        logits.scatter_(1, covering[rows], -math.inf)
        stats = row_functions(settings.backend).row_stats(logits, settings.temperature)
        logsumexp[rows] = stats.logsumexp
        if with_hidden:
            shares = tail_shares(gradients, logits, logsumexp[rows], settings)
            gradients.product.hidden(shares, out=hidden[rows])
    if with_hidden:
        gradients.product.unscale_hidden(hidden)
    logsumexp.masked_fill_(logsumexp < NOTHING, -math.inf)
    return logits_of_ids.masked_fill_(ids < 0, -math.inf), Tail(logsumexp, hidden)


def tail_shares(
    gradients: LogprobsGradient,
    logits: Float[Tensor, "R V"],
    logsumexp: Float[Tensor, " R"],
    settings: LossSettings,
) -> Float[Tensor, "R V"]:
    """Returns softmax(logits / T), in the dtype and scale of the products with it; 0 in rows that
    are -inf throughout. May overwrite the logits."""
    shares = gradients.of(logits)
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
        chosen, rest = split_support(student, ids, settings, with_hidden=with_hidden_gradient)
        logits = torch.cat([chosen / settings.temperature, rest.logsumexp[:, None]], dim=1)
        # Nothing is left to the teacher where its ids are the whole vocabulary, and a row without
        # ids is a row without a distribution.
        absent = (rest.logsumexp == -math.inf) | (ids < 0).all(dim=1)
        target[:, -1].masked_fill_(absent, -math.inf)
        logits[:, -1].masked_fill_(absent, -math.inf)
    else:
        gathered = topk_functions(settings.backend).gathered_logits
        logits = gathered(student.hidden_states, student.head.weight, ids) / settings.temperature
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
    out: Float[Tensor, "N H"],
) -> None:
    """Computes the gradient by the hidden states from that on the support."""
    num_ids = ids.shape[1]
    rest = None if tail_hidden is None else (tail_hidden, values[:, num_ids])
    topk_functions(backend).hidden_gradient(values[:, :num_ids], weight, ids, rest, out)


def weight_gradient(
    values: Float[Tensor, "N K'"],
    ids: Int[Tensor, "N K"],
    student: Projection,
    tail_logsumexp: Float[Tensor, " N"] | None,
    settings: LossSettings,
) -> Float[Tensor, "V H"]:
    """Computes the gradient by the head from that on the support, float32 or better. For a tail,
    the logits are computed again."""
    num_ids, weight = ids.shape[1], student.head.weight
    gradient = torch.zeros(weight.shape, dtype=values.dtype, device=weight.device)
    if tail_logsumexp is not None:
        in_chunks = of_tokens(settings)
        gradients = LogprobsGradient(student, dataclasses.replace(in_chunks, temperature=1.0))
        gradients.product.prepare_head(values[:, num_ids])
        covering = covering_ids(ids)
        for rows, logits in logits_by_chunk(student, in_chunks):
            logits.scatter_(1, covering[rows], -math.inf)
            shares = tail_shares(gradients, logits, tail_logsumexp[rows], settings)
            gradients.product.head(shares, rows, out=gradient)
        gradients.product.unscale_head(gradient)
    chosen = values[:, :num_ids]
    topk_functions(settings.backend).add_head_gradient(chosen, student.hidden_states, ids, gradient)
    return gradient
