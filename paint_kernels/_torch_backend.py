"""The row functions in PyTorch: what lies between the matrix products, and the fast path on a CPU.

Rows are processed in blocks whose buffers stay in the cache, in place and without boolean masks. On
a CPU a comparison into a float buffer runs eight times faster than one into booleans, and
masked_fill fifty times slower than a product. Every sum leaves the largest logit of a row out, so
that entropies and gradients of confident rows keep their digits: log1p replaces log, and the
gradients of a row add up to 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from paint_kernels._matmul import compute_dtype
from paint_kernels._plan import BLOCK_BUFFERS, BLOCK_ELEMENTS
from paint_kernels._precision import full_precision
from paint_kernels._settings import LossSettings
from paint_kernels._spinning import follow_load
from paint_kernels._torch_divergences import (
    DIVERGENCES,
    Block,
    Tiles,
    row_sum,
    whole_tiles,
)
from paint_kernels._types import RowValues, TokenStats

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

# MKL's vector functions choose their code at the first call of a process. Where two threads of one
# operation make it at once, one of them may compute with other code: the last digits of the first
# loss then differed from those of later ones, in 8 of 49 processes beside others, and in none of 70
# after such calls.
for _dtype in (torch.float32, torch.float64):
    for _function in (torch.exp, torch.log1p, torch.expm1, torch.tanh):
        _function(torch.ones(1, dtype=_dtype))

LOG_2 = math.log(2)
NEGATIVE_INFINITY = -1e38
"""replaces -inf in differences, so that 0 * -inf does not occur; its exponential is 0"""
SMALL_DIVERGENCE = 0.05
"""in nats, below which a row's divergence is summed without its first-order terms"""
HEAVY = 200.0
"""in 1/nats. Rounding changes a probability p by about 1e-7 p, and many below p change a divergence
D by about 1e-7 sqrt(p), at random: by 2e-5 D where p is (200 D)^2."""
INFINITE_DIVERGENCE = 1e9
"""above any finite divergence, and below any with NEGATIVE_INFINITY at a probability of 1e-29 or
more"""


class TileValues(NamedTuple):
    """Of the whole tiles of a softmax."""

    maxima: Float[Tensor, "R tiles"]
    """of x"""
    sums: Float[Tensor, "R tiles"]
    """of the exponentials, float64"""


class Shifted(NamedTuple):
    """A softmax relative to its row's largest logit m: x = z - m, p = exp(x / T) / (1 + rest)."""

    x: Float[Tensor, "R V"]
    exponentials: Float[Tensor, "R V"]
    """exp(x / T), and 0 at the largest entry if its column is given"""
    largest: Int[Tensor, "R 1"] | None
    maximum: Float[Tensor, "R 1"]
    """of z"""
    rest: Float[Tensor, "R 1"]
    """float64: sum of exp(x / T) over all entries but the largest"""
    entropy: Float[Tensor, "R 1"]
    tiles: TileValues | None = None
    """None if they are not known"""


def row_blocks(logits: Float[Tensor, "R V"]) -> Iterator[slice]:
    num_rows, num_columns = logits.shape
    block = max(1, num_rows)
    if logits.device.type == "cpu":
        block = max(1, BLOCK_ELEMENTS // num_columns)
    for start in range(0, num_rows, block):
        if logits.device.type == "cpu":
            follow_load()
        yield slice(start, min(start + block, num_rows))


def row_argmax(
    x: Float[Tensor, "R V"],
) -> tuple[Float[Tensor, "R 1"], Int[Tensor, "R 1"], Float[Tensor, "R tiles"] | None]:
    """Returns row maxima, their columns, and the maxima of whole tiles where they are used: on a
    CPU that is much faster than max(dim=-1)."""
    tiles, last = whole_tiles(x)
    if tiles.shape[1] == 0 or x.device.type != "cpu":
        maximum, columns = x.max(dim=-1, keepdim=True)
        return maximum, columns, None
    whole_maxima = maxima = tiles.amax(dim=-1)
    if last.shape[1] > 0:
        maxima = torch.cat([maxima, last.amax(dim=-1, keepdim=True)], dim=1)
    maximum, tile = maxima.max(dim=-1, keepdim=True)
    size = tiles.shape[2]
    columns = tile * size + torch.arange(size, device=x.device)
    columns.clamp_(max=x.shape[1] - 1)
    within = x.gather(1, columns).argmax(dim=-1, keepdim=True)
    return maximum, columns.gather(1, within), whole_maxima


def tile_sums(
    x: Float[Tensor, "R V"], spare: Float[Tensor, "R V"]
) -> tuple[Float[Tensor, "R 1"], Float[Tensor, "R tiles"]]:
    """Returns row sums and the sums of whole tiles. All are float64, because the rounding of a
    tile's sum to float32 is larger than that of its exponentials.

    The error of a normaliser enters log p~ - log p_S of every entry of its row, and so shifts the
    row's divergence by the same amount: 1e-7 is a thousandth of a small divergence.
    """
    tiles, last = whole_tiles(x)
    sums = torch.cat([wide_tile_sums(part, spare) for part in tiles.split(wide_rows(x, spare))])
    total = last.sum(dim=-1, keepdim=True, dtype=torch.float64)
    return total + sums.sum(dim=-1, keepdim=True), sums


def wide_rows(x: Float[Tensor, "R V"], spare: Float[Tensor, "R V"]) -> int:
    """Returns the number of rows that fit into `spare` in float64, at least 1."""
    return max(1, spare.nbytes // (8 * max(1, x.shape[1])))


def wide_tile_sums(
    tiles: Float[Tensor, "R tiles TILE"], spare: Float[Tensor, "R V"]
) -> Float[Tensor, "R tiles"]:
    """Returns float64 sums. The copy that a float64 sum of float32 takes goes into `spare`, if that
    is large enough: to map and to clear the pages of a new one takes longer than the sum."""
    is_small = 8 * tiles.numel() <= spare.nbytes and tiles.is_cpu
    if tiles.dtype == torch.float32 and is_small and spare.storage_offset() % 2 == 0:
        even = spare.numel() // 2 * 2
        wide = spare.view(-1)[:even].view(torch.float64)[: tiles.numel()].view(tiles.shape)
        tiles = wide.copy_(tiles)
    return tiles.sum(dim=-1, dtype=torch.float64)


def shift(
    logits: Float[Tensor, "R V"],
    temperature: float,
    x: Float[Tensor, "R V"],
    exponentials: Float[Tensor, "R V"],
    spare: Float[Tensor, "R V"],
) -> Shifted:
    """Computes the softmax of the rows in `x` and `exponentials`.

    The entropy is H = log1p(s) - t / (1 + s), where s is the sum of exp(x / T) and t the sum of
    x / T exp(x / T), both over all entries but the largest.
    """
    maximum, largest, maxima = row_argmax(logits)
    maximum = maximum.to(x.dtype)
    exponentiate(logits, maximum, temperature, x, exponentials, bounds=x.device.type != "cpu")
    exponentials.scatter_(1, largest, 0.0)
    rest, sums = tile_sums(exponentials, spare)
    energy = row_sum(torch.mul(exponentials, x, out=spare))
    # On a CPU a look at the result is cheaper than to bound every entry: -inf gives 0 * -inf.
    if x.device.type == "cpu" and energy.isnan().any():
        energy = row_sum(torch.mul(exponentials, x.clamp_(min=lowest(temperature)), out=spare))
    entropy = (torch.log1p(rest) - energy / ((1 + rest) * temperature)).to(x.dtype)
    tiles = None if maxima is None else TileValues(maxima - maximum, sums)
    return Shifted(x, exponentials, largest, maximum, rest, entropy, tiles)


def lowest(temperature: float) -> float:
    """Returns what stands for an x of -inf."""
    return NEGATIVE_INFINITY * min(temperature, 1.0)


def exponentiate(
    logits: Float[Tensor, "R V"],
    maximum: Float[Tensor, "R 1"],
    temperature: float,
    x: Float[Tensor, "R V"],
    exponentials: Float[Tensor, "R V"],
    *,
    bounds: bool,
) -> None:
    """Computes x = z - m and exp(x / T) in the two buffers. bounds: replaces an x of -inf.

    x is not divided by T, because a rounding of it is as large as a small difference of two models.
    On a CPU exp2 runs four times faster than exp.
    """
    finite_maximum = torch.where(maximum == -math.inf, 0.0, maximum)
    if logits.dtype == x.dtype:
        torch.sub(logits, finite_maximum, out=x)
    else:
        x.copy_(logits).sub_(finite_maximum)
    if bounds:
        x.clamp_(min=lowest(temperature))
    torch.mul(x, 1 / (LOG_2 * temperature), out=exponentials).exp2_()


def buffers(number: int, logits: Float[Tensor, "R V"]) -> Float[Tensor, "number R V"]:
    """Returns scratch for the largest block, in the dtype of the computation."""
    rows = next(row_blocks(logits), slice(0, 0))
    dtype = compute_dtype(logits)
    return logits.new_empty(number, rows.stop - rows.start, logits.shape[1], dtype=dtype)


def log_ratio(student_rest: Tensor, teacher_rest: Tensor) -> Tensor:
    """Returns the logarithm of (1 + rest_S) / (1 + rest_T), in float64."""
    return torch.log1p((student_rest - teacher_rest) / (1 + teacher_rest))


@full_precision()
def row_stats(logits: Float[Tensor, "R V"], temperature: float) -> TokenStats:
    scratch = buffers(3, logits)
    logsumexp = logits.new_empty(logits.shape[0], dtype=scratch.dtype)
    entropy = torch.empty_like(logsumexp)
    for rows in row_blocks(logits):
        shifted = shift(logits[rows], temperature, *scratch[:, : rows.stop - rows.start])
        logsumexp[rows] = (shifted.maximum / temperature + torch.log1p(shifted.rest))[:, 0]
        entropy[rows] = shifted.entropy[:, 0]
    return TokenStats(logsumexp, entropy)


def pair_stats(
    student_logits: Float[Tensor, "R V"], teacher_logits: Float[Tensor, "R V"], temperature: float
) -> tuple[TokenStats, TokenStats]:
    return row_stats(student_logits, temperature), row_stats(teacher_logits, temperature)


def interpolate(
    teacher: Float[Tensor, "R V"],
    student: Float[Tensor, "R V"],
    rows: Bool[Tensor, " R"],
    weight: float,
) -> Float[Tensor, "R V"]:
    """Returns (1-k) z_T + k z_S in the marked rows (Eq. 12), z_T elsewhere."""
    teacher, student = teacher.to(compute_dtype(teacher)), student.to(compute_dtype(student))
    if teacher.is_cpu:
        # Of a block of rows few are marked, if any. The number of them may be read.
        marked = rows.nonzero()[:, 0]
        if len(marked) == 0:
            return teacher
        return teacher.index_copy(0, marked, _mixed(teacher[marked], student[marked], weight))
    return torch.where(rows[:, None], _mixed(teacher, student, weight), teacher)


def _mixed(teacher: Tensor, student: Tensor, weight: float) -> Tensor:
    return student if weight == 1 else (1 - weight) * teacher + weight * student


@full_precision()
def row_loss(
    student_logits: Float[Tensor, "R V"],
    teacher_logits: Float[Tensor, "R V"],
    interpolated: Bool[Tensor, " R"] | None,
    settings: LossSettings,
    gradient: Float[Tensor, "R V"] | None,
    *,
    gradient_scale: float = 1.0,
    stats: tuple[TokenStats, TokenStats] | None = None,
    drops_last: bool = False,
) -> RowValues:
    """Returns the clipped divergence of each row. Fills `gradient` with that of its loss by the raw
    logits.

    `gradient`, which is multiplied by `gradient_scale`, may be `student_logits` itself: a block of
    rows is read before it is written. `stats` is unused: the sums come with the exponentials. With
    `drops_last`, the last column belongs to both distributions, but adds no summand.
    """
    scratch = buffers(BLOCK_BUFFERS, student_logits)
    values = scratch.new_empty(len(student_logits), 5)
    for rows in row_blocks(student_logits):
        student, teacher = student_logits[rows], teacher_logits[rows]
        if interpolated is not None:
            weight = settings.interpolation_weight
            teacher = interpolate(teacher, student, interpolated[rows], weight)
        x_s, exp_s, x_t, exp_t, spare = scratch[:, : rows.stop - rows.start]
        s = shift(student, settings.temperature, x_s, exp_s, spare)
        t = shift(teacher, settings.temperature, x_t, exp_t, spare)
        *terms, by_logits = _block_loss(
            s, t, spare, settings, gradient is not None, drops_last=drops_last
        )
        if gradient is not None:
            scale = gradient_scale / settings.temperature
            torch.mul(by_logits, scale, out=gradient[rows])
        values[rows] = torch.cat([*terms, s.entropy, t.entropy], dim=1)
    return RowValues(*values.unbind(1))


def _block_loss(
    s: Shifted,
    t: Shifted,
    spare: Tensor,
    settings: LossSettings,
    with_gradient: bool,
    *,
    drops_last: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns token loss, divergence, clipped mass and, in a buffer, the gradient by z_S / T."""
    block = distributions(s, t, spare, settings.temperature)
    divergence = DIVERGENCES[settings.divergence]
    f = divergence.terms(block, settings)
    total = row_sum(f)
    correction = 0.0
    if divergence.residual is not None and _may_be_small(total):
        residual = divergence.residual(block, f, light_tiles(s, t, total, settings.temperature))
        correction = small_correction(total, residual, residual.isfinite())
    if drops_last:
        f[:, -1:], block.q[:, -1:] = 0.0, 0.0
        total = row_sum(f)
    token_loss = token_kl = corrected_divergence(total, correction)
    clipped_mass, unclipped = torch.zeros_like(total), None
    unclipped_mass: Tensor | float = 1.0
    if (found := clip(block, f, settings.pointwise_clip)) is not None:
        token_loss = found.sum + correction
        unclipped, unclipped_mass = found.unclipped, found.unclipped_mass
        clipped_mass = found.clipped_mass
    if drops_last:
        # To the gradient a dropped summand is a clipped one.
        unclipped = block.d.fill_(1.0) if unclipped is None else unclipped
        unclipped[:, -1:] = 0.0
        unclipped_mass = block.q.sum(dim=-1, keepdim=True)
    if not with_gradient:
        return token_loss, token_kl, clipped_mass, f

    gradient = divergence.gradient(block, f, unclipped, unclipped_mass)
    # A row's gradient adds up to 0, so its largest entry is minus the sum of the others.
    assert s.largest is not None
    gradient.scatter_(1, s.largest, 0.0)
    gradient.scatter_(1, s.largest, -gradient.sum(dim=-1, keepdim=True))
    return token_loss, token_kl, clipped_mass, gradient


def small_correction(total: Tensor, residual: Tensor, holds: Tensor) -> Tensor:
    """Returns what to add to a row's sum of f, where that is small.

    holds: where no exponential of the residual overflows.
    """
    return torch.where(holds & (total < SMALL_DIVERGENCE), residual, 0.0)


def _may_be_small(total: Float[Tensor, "R 1"]) -> bool:
    """Returns whether a row of the block may have a small divergence. A GPU is not asked."""
    return total.device.type != "cpu" or bool((total < SMALL_DIVERGENCE).any())


def light_tiles(
    s: Shifted, t: Shifted, total: Float[Tensor, "R 1"], temperature: float
) -> Tiles | None:
    """Tells the tiles whose probabilities are small enough to a divergence of `total`, and what
    they add to the sum of p - q. None if they are not known."""
    if s.tiles is None or t.tiles is None:
        return None
    least = (HEAVY * total.clamp(min=0)).square()
    heavy, masses = [], []
    for tiles, rest in ((s.tiles, s.rest), (t.tiles, t.rest)):
        # A tile with the largest entry, whose x is 0, lacks it in its sum.
        bound = temperature * (least * (1 + rest)).clamp(max=1).log()
        heavy.append(tiles.maxima >= bound)
        masses.append(tiles.sums / (1 + rest))
    either = heavy[0] | heavy[1]
    light = torch.where(either, 0.0, masses[0] - masses[1]).sum(dim=-1, keepdim=True)
    return Tiles(either, light)


def corrected_divergence(total: Tensor, correction: Tensor | float) -> Tensor:
    return torch.where(total > INFINITE_DIVERGENCE, math.inf, total + correction)


class Clipped(NamedTuple):
    sum: Float[Tensor, "R 1"]
    """of the clipped f"""
    unclipped: Float[Tensor, "R V"]
    """1 where f is not clipped, else 0"""
    unclipped_mass: Float[Tensor, "R 1"]
    """the target's"""
    clipped_mass: Float[Tensor, "R 1"]


def clip(block: Block, f: Float[Tensor, "R V"], pointwise_clip: float | None) -> Clipped | None:
    """Clips f, and takes the clipped entries out of `block.q`. None if the block has none."""
    if pointwise_clip is None or not _may_exceed(f, pointwise_clip):
        return None
    unclipped = torch.le(f, pointwise_clip, out=block.d)
    total = row_sum(f.clamp_(max=pointwise_clip))
    target_mass = block.q.sum(dim=-1, keepdim=True)
    unclipped_mass = block.q.mul_(unclipped).sum(dim=-1, keepdim=True)
    return Clipped(total, unclipped, unclipped_mass, target_mass - unclipped_mass)


def _may_exceed(f: Float[Tensor, "R V"], clip: float) -> bool:
    """Returns whether the block may have an entry above the clip. A GPU is not asked, because the
    host would wait. On a CPU a block of a large vocabulary is a few rows, and many have none. NaN
    hides the other rows' entries: such a block may have one."""
    return f.device.type != "cpu" or (f.numel() > 0 and not bool(f.amax() <= clip))


def distributions(s: Shifted, t: Shifted, spare: Float[Tensor, "R V"], temperature: float) -> Block:
    """Makes both distributions, in the buffers of `s` and `t`."""
    # A row without a finite logit on either side has loss 0: both distributions are set to 0.
    usable = (s.maximum != -math.inf) & (t.maximum != -math.inf)
    dtype = s.x.dtype
    q = t.exponentials if t.largest is None else t.exponentials.scatter_(1, t.largest, 1.0)
    q.mul_(torch.where(usable, 1 / (1 + t.rest), 0.0).to(dtype))
    scale = torch.where(usable, 1 / (1 + s.rest), 0.0).to(dtype)
    d = t.x.sub_(s.x)
    torch.add(log_ratio(s.rest, t.rest).to(dtype), d, alpha=1 / temperature, out=d)
    return Block(s.exponentials, scale, s.largest, q, d, g=s.x, spare=spare)


@full_precision()
def row_logprobs(
    logits: Float[Tensor, "R V"],
    token_ids: Int[Tensor, " R"],
    temperature: float,
    gradient: Float[Tensor, "R V"] | None,
    *,
    gradient_scale: float = 1.0,
) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"]]:
    """Returns the log-probability of each row's token, and the row's entropy.

    Fills `gradient`, which may be `logits`, with (one_hot - p) / temperature * gradient_scale.
    """
    scratch = buffers(3, logits)
    logprobs = scratch.new_empty(logits.shape[0])
    entropy = torch.empty_like(logprobs)
    for rows in row_blocks(logits):
        ids = token_ids[rows].long()[:, None]
        shifted = shift(logits[rows], temperature, *scratch[:, : rows.stop - rows.start])
        chosen = shifted.x.gather(1, ids) / temperature - torch.log1p(shifted.rest)
        logprobs[rows] = chosen[:, 0].to(logprobs.dtype)
        entropy[rows] = shifted.entropy[:, 0]
        if gradient is not None:
            # The largest entry's exponential, 1, is not in `rest`.
            assert shifted.largest is not None
            exponentials = shifted.exponentials.scatter_(1, shifted.largest, 1.0)
            others = torch.where(
                ids == shifted.largest, shifted.rest, 1 + shifted.rest - exponentials.gather(1, ids)
            )
            scale = gradient_scale / ((1 + shifted.rest) * temperature)
            out = torch.mul(exponentials, -scale.to(exponentials.dtype), out=gradient[rows])
            out.scatter_(1, ids, (scale * others).to(out.dtype))
    return logprobs, entropy
