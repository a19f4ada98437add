"""Row computations in PyTorch: what lies between the GEMMs, the fast path on a CPU.

Rows are worked off in blocks that stay in the cache, in place and without boolean masks: on a CPU a
comparison into a float buffer runs eight times faster than one into booleans, and masked_fill fifty
times slower than a product. The largest logit of a row is left out of every sum, so that entropies
and gradients of confident rows keep their digits (log1p instead of log, and gradients of a row that
add up to 0).
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from paint_kernels._types import RowValues, TokenStats

BLOCK_ELEMENTS = 2**18
"""float32 elements of a row block: 1 MiB a buffer, of which four are live"""
ARGMAX_TILE = 1024
NEGATIVE_INFINITY = -1e30
"""stands for -inf in differences, so that 0 * -inf does not arise; its exponential is 0"""
INFINITE_DIVERGENCE = 1e9
"""above any finite divergence and below any that a NEGATIVE_INFINITY went into"""


class Shifted(NamedTuple):
    """A softmax kept relative to its row's largest logit m: p = exp(x - m) / (1 + rest)."""

    largest: Int[Tensor, "R 1"]
    maximum: Float[Tensor, "R 1"]
    rest: Float[Tensor, "R 1"]
    """sum of exp(x - m) over all entries but the largest"""
    entropy: Float[Tensor, "R 1"]


def row_blocks(logits: Float[Tensor, "R V"]) -> Iterator[slice]:
    num_rows, num_columns = logits.shape
    block = max(1, num_rows)
    if logits.device.type == "cpu":
        block = max(1, BLOCK_ELEMENTS // num_columns)
    for start in range(0, num_rows, block):
        yield slice(start, min(start + block, num_rows))


def row_argmax(x: Float[Tensor, "R V"]) -> tuple[Float[Tensor, "R 1"], Int[Tensor, "R 1"]]:
    """Row maxima and a place of each, by tiles: several times faster than max(dim=-1) on a CPU."""
    num_columns = x.shape[1]
    whole = num_columns - num_columns % ARGMAX_TILE
    if whole == 0 or x.device.type != "cpu":
        return x.max(dim=-1, keepdim=True)
    tiles = x[:, :whole].unflatten(1, (-1, ARGMAX_TILE)).amax(dim=-1)
    if whole < num_columns:
        tiles = torch.cat([tiles, x[:, whole:].amax(dim=-1, keepdim=True)], dim=1)
    maximum, tile = tiles.max(dim=-1, keepdim=True)
    columns = tile * ARGMAX_TILE + torch.arange(ARGMAX_TILE, device=x.device)
    columns.clamp_(max=num_columns - 1)
    within = x.gather(1, columns).argmax(dim=-1, keepdim=True)
    return maximum, columns.gather(1, within)


def shifted_exponentials(x: Float[Tensor, "R V"], exponentials: Float[Tensor, "R V"]) -> Shifted:
    """Turns x into x - max(x), and fills `exponentials` with exp of it, 0 at the largest entry.

    H = log1p(s) - t / (1 + s), with s the sum of exp(d) and t that of d exp(d) over all entries but
    the largest, d = x - max(x).
    """
    maximum, largest = row_argmax(x)
    x.sub_(torch.where(maximum == -math.inf, 0.0, maximum))
    x.clamp_(min=NEGATIVE_INFINITY)
    torch.exp(x, out=exponentials)
    exponentials.scatter_(1, largest, 0.0)
    rest = exponentials.sum(dim=-1, keepdim=True)
    energy = torch.linalg.vecdot(exponentials, x)[:, None]
    return Shifted(largest, maximum, rest, torch.log1p(rest) - energy / (1 + rest))


def log_ratio(student_rest: Tensor, teacher_rest: Tensor) -> Tensor:
    """log of (1 + rest_S) / (1 + rest_T), whose error would be that of every log p~ - log p_S.

    A difference of two logarithms near 8 is good to 1e-6, as large as a small divergence; where the
    sums are close, one logarithm of their ratio is good to 1e-7 and better.
    """
    change = (student_rest - teacher_rest) / (1 + teacher_rest)
    apart = torch.log1p(student_rest) - torch.log1p(teacher_rest)
    return torch.where(change.abs() < 0.5, torch.log1p(change), apart)


def row_stats(logits: Float[Tensor, "R V"], temperature: float) -> TokenStats:
    logsumexp = logits.new_empty(logits.shape[0])
    entropy = torch.empty_like(logsumexp)
    for rows in row_blocks(logits):
        x = logits[rows] / temperature
        shifted = shifted_exponentials(x, torch.empty_like(x))
        logsumexp[rows] = (shifted.maximum + torch.log1p(shifted.rest))[:, 0]
        entropy[rows] = shifted.entropy[:, 0]
    return TokenStats(logsumexp, entropy)


def interpolate_(
    teacher: Float[Tensor, "R V"],
    student: Float[Tensor, "R V"],
    rows: Bool[Tensor, " R"],
    weight: float,
) -> None:
    """teacher <- (1-k) z_T + k z_S on the rows marked (Eq. 12)."""
    mixed = student if weight == 1 else (1 - weight) * teacher + weight * student
    teacher.copy_(torch.where(rows[:, None], mixed, teacher))


def row_loss(
    student_logits: Float[Tensor, "R V"],
    teacher_logits: Float[Tensor, "R V"],
    interpolated: Bool[Tensor, " R"] | None,
    *,
    interpolation_weight: float,
    temperature: float,
    pointwise_clip: float | None,
    with_gradient: bool,
) -> RowValues:
    """Clipped forward KL of each row. `student_logits` becomes its gradient where one is wanted.

    Both buffers are overwritten. The gradient is that of the row's own loss, by the raw logits:
    (p_S * sum of p~ over the unclipped entries - p~ on the unclipped entries) / temperature.
    """
    values = RowValues(*student_logits.new_empty(5, student_logits.shape[0]))
    for rows in row_blocks(student_logits):
        student, teacher = student_logits[rows], teacher_logits[rows]
        teacher_entropy = None
        if interpolated is not None:
            teacher_entropy = row_stats(teacher, temperature).entropy
            interpolate_(teacher, student, interpolated[rows], interpolation_weight)
        block = _block_loss(student, teacher, temperature, pointwise_clip, with_gradient)
        for value, block_value in zip(values, block, strict=True):
            value[rows] = block_value[:, 0]
        if teacher_entropy is not None:
            values.teacher_entropy[rows] = teacher_entropy
    return values


def _block_loss(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    pointwise_clip: float | None,
    with_gradient: bool,
) -> RowValues:
    if temperature != 1:
        student.mul_(1 / temperature)
        teacher.mul_(1 / temperature)
    student_exp, target = torch.empty_like(student), torch.empty_like(teacher)
    s = shifted_exponentials(student, student_exp)
    t = shifted_exponentials(teacher, target)
    # A row without one finite logit on either side has no loss: its target is set to 0 throughout.
    usable = (s.maximum != -math.inf) & (t.maximum != -math.inf)
    target.scatter_(1, t.largest, 1.0)
    target.mul_(torch.where(usable, 1 / (1 + t.rest), 0.0))

    f = torch.sub(teacher, student, out=teacher)
    f.add_(log_ratio(s.rest, t.rest)).mul_(target)
    token_kl = f.sum(dim=-1, keepdim=True)
    token_kl = torch.where(token_kl > INFINITE_DIVERGENCE, math.inf, token_kl)
    token_loss, clipped_mass = token_kl, torch.zeros_like(token_kl)
    unclipped_mass = target.sum(dim=-1, keepdim=True)
    if pointwise_clip is not None:
        unclipped = torch.le(f, pointwise_clip, out=student)
        token_loss = f.clamp_(max=pointwise_clip).sum(dim=-1, keepdim=True)
        target_mass = unclipped_mass
        unclipped_mass = target.mul_(unclipped).sum(dim=-1, keepdim=True)
        clipped_mass = target_mass - unclipped_mass
    if with_gradient:
        student_exp.mul_(unclipped_mass / ((1 + s.rest) * temperature))
        # The row's gradient adds up to 0: its largest entry, 0 here, takes what the others leave.
        target.scatter_(1, s.largest, 0.0)
        gradient = torch.sub(student_exp, target, alpha=1 / temperature, out=student)
        gradient.scatter_(1, s.largest, -gradient.sum(dim=-1, keepdim=True))
    return RowValues(token_loss, token_kl, s.entropy, t.entropy, clipped_mass)


def row_logprobs(
    logits: Float[Tensor, "R V"],
    token_ids: Int[Tensor, " R"],
    *,
    temperature: float,
    with_gradient: bool,
) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"]]:
    """Log-probability of each row's token, and the row's entropy.

    `logits` is overwritten, with the gradient (one_hot - p) / temperature where one is wanted.
    """
    logprobs = logits.new_empty(logits.shape[0])
    entropy = torch.empty_like(logprobs)
    for rows in row_blocks(logits):
        x, ids = logits[rows], token_ids[rows].long()[:, None]
        if temperature != 1:
            x.mul_(1 / temperature)
        exponentials = torch.empty_like(x)
        shifted = shifted_exponentials(x, exponentials)
        logprobs[rows] = (x.gather(1, ids) - torch.log1p(shifted.rest))[:, 0]
        entropy[rows] = shifted.entropy[:, 0]
        if with_gradient:
            exponentials.scatter_(1, shifted.largest, 1.0).scatter_(1, ids, 0.0)
            torch.mul(exponentials, -1 / ((1 + shifted.rest) * temperature), out=x)
            x.scatter_(1, ids, -x.sum(dim=-1, keepdim=True))
    return logprobs, entropy
