"""Packs rollouts into sequences of student and teacher: pure functions on token ids.

The student's and the teacher's prompts differ in length, and the hidden states of both must be
taken at the positions that predict the same completion tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from paint_engine.types import PackedSequences, ScoredSequences, TrainBatch, TrainExample


def _bounds(lengths: Sequence[int]) -> Int[Tensor, " B+1"]:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def pack_sequences(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> PackedSequences:
    """Concatenates the prompts and completions; positions restart at 0 in each sequence.

    The hidden state at position i - 1 predicts the token at i. The loss positions of a sequence
    therefore run from the last prompt token to the second-to-last completion token.
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
    """Builds student and teacher sequences over the same completion ids. Examples without a teacher
    view are in no teacher's sequences."""
    completions = [e.rollout.completion_ids for e in examples]
    return TrainBatch(
        student=pack_sequences([e.rollout.prompt_ids for e in examples], completions),
        teachers=_scored(examples),
        completion_ids=torch.tensor([t for c in completions for t in c], dtype=torch.long),
        cu_seqlens=_bounds([len(c) for c in completions]),
    )


def _scored(examples: Sequence[TrainExample]) -> dict[int, ScoredSequences]:
    """Returns the sequences of each teacher that scores any of the rollouts."""
    prompts = [{} if e.teacher_view is None else e.teacher_view.prompts for e in examples]
    found = {}
    for teacher in sorted({place for of_one in prompts for place in of_one}):
        rollouts = tuple(row for row, of_one in enumerate(prompts) if teacher in of_one)
        completions = [examples[row].rollout.completion_ids for row in rollouts]
        packed = pack_sequences([prompts[row][teacher] for row in rollouts], completions)
        found[teacher] = ScoredSequences(rollouts, packed)
    return found


@dataclass(frozen=True)
class PaddedSequences:
    """Sequences as right-padded rows; positions start at 0 in every row.

    `mask` is True on real tokens; `loss_positions` index the rectangle flattened to (B * T).
    """

    token_ids: Int[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]
    loss_positions: Int[Tensor, " N"]


def pad_sequences(packed: PackedSequences) -> PaddedSequences:
    """Pads packed sequences into rows, for attention without packing. The padding has token id 0;
    no token attends to it."""
    device, lengths = packed.token_ids.device, packed.cu_seqlens.diff()
    num_rows, longest = len(lengths), int(lengths.max()) if len(lengths) else 0
    mask = torch.arange(longest)[None, :] < lengths[:, None]
    # The place of each packed token in the flattened rows, computed on the bounds' device.
    places = mask.flatten().nonzero().squeeze(1).to(device, non_blocking=True)
    token_ids = packed.token_ids.new_zeros(num_rows * longest)
    token_ids[places] = packed.token_ids
    mask = mask.to(device, non_blocking=True)
    return PaddedSequences(token_ids.view(num_rows, longest), mask, places[packed.loss_positions])


def sequences_to(packed: PackedSequences, device: torch.device) -> PackedSequences:
    """Moves the sequences to `device`, except their bounds."""
    return PackedSequences(
        packed.token_ids.to(device, non_blocking=True),
        packed.position_ids.to(device, non_blocking=True),
        packed.cu_seqlens,
        packed.loss_positions.to(device, non_blocking=True),
    )


def batch_to(batch: TrainBatch, device: torch.device) -> TrainBatch:
    """Moves the batch to `device`, except the bounds of sequences and completions. Padding, the
    longest packed sequence and the chunks of the loss are planned from the bounds; reading them
    from the device would wait for it."""
    return replace(
        batch,
        student=sequences_to(batch.student, device),
        teachers={
            place: replace(scored, sequences=sequences_to(scored.sequences, device))
            for place, scored in batch.teachers.items()
        },
        completion_ids=batch.completion_ids.to(device, non_blocking=True),
    )
