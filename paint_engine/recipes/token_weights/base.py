"""What weights of tokens are computed from, and how they are found and checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from paint_engine.config.plugins import load_plugin

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from paint_engine.recipes.base import LossInputs
    from paint_engine.types import TrainExample

PACKAGE, ATTRIBUTE = "paint_engine.recipes.token_weights", "WEIGHTS"


@dataclass(frozen=True)
class RolloutTokens:
    """The n >= 1 completion tokens of one rollout. Nothing has a gradient; nats are at
    `objective.temperature`.

    token_ids: (n,) int64.
    position: (n,) int64: 0, 1, ..., n - 1.
    length: n.
    student_entropy, teacher_entropy: (n,) float32, or float64 for float64 inputs; nats. The
        teacher's is None where its server sends the sampled token alone (sampled_token).
    divergence: (n,) of that dtype; nats. The loss of each token without clip and weights:
        the divergence to the teacher, or log p_S - log p_T in sampled_token.
    correct: the verdict of the reward function; None without one.
    example: the rollout itself, with its problem, text, verdict and what the teacher saw.
    """

    token_ids: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    length: int
    student_entropy: Float[Tensor, " n"]
    teacher_entropy: Float[Tensor, " n"] | None
    divergence: Float[Tensor, " n"]
    correct: bool | None
    example: TrainExample


Weighting = Callable[[RolloutTokens], "Tensor"]
"""returns (n,) finite weights, which multiply the token losses and are constants"""


def load_weighting(name: str) -> Weighting | None:
    """Returns the function that `objective.token_weights` names, built in or "module:function";
    None for "uniform".

    Raises ValueError if there is none, or it is not callable.
    """
    found: Any = load_plugin(name, PACKAGE, ATTRIBUTE, "objective.token_weights")
    is_function = callable(found)
    if ":" in name and not is_function:
        raise ValueError(
            f"objective.token_weights: got {name!r}, which is {found!r:.100}; needs a function of "
            "paint_engine.recipes.token_weights.RolloutTokens; name the function itself, as in "
            "my_module:my_weights"
        )
    return found


def weights_of(
    name: str,
    weighting: Weighting,
    inputs: LossInputs,
    *,
    student_entropy: Float[Tensor, " N"],
    teacher_entropy: Float[Tensor, " N"] | None,
    divergence: Float[Tensor, " N"],
    taught: Sequence[bool],
) -> Float[Tensor, " N"]:
    """Returns the weights of a micro-batch's tokens, (N,), in the dtype of `divergence`.

    name: of the weighting, for messages.
    taught: of each rollout, whether the teacher trains it; the tokens of the others get 0, and the
        weighting does not see them.

    Raises ValueError for weights of another shape or that are not finite.
    """
    import torch

    parts = [divergence.new_zeros(0)]
    with torch.no_grad():
        bounds = pairwise(inputs.cu_seqlens.tolist())
        for example, (start, end), counts in zip(inputs.examples, bounds, taught, strict=True):
            if start == end or not counts:
                parts.append(divergence.new_zeros(end - start))
                continue
            rows = slice(start, end)
            tokens = RolloutTokens(
                token_ids=inputs.completion_ids[rows],
                position=torch.arange(end - start, device=divergence.device),
                length=end - start,
                student_entropy=student_entropy[rows].detach(),
                teacher_entropy=None if teacher_entropy is None else teacher_entropy[rows].detach(),
                divergence=divergence[rows].detach(),
                correct=None if example.verdict is None else example.verdict.correct,
                example=example,
            )
            parts.append(_of_shape(name, weighting(tokens), tokens).to(divergence))
        weights = torch.cat(parts)
        # What is not finite before the weights is another's fault, and named where it is found.
        before = student_entropy.isfinite() & divergence.isfinite()
        if teacher_entropy is not None:
            before &= teacher_entropy.isfinite()
        bad = before & ~weights.isfinite()
    if bad.any():
        row = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"objective.token_weights: {name!r} gave {weights[row].item()} to a token of "
            f"{_rollout_at(inputs, row)}; needs finite weights; correct the function"
        )
    return weights


def _of_shape(name: str, weights: object, tokens: RolloutTokens) -> Tensor:
    from torch import Tensor

    if isinstance(weights, Tensor) and weights.shape == (tokens.length,):
        return weights
    got = (
        f"a tensor of shape {tuple(weights.shape)}"
        if isinstance(weights, Tensor)
        else f"{weights!r:.100}, of type {type(weights).__name__}"
    )
    raise ValueError(
        f"objective.token_weights: {name!r} returned {got} for the {tokens.length} tokens of the "
        f"rollout for {tokens.example.rollout.problem.problem_id}; needs a tensor of shape "
        f"({tokens.length},); correct the function"
    )


def _rollout_at(inputs: LossInputs, row: int) -> str:
    ends = inputs.cu_seqlens.tolist()[1:]
    place = next(index for index, end in enumerate(ends) if row < end)
    return f"the rollout for {inputs.examples[place].rollout.problem.problem_id}"
