"""The loss of one micro-batch by the objective that was asked for."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from paint_engine.model.forward import autocast, hidden_states, lm_head_weight
from paint_engine.model.teacher import Teacher
from paint_engine.recipes import losses as objectives
from paint_engine.recipes.losses import ObjectiveOutput
from paint_engine.rollout.mismatch import logprob_differences
from paint_engine.training.run import Run
from paint_engine.types import PackedSequences, PrivilegedRollout, TrainBatch


def score(
    run: Run,
    batch: TrainBatch,
    items: Sequence[PrivilegedRollout],
    denominator: int,
    old_logprobs: Float[Tensor, " N"] | None = None,
) -> tuple[ObjectiveOutput, list[Float[Tensor, " n"]]]:
    """The loss of one micro-batch, whose rollouts are `items`, and by how much the sampler's
    log-probabilities of theirs are off.

    denominator: rollouts or tokens of the whole step, of all ranks.
    old_logprobs: those of the first update on these rollouts; None in it.
    """
    config, span = run.config, run.timings.span
    states, head = None, None
    if config.uses_teacher:
        states, head = _scored(run, run.teacher, batch.teacher)
    elif config.has_second_pass:
        states, head = _scored(run, run.base, batch.student)
    with span("student"):
        student_states = hidden_states(run.model, batch.student, attention=run.attention)
    with span("loss"), autocast(run.model):
        output = _loss(run, batch, items, student_states, states, head, old_logprobs, denominator)
        # Before the backward pass, which leaves a sharded head in pieces.
        own_head, params = lm_head_weight(run.model), run.sampler.params
        differences = logprob_differences(student_states, own_head, items, params)
    return output, differences


def _scored(
    run: Run, teacher: Teacher, sequences: PackedSequences
) -> tuple[Float[Tensor, "N H"], Float[Tensor, "V H"] | None]:
    """Hidden states of the teacher, and its head where that is not the student's."""
    with run.timings.span("teacher"), teacher.scoring() as scorer:
        states = hidden_states(scorer, sequences, attention=run.attention)
        return states, None if scorer is run.model else lm_head_weight(scorer)


def _loss(
    run: Run,
    batch: TrainBatch,
    items: Sequence[PrivilegedRollout],
    student_states: Float[Tensor, "N H"],
    teacher_states: Float[Tensor, "N H"] | None,
    teacher_head: Float[Tensor, "V H"] | None,
    old_logprobs: Float[Tensor, " N"] | None,
    denominator: int,
) -> ObjectiveOutput:
    section, head = run.config.objective, lm_head_weight(run.model)
    ids, bounds = batch.completion_ids, batch.cu_seqlens
    common: dict[str, Any] = {"vocab_size": len(run.tokenizer), "denominator": denominator}
    if section.name == "sft":
        return objectives.sft(student_states, head, ids, bounds, section, **common)
    if section.name == "paint":
        assert teacher_states is not None
        common["teacher_lm_head_weight"] = teacher_head
        return objectives.paint(student_states, teacher_states, head, bounds, section, **common)
    sampled = [logprob for item in items for logprob in item.rollout.rollout_logprobs]
    common["rollout_logprobs"] = torch.tensor(sampled).to(ids.device, non_blocking=True)
    if section.name == "sampled_token":
        assert teacher_states is not None
        common["teacher_lm_head_weight"] = teacher_head
        return objectives.sampled_token(
            student_states, teacher_states, head, ids, bounds, section, **common
        )
    assert section.name == "grpo", section.name
    advantages = torch.tensor([item.advantage for item in items])
    return objectives.grpo(
        student_states,
        teacher_states,
        head,
        ids,
        bounds,
        advantages.to(ids.device, non_blocking=True),
        section,
        run.config.grpo,
        base_lm_head_weight=teacher_head,
        old_logprobs=old_logprobs,
        **common,
    )
