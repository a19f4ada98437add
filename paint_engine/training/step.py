"""One training step, and the loss of one of its micro-batches."""

import math
import time
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from paint_engine.checkpoint.weights import whole
from paint_engine.distributed import gather_objects, raise_together, sum_gradients
from paint_engine.model import Teacher, autocast, hidden_states, lm_head_weight
from paint_engine.model.packing import batch_to, build_batch, pack_sequences, sequences_to
from paint_engine.model.sharding import sync_gradients
from paint_engine.monitor import SKIPPED_STEPS, NotFinite
from paint_engine.recipes import LossInputs, SecondPass
from paint_engine.rollout.mismatch import logprob_differences
from paint_engine.seeds import dropout_seed
from paint_engine.training.finite import Scored, bad_gradient
from paint_engine.training.microbatches import plan_microbatches
from paint_engine.training.optim import learning_rate
from paint_engine.training.record import StepRecord
from paint_engine.training.rollouts import sample_step
from paint_engine.training.run import Run
from paint_engine.types import ScoredSequences, TrainBatch, TrainExample


def train_step(run: Run, step: int) -> tuple[dict[str, float], list[dict[str, object]]]:
    """Takes one step on new rollouts. Returns the metrics and the samples to keep, of all ranks.

    step: counts from 0.
    """
    # ---------------------------------------------------------------------------------------------
    config, started, span = run.config, time.monotonic(), run.timings.span
    rollouts, lag = sample_step(run, step)
    record, sampled = StepRecord(run.recipe, step, rollouts), time.monotonic()
    rate, grad_norm, fault = 0.0, None, None

    microbatches = my_microbatches(run, record.trained)
    for number in range(run.recipe.num_updates):
        # Only the student's pass has dropout; the seed makes a resumed run repeat it.
        torch.manual_seed(dropout_seed(config.train.seed, step, run.world.rank))
        run.model.train()
        for place, items in enumerate(microbatches):
            # A rank without rollouts runs one at weight 0, since all ranks gather sharded weights.
            shown = items or [record.stand_in]
            batch = batch_to(build_batch(shown), run.world.device)
            sync_gradients(run.model, last=place == len(microbatches) - 1)
            old_logprobs = record.old_logprobs.get(place)
            scored = score(run, batch, shown, record.denominator, old_logprobs)
            loss = scored.output.loss
            with span("backward"):
                (loss if items else 0.0 * loss).backward()
            if items:
                fault = fault or scored.fault(items, record.add(items, scored.output))
            if items and number == 0:
                record.add_first(place, items, scored, run.tokenizer)
            # Its hidden states would stay in memory beside the next micro-batch's.
            del scored, loss
        stop_at_fault(run, step, fault)
        with span("optimizer"):
            rate, grad_norm = update(run, step)
    run.teacher.finish_step(step + 1)
    # ---------------------------------------------------------------------------------------------
    if run.recipe.samples:
        run.shortening.add(step + 1, (completion_size(item) for item in rollouts))
    metrics, samples, finished = record.metrics(), record.samples(), time.monotonic()
    return {
        "step": step + 1,
        **metrics,
        "rollout_lag": lag,
        **({} if grad_norm is None else {"grad_norm": grad_norm}),
        SKIPPED_STEPS: run.skipped.total,
        "learning_rate": rate,
        "tokens_per_s": record.num_tokens / (finished - started),
        "seconds": finished - started,
        "seconds_rollout": sampled - started,
        "seconds_update": finished - sampled,
    }, samples


def completion_size(example: TrainExample) -> tuple[int, bool]:
    """Returns a rollout's number of completion tokens, and whether the limit cut it."""
    return len(example.rollout.completion_ids), example.rollout.truncated


def stop_at_fault(run: Run, step: int, fault: str | None) -> None:
    """Raises NotFinite on every rank if any rank's passes met a value that is not finite. A
    collective.

    fault: this rank's first, in words.
    """
    where = f"step {step + 1}, rank {run.world.rank}"
    raise_together(fault and NotFinite(f"{where}: {fault}"))


def update(run: Run, step: int) -> tuple[float, float | None]:
    """Takes one optimizer step with the gradients of all ranks. Returns the learning rate and the
    L2 norm of the gradients before clipping to `optim.max_grad_norm`.

    With a gradient that is not finite it leaves weights, moments and teacher as they are, counts a
    skipped step, and returns no norm; `optim.max_skipped_steps` of them in a row raise NotFinite.
    The norm is the same on all ranks, so that they decide alike.
    """
    rate = learning_rate(run.config.optim, step, run.config.train.num_steps)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    sum_gradients(run.parameters)
    gradients = [p.grad for p in run.parameters if p.grad is not None]
    total = torch.nn.utils.get_total_norm(gradients)
    norm = whole(total).item()
    if is_finite := math.isfinite(norm):
        limit = run.config.optim.max_grad_norm
        torch.nn.utils.clip_grads_with_norm_(run.parameters, limit, total)
        run.optimizer.step()
        run.teacher.update()
        run.skipped.in_a_row = 0
    else:
        _skip(run, step, norm)
    run.optimizer.zero_grad()
    run.model.eval()
    return rate, norm if is_finite else None


def _skip(run: Run, step: int, norm: float) -> None:
    """Counts a skipped optimizer step, and raises NotFinite if too many were skipped in a row."""
    names = gather_objects(bad_gradient(run.model))
    name = next((name for name in names if name is not None), None)
    # Finite gradients may have squares that are not.
    what = f"the gradients' norm is {norm}" if name is None else f"the gradient of {name} is not"
    run.skipped.total += 1
    run.skipped.in_a_row += 1
    run.skipped.last = f"step {step + 1}: {what} finite, and the loss is"
    if run.skipped.in_a_row >= run.config.optim.max_skipped_steps:
        raise NotFinite(
            f"{run.skipped.last}; {run.skipped.in_a_row} optimizer steps in a row were skipped "
            "(optim.max_skipped_steps); look at the steps before in metrics.jsonl and at their "
            "rollouts in samples.jsonl; a higher --optim.max_skipped_steps continues regardless"
        )


def my_microbatches(run: Run, rollouts: Sequence[TrainExample]) -> list[list[TrainExample]]:
    """Returns this rank's micro-batches. All ranks have the same number; the last may be empty."""
    if not rollouts:
        return [[]]
    limit, padded = run.config.train.max_tokens_per_microbatch, run.attention == "padded"
    return plan_microbatches(rollouts, limit, run.world.size, padded=padded)[run.world.rank]


def score(
    run: Run,
    batch: TrainBatch,
    examples: Sequence[TrainExample],
    denominator: int,
    old_logprobs: Float[Tensor, " N"] | None = None,
) -> Scored:
    """Computes the loss of one micro-batch, and the differences between the trainer's and the
    sampler's log-probabilities of some of its tokens.

    denominator: number of rollouts or tokens of the whole step, on all ranks.
    old_logprobs: (N,) log-probabilities of the first update on these rollouts; None in that update.
    """
    span = run.timings.span
    second = second_passes(run, batch)
    with span("student"):
        student_states = hidden_states(run.model, batch.student, attention=run.attention)
    if run.recipe.second_pass is not None and not second:
        # No rollout here has a teacher view, so that the loss to the teacher has no rows.
        second = (SecondPass(student_states.detach()[:0], rollouts=()),)
    with span("loss"), autocast(run.model):
        inputs = LossInputs(
            student_hidden_states=student_states,
            lm_head_weight=lm_head_weight(run.model),
            second_passes=second,
            completion_ids=batch.completion_ids,
            cu_seqlens=batch.cu_seqlens,
            examples=examples,
            old_logprobs=old_logprobs,
            vocab_size=run.sampler.params.vocab_size,
            denominator=denominator,
        )
        output = run.recipe.loss(inputs)
        # Before the backward pass, which leaves a sharded head in pieces.
        head, params = lm_head_weight(run.model), run.sampler.params
        rollouts = [example.rollout for example in examples]
        differences = logprob_differences(student_states, head, rollouts, params)
    states = [("student", student_states.detach(), None)]
    states += [(run.recipe.second_pass or "", one.hidden_states, one.rollouts) for one in second]
    return Scored(output, states, differences)


def second_passes(run: Run, batch: TrainBatch) -> tuple[SecondPass, ...]:
    """Runs the recipe's second pass: the base's over the student's sequences, or that of each
    teacher over its own. None where no rollout has a teacher view."""
    if run.recipe.second_pass is None:
        return ()
    passes = []
    with run.timings.span("teacher"):
        if run.recipe.second_pass == "base":
            everything = ScoredSequences(tuple(range(len(batch.cu_seqlens) - 1)), batch.student)
            return (_score_with(run, run.base, everything),)
        _check_views(run, batch)
        for place, member in enumerate(run.teacher.members):
            if (scored := batch.teachers.get(place)) is not None:
                passes.append(_score_with(run, member, scored))
            elif run.is_sharded:
                # The other ranks may have rollouts for it, and gather its weights together.
                _score_with(run, member, _idle_sequences(run.world.device))
    return tuple(passes)


def _check_views(run: Run, batch: TrainBatch) -> None:
    viewed = {row for scored in batch.teachers.values() for row in scored.rollouts}
    shows, num_rollouts = run.recipe.context, len(batch.cu_seqlens) - 1
    may_lack = shows is not None and shows.is_optional
    assert may_lack or len(viewed) == num_rollouts, "the recipe made no view of a rollout"


def _score_with(run: Run, teacher: Teacher, scored: ScoredSequences) -> SecondPass:
    attention = teacher.attention or run.attention
    with teacher.scoring() as scorer:
        states = hidden_states(scorer, scored.sequences, attention=attention)
        head = None if scorer is run.model else lm_head_weight(scorer)
    return SecondPass(states, head, teacher.weight, scored.rollouts)


def _idle_sequences(device: torch.device) -> ScoredSequences:
    return ScoredSequences((), sequences_to(pack_sequences([(0,)], [(0,)]), device))
