"""The forward passes of one micro-batch, and the recipe's loss of it."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from paint_engine.model.forward import autocast, hidden_states, lm_head_weight
from paint_engine.recipes import LossInputs, LossOutput
from paint_engine.rollout.mismatch import logprob_differences
from paint_engine.training.run import Run
from paint_engine.types import TrainBatch, TrainExample


def score(
    run: Run,
    batch: TrainBatch,
    examples: Sequence[TrainExample],
    denominator: int,
    old_logprobs: Float[Tensor, " N"] | None = None,
) -> tuple[LossOutput, list[Float[Tensor, " n"]]]:
    """The loss of one micro-batch, made of `examples`, and the differences between the trainer's
    and the sampler's log-probabilities of some of its tokens.

    denominator: rollouts or tokens of the whole step, of all ranks.
    old_logprobs: those of the first update on these rollouts; None in it.
    """
    span = run.timings.span
    second_states, second_head = _second_pass(run, batch)
    with span("student"):
        student_states = hidden_states(run.model, batch.student, attention=run.attention)
    with span("loss"), autocast(run.model):
        inputs = LossInputs(
            student_hidden_states=student_states,
            lm_head_weight=lm_head_weight(run.model),
            second_hidden_states=second_states,
            second_lm_head_weight=second_head,
            completion_ids=batch.completion_ids,
            cu_seqlens=batch.cu_seqlens,
            examples=examples,
            old_logprobs=old_logprobs,
            vocab_size=len(run.tokenizer),
            denominator=denominator,
        )
        output = run.recipe.loss(inputs)
        # Before the backward pass, which leaves a sharded head in pieces.
        head, params = lm_head_weight(run.model), run.sampler.params
        rollouts = [example.rollout for example in examples]
        differences = logprob_differences(student_states, head, rollouts, params)
    return output, differences


def _second_pass(
    run: Run, batch: TrainBatch
) -> tuple[Float[Tensor, "N H"] | None, Float[Tensor, "V H"] | None]:
    """Hidden states of the recipe's second pass, and its head where that is not the student's."""
    whose = run.recipe.second_pass
    if whose is None:
        return None, None
    scoring, sequences = (
        (run.teacher, batch.teacher) if whose == "teacher" else (run.base, batch.student)
    )
    assert sequences is not None, "the recipe has a teacher and made no views"
    with run.timings.span("teacher"), scoring.scoring() as scorer:
        states = hidden_states(scorer, sequences, attention=run.attention)
        return states, None if scorer is run.model else lm_head_weight(scorer)
