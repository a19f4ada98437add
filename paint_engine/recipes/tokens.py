"""Functions shared by recipes whose loss uses the sampled tokens' log-probabilities.

Rows are the N packed completion tokens of B rollouts. `cu_seqlens` (B+1,) holds the rollouts'
bounds on the CPU.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from paint_engine.recipes.base import LossInputs
from paint_engine.recipes.passes import Part, added, is_whole, parts_of
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
    """Returns the second pass's log-probabilities of the completion tokens, (N,) nats; of several
    teachers, their weighted mean at each token."""
    parts = parts_of(inputs)
    found = [_logprobs_of(part, temperature) for part in parts]
    if is_whole(parts):
        return found[0]
    num_rows = len(inputs.completion_ids)
    logprobs = added(parts, [one.logprobs for one in found], num_rows)
    return TokenLogprobs(logprobs, added(parts, [one.entropy for one in found], num_rows))


def _logprobs_of(part: Part, temperature: float) -> TokenLogprobs:
    head = part.second.lm_head_weight
    return token_logprobs(
        part.second.hidden_states,
        part.inputs.lm_head_weight if head is None else head,
        part.inputs.completion_ids,
        temperature=temperature,
        vocab_size=part.inputs.vocab_size,
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
