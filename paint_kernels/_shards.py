"""The part of the vocabulary that a rank has, and the reductions over the ranks that share it."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from paint_kernels._checks import resolve_vocab_size

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch.distributed import ProcessGroup

SUM_TOLERANCE = 1e-3
"""of the norm of a tensor, between the sums of its copies on two ranks. For other tokens the sums
differ by about the norm; copies rounded differently to bfloat16 differ by less."""


@dataclass(frozen=True)
class Shard:
    """The contiguous rows of the head that one rank of a process group has.

    Without a group these are all rows, and a reduction returns its argument. Operators take the
    fields in place of this: a group by its name.
    """

    group: str = ""
    rank: int = 0
    num_ranks: int = 1
    start: int = 0
    """the token id of the rank's first row"""
    size: int = 0
    """of the whole vocabulary"""
    widest: int = 0
    """rows of the rank that has most"""

    @property
    def is_whole(self) -> bool:
        return not self.group

    def arguments(self) -> tuple[Any, ...]:
        """Returns the fields as positional arguments of the operators."""
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    def vocab_size(self, num_rows: int) -> int:
        """Returns the size of the whole vocabulary; num_rows: the rank's."""
        return num_rows if self.is_whole else self.size

    def planned_width(self, num_rows: int) -> int:
        """Returns the columns for which chunks are planned: the same on all ranks, whose
        collectives would not match otherwise."""
        return num_rows if self.is_whole else self.widest

    def sum(self, values: Tensor) -> Tensor:
        """Returns the sum over the ranks. One collective."""
        if self.is_whole:
            return values
        functional = torch.ops._c10d_functional
        return functional.wait_tensor(functional.all_reduce(values.contiguous(), "sum", self.group))

    def gather(self, values: Tensor) -> Tensor:
        """Returns the values of all ranks, one after another in a new first dimension. One
        collective."""
        if self.is_whole:
            return values[None]
        functional = torch.ops._c10d_functional
        flat = values.reshape(1, -1)
        every = functional.all_gather_into_tensor(flat, self.num_ranks, self.group)
        return functional.wait_tensor(every).view(self.num_ranks, *values.shape)

    def local_ids(self, ids: Int[Tensor, ...], num_rows: int) -> Int[Tensor, ...]:
        """Returns token ids as rows of the rank's head, and -1 where another rank has the row."""
        if self.is_whole:
            return ids
        rows = ids.long() - self.start
        return torch.where((rows >= 0) & (rows < num_rows), rows, -1)


WHOLE = Shard()
"""where no ranks share the vocabulary"""


@torch.compiler.disable
def resolve_shard(
    group: ProcessGroup,
    num_rows: Sequence[int],
    vocab_size: int | None,
    same: Mapping[str, Tensor],
    settings: Mapping[str, Any],
) -> Shard:
    """Returns the rank's part of the vocabulary, from the sizes that all ranks have. One
    collective, for which the host waits: a compiled graph breaks here.

    num_rows: of the rank's head, and of the teacher's if that has its own. same: what must be equal
        on all ranks. settings: likewise, plain values; of a tensor the shape.

    Raises:
        ValueError: on every rank, if ranks differ where they must not, or one has no row.
    """
    device = next(iter(same.values())).device
    plain = {name: _plain(value) for name, value in settings.items()} | {"vocab_size": vocab_size}
    digest = zlib.crc32(repr(sorted(plain.items())).encode())
    own = [_fingerprint(tensor) for tensor in same.values()]
    numbers = torch.tensor([digest, *num_rows], dtype=torch.float64, device=device)
    name, rank, num_ranks = group.group_name, group.rank(), group.size()
    every = Shard(name, rank, num_ranks).gather(torch.cat([numbers, *own])).tolist()
    _check_same(every, list(same), 1 + len(num_rows))
    if any(ours[0] != digest for ours in every):
        raise ValueError(
            "vocab_parallel_group: its ranks call with different arguments. Settings, trained "
            f"tensors and vocab_size must be equal on all of them; here they are {plain}."
        )
    counts = [[int(ours[1 + role]) for ours in every] for role in range(len(num_rows))]
    return _cut(Shard(name, rank, num_ranks), counts, vocab_size)


def _plain(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) and value.ndim else value


def _fingerprint(tensor: Tensor) -> Float[Tensor, " 3"]:
    """Returns number of rows, sum, and norm, which is 0 for what must be equal exactly."""
    values = tensor.detach()
    total = values.sum(dtype=torch.float64)
    norm = torch.zeros_like(total)
    if values.is_floating_point():
        norm = torch.linalg.vector_norm(values, dtype=torch.float64)
    return torch.stack([torch.full_like(total, len(tensor)), total, norm])


def _check_same(every: list[list[float]], names: list[str], first: int) -> None:
    for index, name in enumerate(names):
        rows, totals, norms = (
            [ours[first + 3 * index + offset] for ours in every] for offset in range(3)
        )
        # False for what is not finite: that reaches the loss of every rank.
        apart = max(totals) - min(totals) > SUM_TOLERANCE * max(norms)
        if len(set(rows)) > 1 or apart:
            raise ValueError(
                f"vocab_parallel_group: {name} differs between its ranks, which have "
                f"{[int(number) for number in rows]} rows with the sums {totals}. Every rank must "
                "pass the same tokens, with its own rows of the head: gather what sequence "
                "parallelism splits. A head that FSDP shards is no vocabulary-parallel one: call "
                ".full_tensor() once per loss there."
            )


def _cut(shard: Shard, counts: list[list[int]], vocab_size: int | None) -> Shard:
    """Places the rank's rows in the vocabulary, whose padding lies at the end."""
    size = resolve_vocab_size(vocab_size, min(sum(rows) for rows in counts))
    kept = [_kept_rows(rows, size) for rows in counts]
    if kept[0] != kept[-1] or (vocab_size is None and counts[0] != counts[-1]):
        raise ValueError(
            f"lm_head_weight has {counts[0]} rows on the ranks of vocab_parallel_group, "
            f"teacher_lm_head_weight {counts[-1]}: each rank needs the same part of the vocabulary "
            "of both. Set vocab_size to its size where the end of one is padding."
        )
    if min(kept[0]) < 1:
        raise ValueError(
            f"lm_head_weight has {counts[0]} rows on the ranks of vocab_parallel_group, of which "
            f"{kept[0]} belong to a vocabulary of {size}: each rank needs one. "
            "Divide the head anew."
        )
    start = sum(kept[0][: shard.rank])
    return dataclasses.replace(shard, start=start, size=size, widest=max(kept[0]))


def _kept_rows(rows: list[int], size: int) -> list[int]:
    """Returns the rows of each rank that belong to the vocabulary."""
    starts = [sum(rows[:rank]) for rank in range(len(rows))]
    return [max(0, min(count, size - start)) for start, count in zip(starts, rows, strict=True)]
