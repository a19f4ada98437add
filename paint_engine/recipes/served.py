"""What a teacher's server says of a micro-batch's tokens, and the loss to it.

Rows are the N packed completion tokens of B rollouts. A rollout without a teacher view has no
scores: its rows are 0. K is one more than `teacher.served_top_k`: the completion's own token is
listed too.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from paint_engine.config.schema import Config
from paint_engine.recipes.base import LossInputs, SecondPass
from paint_engine.recipes.passes import Part, added, added_outputs, part_of
from paint_kernels import LossOptions, PaintLossOutput, paint_loss_from_topk


def scored(inputs: LossInputs) -> Part:
    """Returns the part of the micro-batch that the server has scored. Its second pass is empty: a
    server sends no hidden states."""
    examples = inputs.examples
    assert all(e.served is not None or e.teacher_view is None for e in examples), (
        "the step's rollouts were not scored"
    )
    rollouts = tuple(place for place, e in enumerate(examples) if e.served is not None)
    none = inputs.student_hidden_states.detach()[:0]
    return part_of(inputs, SecondPass(none, rollouts=rollouts))


def support(part: Part) -> tuple[Int[Tensor, "N_i K"], Float[Tensor, "N_i K"]]:
    """Returns the tokens listed for a part's rows, int32, -1 where a row has fewer, and their
    log-probabilities, float32, -inf there."""
    scores = [e.served for e in part.inputs.examples if e.served is not None]
    device, num_rows = part.inputs.student_hidden_states.device, len(part.inputs.completion_ids)
    if not scores:
        none = torch.zeros(0, 1, device=device)
        return none.to(torch.int32), none
    ids = torch.cat([one.token_ids for one in scores]).to(device, non_blocking=True)
    logprobs = torch.cat([one.logprobs for one in scores]).to(device, non_blocking=True)
    assert len(ids) == num_rows, (len(ids), num_rows)
    return ids, logprobs


def sampled_logprobs(inputs: LossInputs) -> Float[Tensor, " N"]:
    """Returns the teacher's log-probabilities of the completion tokens, (N,) nats."""
    part = scored(inputs)
    ids, logprobs = support(part)
    own = logprobs.masked_fill(ids != part.inputs.completion_ids[:, None], 0.0).sum(1)
    return added([part], [own], len(inputs.completion_ids))


def mass(inputs: LossInputs) -> Float[Tensor, " N"]:
    """Returns the teacher's probability of all listed tokens together, (N,)."""
    part = scored(inputs)
    _, logprobs = support(part)
    return added([part], [logprobs.exp().sum(1)], len(inputs.completion_ids))


def at_temperature(logprobs: Float[Tensor, "N K"], temperature: float) -> Float[Tensor, "N K"]:
    """Returns the log-probabilities of softmax(z / temperature) among the listed tokens, from those
    of softmax(z). Exact: the logits are the log-probabilities plus a number that falls out."""
    return torch.log_softmax(logprobs.double() / temperature, dim=1)


def divergence(config: Config, inputs: LossInputs, **reduction: Any) -> PaintLossOutput:
    """Computes `paint_loss_from_topk` of the micro-batch with the configuration's options.

    reduction: as of `Paint.divergence`.
    """
    section, part = config.objective, scored(inputs)
    ids, logprobs = support(part)
    if section.temperature != 1.0:
        assert config.teacher.tail == "renormalise", "of a tail, only one temperature is known"
        logprobs = at_temperature(logprobs, section.temperature)
    # The columns are the top-k.
    names = LossOptions.__annotations__.keys() - {"teacher_top_k"}
    output = paint_loss_from_topk(
        part.inputs.student_hidden_states,
        inputs.lm_head_weight,
        ids,
        logprobs,
        part.inputs.cu_seqlens,
        tail=config.teacher.tail,
        vocab_size=inputs.vocab_size,
        **reduction,
        **LossOptions(**{name: getattr(section, name) for name in sorted(names)}),  # pyright: ignore
    )
    if part.rows is None:
        return output
    return added_outputs([part], [output], len(inputs.completion_ids))
