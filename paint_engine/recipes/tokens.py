"""Functions shared by recipes whose loss uses the sampled tokens' log-probabilities.

Rows are the N packed completion tokens of B rollouts. `cu_seqlens` (B+1,) holds the rollouts'
bounds on the CPU.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from paint_engine.recipes.base import LossInputs
from paint_kernels import TokenLogprobs, token_logprobs


def student_logprobs(inputs: LossInputs, temperature: float) -> TokenLogprobs:
    """Returns the student's log-probabilities of the completion tokens, (N,) nats, with
    gradients."""
    return token_logprobs(
        inputs.student_hidden_states,
        inputs.lm_head_weight,
        inputs.completion_ids,
        temperature=temperature,
        vocab_size=inputs.vocab_size,
    )


@torch.no_grad()
def second_logprobs(inputs: LossInputs, temperature: float) -> TokenLogprobs:
    """Returns the second pass's log-probabilities of the completion tokens, (N,) nats."""
    assert inputs.second_hidden_states is not None
    head = inputs.second_lm_head_weight
    return token_logprobs(
        inputs.second_hidden_states,
        inputs.lm_head_weight if head is None else head,
        inputs.completion_ids,
        temperature=temperature,
        vocab_size=inputs.vocab_size,
    )


def importance_weight(
    logprobs: Float[Tensor, " N"], inputs: LossInputs, cap: float | None
) -> Float[Tensor, " N"]:
    """Returns truncated importance weights min(p_trainer / p_sampler, cap) of the sampled tokens,
    (N,). They correct for a sampler with slightly different probabilities. Without a cap they are
    1."""
    if cap is None:
        return torch.ones_like(logprobs)
    sampled = [p for example in inputs.examples for p in example.rollout.rollout_logprobs]
    sampler = torch.tensor(sampled, dtype=torch.float64).to(logprobs, non_blocking=True)
    return torch.exp(logprobs - sampler).clamp(max=cap)


def rollout_of_token(cu_seqlens: Int[Tensor, " B+1"]) -> Int[Tensor, " N"]:
    """Returns the index of the rollout of each row, (N,)."""
    lengths = cu_seqlens.diff()
    return torch.repeat_interleave(torch.arange(len(lengths)), lengths)


def reduced(
    token_loss: Float[Tensor, " N"],
    cu_seqlens: Int[Tensor, " B+1"],
    reduction: str,
    denominator: int,
) -> Float[Tensor, ""]:
    """Returns the micro-batch's share of the step's loss. "token_mean" sums over the tokens and
    "sequence_mean" over the rollouts' means; both divide by `denominator`."""
    if reduction == "token_mean":
        return token_loss.sum() / denominator
    lengths = cu_seqlens.diff()[rollout_of_token(cu_seqlens)]
    return (token_loss / lengths.to(token_loss)).sum() / denominator
