"""Measures how far the sampler's log-probabilities are from the trainer's own, for the same tokens.

The two run different kernels on the same weights, and with `rollout.ahead` on weights that are one
step apart. The distillation losses do not use the sampler's log-probabilities, so a mismatch
affects only the distribution of the rollouts. A large mismatch means that the sampler has the wrong
weights.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from paint_engine.rollout.builtin import kept_distribution
from paint_engine.rollout.engine import SamplingParams
from paint_engine.types import Rollout

# Number of compared tokens per micro-batch. Their logits are computed in full and sorted.
_MAX_ROWS = 128


@torch.no_grad()
def logprob_differences(
    hidden_states: Float[Tensor, "N H"],
    lm_head_weight: Float[Tensor, "V H"],
    rollouts: Sequence[Rollout],
    params: SamplingParams,
) -> list[Float[Tensor, " n"]]:
    """Returns the trainer's minus the sampler's log-probability, in nats, of n evenly spaced tokens
    of a micro-batch. Both are under the processed distribution (temperature and truncation
    applied).

    hidden_states: (N, H) hidden states of the student at the rollouts' N completion tokens, in
    their order.

    The difference is minus infinity if rounding has moved a token outside the trainer's truncation.
    The result is empty for a micro-batch without rollouts or with reference solutions. It is still
    on the device.
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
    # A token is in the order once or not at all.
    mass = (probabilities * (order == tokens[:, None])).sum(-1) / probabilities.sum(-1)
    return [mass.log() - torch.tensor(sampled)[rows].to(device)]


def mismatch_metrics(by_rank: Sequence[Sequence[float]]) -> dict[str, float]:
    """Returns metrics of all ranks' differences: the mean and the largest |difference| in nats, the
    share of tokens outside the trainer's truncation, and the effective sample size of the
    importance weights w = exp(difference) as a share of the tokens, (sum w)^2 / (n sum w^2), which
    is 1 if both agree. Returns no metrics if nothing was sampled."""
    differences = [difference for rank in by_rank for difference in rank]
    if not differences:
        return {}
    inside = [d for d in differences if math.isfinite(d)]
    # Only a fault exceeds this value, and its exponential is still a finite float.
    weights = [math.exp(min(d, 100.0)) for d in differences]
    squares = sum(w * w for w in weights)
    return {
        "rollout_logprob_diff": sum(map(abs, inside)) / max(1, len(inside)),
        "rollout_logprob_diff_max": max(map(abs, inside), default=0.0),
        "rollout_outside_share": 1 - len(inside) / len(differences),
        "rollout_ess": sum(weights) ** 2 / (len(weights) * squares) if squares else 0.0,
    }
