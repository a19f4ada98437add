"""A micro-batch's loss against several second passes: one after the other, and their sum.

Teachers of a mixture score all rollouts, each with its weight. Teachers to which the data route the
rollouts score their own with weight 1. A rollout without a teacher view is in no pass. In each case
the loss is a sum over the passes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from paint_engine.recipes.base import LossInputs, SecondPass
from paint_kernels import PaintLossOutput


@dataclass(frozen=True)
class Part:
    """One second pass with what belongs to its rollouts.

    inputs: those of the micro-batch, cut to these rollouts; `second_passes` has this pass alone.
    rows: (N_i,) their rows among the micro-batch's N tokens; None for all.
    """

    inputs: LossInputs
    second: SecondPass
    rows: Int[Tensor, " N_i"] | None


def parts_of(inputs: LossInputs) -> list[Part]:
    """Returns the parts of a micro-batch's loss, one for each second pass."""
    assert inputs.second_passes, "the recipe has no second pass"
    return [part_of(inputs, second) for second in inputs.second_passes]


def is_whole(parts: Sequence[Part]) -> bool:
    """Returns whether there is one pass, over all rollouts, with weight 1."""
    return len(parts) == 1 and parts[0].rows is None and parts[0].second.weight == 1.0


def part_of(inputs: LossInputs, second: SecondPass) -> Part:
    """Returns the part of one second pass."""
    inputs = replace(inputs, second_passes=(second,))
    num_rollouts = len(inputs.cu_seqlens) - 1
    if second.rollouts is None or len(second.rollouts) == num_rollouts:
        return Part(inputs, second, None)
    starts, lengths = inputs.cu_seqlens[:-1].tolist(), inputs.cu_seqlens.diff().tolist()
    kept = second.rollouts
    places = [starts[rollout] + i for rollout in kept for i in range(lengths[rollout])]
    bounds = torch.tensor([0, *(lengths[rollout] for rollout in kept)]).cumsum(0)
    rows = torch.tensor(places, dtype=torch.long).to(inputs.completion_ids.device)
    old = inputs.old_logprobs
    cut = replace(
        inputs,
        student_hidden_states=inputs.student_hidden_states[rows],
        completion_ids=inputs.completion_ids[rows],
        cu_seqlens=bounds.to(inputs.cu_seqlens.dtype),
        examples=[inputs.examples[rollout] for rollout in kept] if inputs.examples else (),
        old_logprobs=None if old is None else old[rows],
    )
    return Part(cut, second, rows)


def added(
    parts: Sequence[Part], values: Sequence[Float[Tensor, " N_i"]], num_rows: int
) -> Float[Tensor, " N"]:
    """Returns the sum of the parts' values at their rows, each times its pass's weight, with
    gradients."""
    total = values[0].new_zeros(num_rows)
    for part, value in zip(parts, values, strict=True):
        weighted = part.second.weight * value
        total = total + weighted if part.rows is None else total.index_add(0, part.rows, weighted)
    return total


def added_outputs(
    parts: Sequence[Part], outputs: Sequence[PaintLossOutput], num_rows: int
) -> PaintLossOutput:
    """Returns the weighted sum of the parts' losses, and of their values per token.

    The weights at a token add up to 1, so entropies and masses are means over its teachers. A token
    counts as selected if any of them interpolates its target. Where no teacher scores it, its
    values are 0.
    """
    rows = [output._asdict() for output in outputs]
    selected = added(parts, [row.pop("selected").to(torch.float32) for row in rows], num_rows) > 0
    losses = [row.pop("loss") for row in rows]
    if losses[0].ndim:
        loss = added(parts, losses, num_rows)
    else:
        weighted = [part.second.weight * one for part, one in zip(parts, losses, strict=True)]
        loss = torch.stack(weighted).sum()
    means = {name: added(parts, [row[name] for row in rows], num_rows) for name in rows[0]}
    return PaintLossOutput(loss=loss, selected=selected, **means)
