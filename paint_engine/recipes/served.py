"""What a teacher's server says of a micro-batch's tokens, and the loss to it.

Rows are the N packed completion tokens of B rollouts. K is one more than `teacher.served_top_k`:
the completion's own token is listed too.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from paint_engine.config.schema import Config
from paint_engine.recipes.base import LossInputs
from paint_kernels import LossOptions, PaintLossOutput, paint_loss_from_topk


def support(inputs: LossInputs) -> tuple[Int[Tensor, "N K"], Float[Tensor, "N K"]]:
    """Returns the listed tokens, int32, -1 where a row has fewer, and their log-probabilities,
    float32, -inf there."""
    scores = [example.served for example in inputs.examples if example.served is not None]
    assert len(scores) == len(inputs.examples), "the step's rollouts were not scored"
    device = inputs.student_hidden_states.device
    ids = torch.cat([one.token_ids for one in scores]).to(device, non_blocking=True)
    logprobs = torch.cat([one.logprobs for one in scores]).to(device, non_blocking=True)
    assert len(ids) == len(inputs.completion_ids), (len(ids), len(inputs.completion_ids))
    return ids, logprobs


def sampled_logprobs(inputs: LossInputs) -> Float[Tensor, " N"]:
    """Returns the teacher's log-probabilities of the completion tokens, (N,) nats."""
    ids, logprobs = support(inputs)
    return logprobs.masked_fill(ids != inputs.completion_ids[:, None], 0.0).sum(1)


def mass(inputs: LossInputs) -> Float[Tensor, " N"]:
    """Returns the teacher's probability of all listed tokens together, (N,)."""
    _, logprobs = support(inputs)
    return logprobs.exp().sum(1)


def at_temperature(logprobs: Float[Tensor, "N K"], temperature: float) -> Float[Tensor, "N K"]:
    """Returns the log-probabilities of softmax(z / temperature) among the listed tokens, from those
    of softmax(z). Exact: the logits are the log-probabilities plus a number that falls out."""
    return torch.log_softmax(logprobs.double() / temperature, dim=1)


def divergence(config: Config, inputs: LossInputs, **reduction: Any) -> PaintLossOutput:
    """Computes `paint_loss_from_topk` of the micro-batch with the configuration's options.

    reduction: as of `Paint.divergence`.
    """
    section = config.objective
    ids, logprobs = support(inputs)
    if section.temperature != 1.0:
        assert config.teacher.tail == "renormalise", "of a tail, only one temperature is known"
        logprobs = at_temperature(logprobs, section.temperature)
    # The columns are the top-k.
    names = LossOptions.__annotations__.keys() - {"teacher_top_k"}
    return paint_loss_from_topk(
        inputs.student_hidden_states,
        inputs.lm_head_weight,
        ids,
        logprobs,
        inputs.cu_seqlens,
        tail=config.teacher.tail,
        vocab_size=inputs.vocab_size,
        **reduction,
        **LossOptions(**{name: getattr(section, name) for name in sorted(names)}),  # pyright: ignore
    )
