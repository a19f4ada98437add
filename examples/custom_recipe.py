r"""A recipe of one's own: PAINT in which later tokens have less weight.

    python -m paint_engine.train --preset paint-tiny \
        --objective.name examples.custom_recipe:EarlyTokens

A recipe is a subclass of `paint_engine.recipes.Recipe`. This one inherits everything from PAINT,
the teacher's view, the configuration keys and the report, and replaces the loss: each rollout's
token losses are weighted by 2^(-t / HALF_LIFE), t = 0, 1, ... within the rollout, and averaged
with these weights. Training then concentrates on the beginning of long rollouts.
"""

import torch
from torch import Tensor

from paint_engine.recipes import LossInputs, LossOutput
from paint_engine.recipes.paint import Paint, per_token
from paint_engine.recipes.tokens import rollout_of_token

HALF_LIFE = 32
"""tokens after which a token counts half"""


def decayed_weights(cu_seqlens: Tensor) -> Tensor:
    """Returns (N,) weights that add up to 1 over each rollout."""
    rollout = rollout_of_token(cu_seqlens)
    place = torch.arange(len(rollout)) - cu_seqlens[:-1][rollout]
    weights = 0.5 ** (place / HALF_LIFE)
    sums = torch.zeros(len(cu_seqlens) - 1).index_add(0, rollout, weights)
    return weights / sums[rollout]


class EarlyTokens(Paint):
    """PAINT with token weights that halve every `HALF_LIFE` tokens."""

    def check(self) -> None:
        """Raises ValueError for a reduction that has no mean within a rollout."""
        super().check()
        if self.config.objective.reduction != "sequence_mean":
            raise ValueError(
                f"objective.reduction: got {self.config.objective.reduction!r}; EarlyTokens "
                "weights tokens within their rollout; use --objective.reduction sequence_mean"
            )

    @property
    def takes_token_losses(self) -> bool:
        """Yes, for `head_work` to count: with all weights trained, the loss costs more so."""
        return True

    def loss(self, inputs: LossInputs) -> LossOutput:
        """Computes the weighted mean of the token losses, with gradients to the student."""
        output = self.divergence(inputs, reduction="none")
        weights = decayed_weights(inputs.cu_seqlens).to(output.loss)
        # The denominator is the number of rollouts of the whole step, so that the losses of the
        # micro-batches and ranks add up.
        loss = (weights * output.loss).sum() / inputs.denominator
        return LossOutput(loss, per_token(output))
