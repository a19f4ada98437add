"""From rollouts to the packed sequences of student and teacher: pure functions on token ids.

The seam where training loops go wrong: the student's and the teacher's prompts differ in length,
and the hidden states of both must be taken where they predict the same completion tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from paint_engine.types import PackedSequences, TrainBatch, TrainExample


def _bounds(lengths: Sequence[int]) -> Int[Tensor, " B+1"]:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def pack_sequences(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> PackedSequences:
    """Prompt and completion of each row, laid end to end; positions restart at 0 in each.

    The token at position i is predicted by the hidden state at i - 1, so the loss positions of a
    row run from its prompt's last token to its completion's last but one.
    """
    token_ids: list[int] = []
    positions: list[int] = []
    loss_positions: list[int] = []
    for prompt, completion in zip(prompts, completions, strict=True):
        assert len(prompt) > 0, "the first completion token needs a prompt token to predict it"
        start = len(token_ids) + len(prompt) - 1
        loss_positions.extend(range(start, start + len(completion)))
        token_ids.extend((*prompt, *completion))
        positions.extend(range(len(prompt) + len(completion)))
    lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
    return PackedSequences(
        torch.tensor(token_ids, dtype=torch.long),
        torch.tensor(positions, dtype=torch.long),
        _bounds(lengths),
        torch.tensor(loss_positions, dtype=torch.long),
    )


def build_batch(examples: Sequence[TrainExample]) -> TrainBatch:
    """Student and teacher sequences over the same completion ids; all of the examples have a
    teacher's view, or none has."""
    completions = [e.rollout.completion_ids for e in examples]
    views = [e.teacher_view for e in examples if e.teacher_view is not None]
    assert len(views) in (0, len(examples)), (len(views), len(examples))
    teacher = pack_sequences([v.prompt_ids for v in views], completions) if views else None
    return TrainBatch(
        student=pack_sequences([e.rollout.prompt_ids for e in examples], completions),
        teacher=teacher,
        completion_ids=torch.tensor([t for c in completions for t in c], dtype=torch.long),
        cu_seqlens=_bounds([len(c) for c in completions]),
    )


@dataclass(frozen=True)
class PaddedSequences:
    """The same sequences as rows of one rectangle, padded on the right, every row's positions from
    0.

    `mask` is True on real tokens; `loss_positions` index the rectangle flattened to (B * T).
    """

    token_ids: Int[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]
    loss_positions: Int[Tensor, " N"]


def pad_sequences(packed: PackedSequences) -> PaddedSequences:
    """Rows for attention that knows no packing. The padding's token id is 0 and is seen by no
    token."""
    device, lengths = packed.token_ids.device, packed.cu_seqlens.diff()
    num_rows, longest = len(lengths), int(lengths.max()) if len(lengths) else 0
    mask = torch.arange(longest)[None, :] < lengths[:, None]
    # Where each packed token goes in the flattened rectangle, found where the bounds are.
    places = mask.flatten().nonzero().squeeze(1).to(device, non_blocking=True)
    token_ids = packed.token_ids.new_zeros(num_rows * longest)
    token_ids[places] = packed.token_ids
    mask = mask.to(device, non_blocking=True)
    return PaddedSequences(token_ids.view(num_rows, longest), mask, places[packed.loss_positions])


def _sequences_to(packed: PackedSequences, device: torch.device) -> PackedSequences:
    return PackedSequences(
        packed.token_ids.to(device, non_blocking=True),
        packed.position_ids.to(device, non_blocking=True),
        packed.cu_seqlens,
        packed.loss_positions.to(device, non_blocking=True),
    )


def batch_to(batch: TrainBatch, device: torch.device) -> TrainBatch:
    """The batch with its tensors on `device`, but for the bounds of sequences and completions:
    padding, the packed kernels' longest sequence and the loss's chunks are planned from them, and
    would have to wait for the device to read them there."""
    return replace(
        batch,
        student=_sequences_to(batch.student, device),
        teacher=None if batch.teacher is None else _sequences_to(batch.teacher, device),
        completion_ids=batch.completion_ids.to(device, non_blocking=True),
    )
