"""Finds what is not finite in a step: a token of a micro-batch, a gradient, a weight."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from paint_engine.recipes import LossOutput
from paint_engine.types import TrainExample


def _local(tensor: Tensor) -> Tensor:
    """The values that this rank holds."""
    values = tensor.detach()
    return values.to_local() if isinstance(values, DTensor) else values


def _largest(tensors: Sequence[Tensor]) -> list[float]:
    """The largest absolute value of each tensor, NaN if it has one. Waits for the device once."""
    # A rank may hold no part of a small weight.
    filled = (t if t.numel() else t.new_zeros(1) for t in tensors)
    peaks = [torch.linalg.vector_norm(tensor, torch.inf).float() for tensor in filled]
    return torch.stack(peaks).tolist() if peaks else []


@dataclass(frozen=True)
class Scored:
    """One micro-batch's loss, with what it was computed from.

    states: of each pass, its role ("student", "teacher", "base"), the (N, H) hidden states at the
        positions that predict the completions, and the places of its rollouts; None for all.
    differences: the trainer's minus the sampler's log-probabilities of some tokens, in nats.
    """

    output: LossOutput
    states: Sequence[tuple[str, Tensor, tuple[int, ...] | None]]
    differences: list[Tensor]

    def fault(self, examples: Sequence[TrainExample], sums: Mapping[str, float]) -> str | None:
        """The first token whose values are not finite, in words; None if all are finite.

        examples: the micro-batch's rollouts.
        sums: the sums of the output's values, from which a fault is seen at no further cost.
        """
        peaks = _largest([_local(states) for _, states, _ in self.states])
        if all(map(math.isfinite, (*peaks, *sums.values()))):
            return None
        values = [(f"the {role}'s hidden state", s, places) for role, s, places in self.states]
        values += [(name, v[:, None], None) for name, v in self.output.per_token.items()]
        for what, rows, rollouts in values:
            bad = (~torch.isfinite(_local(rows).float())).any(-1).nonzero()
            if len(bad):
                own = examples if rollouts is None else [examples[place] for place in rollouts]
                row = int(bad[0])
                return f"{what} is {_bad_value(rows[row])} at {_place(own, row)}"
        return f"the loss is {sums['loss']}, though its values by token are finite"


def _bad_value(row: Tensor) -> str:
    found = _local(row).float().flatten()
    return str(found[~torch.isfinite(found)][0].item())


def _place(examples: Sequence[TrainExample], row: int) -> str:
    """The token that a row of a micro-batch's values predicts."""
    for example in examples:
        ids = example.rollout.completion_ids
        if row < len(ids):
            name = example.rollout.problem.problem_id
            return f"token {row} (id {ids[row]}) of the completion for {name}"
        row -= len(ids)
    raise AssertionError("a row beyond the micro-batch's tokens")


def _first_bad(tensors: Iterable[tuple[str, Tensor | None]]) -> str | None:
    named = [(name, _local(tensor)) for name, tensor in tensors if tensor is not None]
    peaks = _largest([tensor for _, tensor in named])
    return next((n for (n, _), p in zip(named, peaks, strict=True) if not math.isfinite(p)), None)


def bad_gradient(model: nn.Module) -> str | None:
    """The first parameter whose gradient is not finite, in this rank's shards."""
    return _first_bad((name, p.grad) for name, p in model.named_parameters() if p.requires_grad)


def bad_weight(model: nn.Module, *, trained: bool) -> str | None:
    """The first weight that is not finite, in this rank's shards.

    trained: look only at weights that the optimizer changes.
    """
    return _first_bad((n, p) for n, p in model.named_parameters() if p.requires_grad or not trained)


def largest_weight(model: nn.Module) -> tuple[float, str]:
    """The largest absolute value among the trained weights of this rank's shards, and its name."""
    named = [(name, _local(p)) for name, p in model.named_parameters() if p.requires_grad]
    return max(zip(_largest([t for _, t in named]), (n for n, _ in named), strict=True))
