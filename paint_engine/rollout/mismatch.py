"""How far the sampler's log-probabilities are from the trainer's own, for the same tokens.

The two run other kernels on the same weights, and with `rollout.ahead` on weights one step apart.
The distillation losses do not use the sampler's numbers, so a mismatch moves only the distribution
of the rollouts; a large one says that the sampler has other weights than it should.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from paint_engine.rollout.builtin import kept_distribution
from paint_engine.rollout.engine import SamplingParams
from paint_engine.types import Rollout

# Tokens of a micro-batch that are compared: their logits are made whole, and sorted.
_MAX_ROWS = 128


@torch.no_grad()
def logprob_differences(
    hidden_states: Float[Tensor, "N H"],
    lm_head_weight: Float[Tensor, "V H"],
    rollouts: Sequence[Rollout],
    params: SamplingParams,
) -> list[Float[Tensor, " n"]]:
    """Trainer's minus sampler's log-probability of a micro-batch's tokens, n of them evenly spaced,
    both under the processed distribution (temperature and truncation applied), in nats.

    hidden_states: the student's, the rollouts' N completion tokens in their order.

    Minus infinity where rounding has put a token outside the trainer's truncation. Nothing for a
    micro-batch without rollouts or of reference solutions. What comes is on the device still.
    """
    ids = [token for rollout in rollouts for token in rollout.completion_ids]
    sampled = [logprob for rollout in rollouts for logprob in rollout.rollout_logprobs]
    if not sampled:
        return []
    device = hidden_states.device
    rows = torch.linspace(0, len(ids) - 1, min(len(ids), _MAX_ROWS)).round().long()
    logits = torch.nn.functional.linear(hidden_states[rows.to(device)], lm_head_weight)
    probabilities, order = kept_distribution(logits, params)
    tokens = torch.tensor(ids)[rows].to(device)
    # A token has one place in the order, or none.
    mass = (probabilities * (order == tokens[:, None])).sum(-1) / probabilities.sum(-1)
    return [mass.log() - torch.tensor(sampled)[rows].to(device)]


def mismatch_metrics(by_rank: Sequence[Sequence[float]]) -> dict[str, float]:
    """Of the ranks' differences: mean and largest |difference| in nats, the share of tokens outside
    the trainer's truncation, and the effective sample size of the importance weights
    exp(difference) as a share of the tokens, (sum w)^2 / (n sum w^2): 1 where both agree. Nothing
    where nothing was sampled."""
    differences = [difference for rank in by_rank for difference in rank]
    if not differences:
        return {}
    inside = [d for d in differences if math.isfinite(d)]
    # Far beyond anything but a fault, and short of what a float can hold.
    weights = [math.exp(min(d, 100.0)) for d in differences]
    squares = sum(w * w for w in weights)
    return {
        "rollout_logprob_diff": sum(map(abs, inside)) / max(1, len(inside)),
        "rollout_logprob_diff_max": max(map(abs, inside), default=0.0),
        "rollout_outside_share": 1 - len(inside) / len(differences),
        "rollout_ess": sum(weights) ** 2 / (len(weights) * squares) if squares else 0.0,
    }
