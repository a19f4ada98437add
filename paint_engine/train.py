"""Trains a model with PAINT: `python -m paint_engine.train [--preset NAME] [--section.key value
...]`."""

import os
import shlex
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain
from operator import itemgetter

import torch
from rich.console import Console
from torch import Tensor
from transformers.utils import logging as transformers_logging

from paint_engine import objectives
from paint_engine.anchors import overlap
from paint_engine.batch import batch_to, build_batch, plan_microbatches
from paint_engine.checkpoint import list_checkpoints
from paint_engine.cli import load_config, user_errors
from paint_engine.config_toml import to_toml
from paint_engine.distributed import (
    barrier,
    close_world,
    gather_objects,
    init_world,
    merge_shares,
    sum_gradients,
    sum_over_ranks,
)
from paint_engine.interrupt import Stopped, StopRequest
from paint_engine.masking import mask_ratio, mask_solution
from paint_engine.metrics import Diverged, MetricsWriter, Progress, check_finite
from paint_engine.mismatch import logprob_differences, mismatch_metrics
from paint_engine.model import autocast, hidden_states, lm_head_weight, pick_device, sync_gradients
from paint_engine.problem_sets import step_requests
from paint_engine.prompts import encode_teacher_prompt
from paint_engine.report import CONFIG_FILE, write_report
from paint_engine.rollout import EngineDied, request_rng, request_seed, to_rollout
from paint_engine.run_eval import SaveFailed, evaluate_at, save
from paint_engine.samples import sample_records
from paint_engine.setup import Run, build_run, learning_rate, plan_run
from paint_engine.summary import print_summary, summarise
from paint_engine.types import PrivilegedRollout, Rollout, TrainBatch
from paint_engine.verify import check_answer
from paint_engine.weights import whole


def reveal(run: Run, rollout: Rollout, step: int, index: int) -> PrivilegedRollout:
    """What the teacher sees for one rollout: more of the solution is hidden the more it
    overlaps."""
    masking, prompts, problem = run.config.masking, run.config.prompts, rollout.problem
    verdict = check_answer(problem.answer, rollout.text)
    alpha = overlap(rollout.text, problem.solution)
    rho = mask_ratio(alpha, masking.rho_wrong, masking.rho_correct)
    partial_solution = mask_solution(
        problem.solution,
        rho,
        placement=masking.placement,
        generator=request_rng("mask", run.config.train.seed, step, problem.problem_id, index),
        marker=masking.marker,
    )
    teacher_prompt_ids, shown = encode_teacher_prompt(
        run.tokenizer,
        problem,
        partial_solution,
        prompts.instruction,
        thinking=prompts.teacher_thinking,
        suffix=prompts.teacher_suffix,
        max_tokens=run.max_teacher_prompt,
        marker=masking.marker,
    )
    return PrivilegedRollout(
        rollout, verdict.correct, verdict.error, alpha, rho, shown, teacher_prompt_ids
    )


def sample_step(run: Run, step: int) -> tuple[list[PrivilegedRollout], int]:
    """The step's problems, one rollout each from the student, and the teacher's view of each: all
    ranks', in the batch's order. And how many steps old the student's weights were."""
    sampled = run.sampler.take(step, run.config.train.num_steps)
    mine = []
    requests = step_requests(run.config, run.train_set, step, run.world)
    for (i, problem, prompt, _), completion in zip(requests, sampled.completions, strict=True):
        mine.append(reveal(run, to_rollout(run.tokenizer, problem, prompt, completion), step, i))
    return merge_shares(gather_objects(mine)), step - sampled.weights_version


def train_step(run: Run, step: int) -> tuple[dict[str, float], list[dict[str, object]]]:
    """One optimizer step on fresh rollouts: its metrics, and the samples to keep, of all ranks.

    step: from 0.
    """
    # ---------------------------------------------------------------------------------------------
    config, started, span = run.config, time.monotonic(), run.timings.span
    privileged, lag = sample_step(run, step)
    kept = privileged[: config.run.samples_per_step]
    num_tokens = sum(len(p.rollout.completion_ids) for p in privileged)
    per_rollout = config.objective.reduction == "sequence_mean"
    denominator = len(privileged) if per_rollout else num_tokens
    sums: Counter[str] = Counter()
    samples: list[dict[str, object]] = []
    differences: list[Tensor] = []
    sampled = time.monotonic()

    # Dropout, where there is any, is in the student's pass alone and repeats when resumed.
    torch.manual_seed(request_seed("dropout", config.train.seed, step, run.world.rank))
    run.model.train()
    microbatches = my_microbatches(run, privileged)
    for place, items in enumerate(microbatches):
        # A rank without rollouts runs one at weight zero: sharded weights need every rank.
        batch = batch_to(build_batch(items or privileged[:1]), run.world.device)
        sync_gradients(run.model, last=place == len(microbatches) - 1)
        output, found = score(run, batch, items, denominator)
        differences += found
        with span("backward"):
            (output.loss if items else 0.0 * output.loss).backward()
        if items:
            sums.update(objectives.metric_sums(output))
            samples += sample_records(step + 1, items, kept, output, run.tokenizer)

    with span("optimizer"):
        rate, grad_norm = update(run, step)
    # ---------------------------------------------------------------------------------------------
    totals = sum_over_ranks(sums)
    mismatch = mismatch_metrics(gather_objects([d for part in differences for d in part.tolist()]))
    finished = time.monotonic()
    return {
        "step": step + 1,
        "loss": totals.pop("loss"),
        **{name: total / num_tokens for name, total in totals.items()},
        **rollout_metrics(privileged),
        "rollout_lag": lag,
        **mismatch,
        "grad_norm": grad_norm,
        "learning_rate": rate,
        "num_loss_tokens": num_tokens,
        "tokens_per_s": num_tokens / (finished - started),
        "seconds": finished - started,
        "seconds_rollout": sampled - started,
        "seconds_update": finished - sampled,
    }, sorted(chain.from_iterable(gather_objects(samples)), key=itemgetter("place"))


def score(
    run: Run, batch: TrainBatch, items: Sequence[PrivilegedRollout], denominator: int
) -> tuple[objectives.PaintLossOutput, list[Tensor]]:
    """The loss of one micro-batch, and by how much the sampler's log-probabilities of its items are
    off.

    denominator: rollouts or tokens of the whole step, of all ranks.
    """
    span = run.timings.span
    with span("teacher"), run.teacher.scoring() as scorer:
        teacher_states = hidden_states(scorer, batch.teacher, attention=run.attention)
        teacher_head = None if scorer is run.model else lm_head_weight(scorer)
    with span("student"):
        student_states = hidden_states(run.model, batch.student, attention=run.attention)
    with span("loss"), autocast(run.model):
        output = objectives.paint(
            student_states,
            teacher_states,
            lm_head_weight(run.model),
            batch.cu_seqlens,
            run.config.objective,
            teacher_lm_head_weight=teacher_head,
            vocab_size=len(run.tokenizer),
            denominator=denominator,
        )
        found = logprob_differences(
            student_states, lm_head_weight(run.model), items, run.sampler.params
        )
    return output, found


def update(run: Run, step: int) -> tuple[float, float]:
    """One optimizer step on all ranks' gradients: the learning rate, and the gradients' L2 norm
    before they were scaled to `optim.max_grad_norm`."""
    rate = learning_rate(run.config.optim, step, run.config.train.num_steps)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    sum_gradients(run.parameters)
    norm = torch.nn.utils.clip_grad_norm_(run.parameters, run.config.optim.max_grad_norm)
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.model.eval()
    return rate, whole(norm).item()


def my_microbatches(
    run: Run, privileged: Sequence[PrivilegedRollout]
) -> list[list[PrivilegedRollout]]:
    """This rank's micro-batches of the step, as many as every rank's; the last may be empty."""
    limit, padded = run.config.train.max_tokens_per_microbatch, run.attention == "padded"
    return plan_microbatches(privileged, limit, run.world.size, padded=padded)[run.world.rank]


def rollout_metrics(privileged: Sequence[PrivilegedRollout]) -> dict[str, float]:
    """Means over the step's rollouts of what the loss does not see."""
    count = len(privileged)
    return {
        "overlap": sum(p.overlap for p in privileged) / count,
        "mask_ratio": sum(p.mask_ratio for p in privileged) / count,
        "accuracy": sum(p.correct for p in privileged) / count,
        "truncation_rate": sum(p.rollout.truncated for p in privileged) / count,
        "completion_length": sum(len(p.rollout.completion_ids) for p in privileged) / count,
        "checker_errors": sum(p.check_error is not None for p in privileged),
    }


def open_writer(run: Run) -> MetricsWriter | None:
    """The run's metrics and samples, cut back to the last finished step. Only the main rank has
    one."""
    if not run.world.is_main:
        return None
    return MetricsWriter(
        run.run_dir,
        tensorboard=run.config.run.tensorboard,
        wandb_project=run.config.run.wandb_project,
        config=run.config.model_dump(),
        resume_step=run.step,
    )


def train(run: Run, writer: MetricsWriter | None, progress: Progress, stop: StopRequest) -> None:
    """The loop, from the last finished step to the last one asked for, evaluations included."""
    num_steps, section, checkpoint = (
        run.config.train.num_steps,
        run.config.eval,
        run.config.checkpoint,
    )
    evaluated = set(range(section.every, num_steps + 1, section.every)) if section.every else set()
    evaluated |= {num_steps} if section.at_end else set()
    if run.eval_set is not None and section.at_start:
        evaluate_at(run, 0, progress, stop)
    with progress.training(num_steps, run.step) as show:
        while run.step < num_steps:
            stop.check_together()
            # Before the step whose rollouts come from the same weights, so that a stop in an
            # evaluation loses no step, and a resumed run begins with it again.
            if run.eval_set is not None and run.step in evaluated:
                evaluate_at(run, run.step, progress, stop)
            metrics, samples = train_step(run, run.step)
            check_finite(metrics)
            run.step += 1
            run.seconds_train += metrics["seconds"]
            if writer is not None:
                writer.write(metrics)
                for sample in samples:
                    writer.write_sample(sample)
            show(metrics)
            if checkpoint.every and run.step % checkpoint.every == 0:
                save(run)
    save(run)
    if run.eval_set is not None and num_steps in evaluated:
        evaluate_at(run, num_steps, progress, stop)


def run_training(run: Run, console: Console, stop: StopRequest) -> None:
    """Trains to the end, or to a stop; either way nothing that was finished is lost."""
    directory = shlex.quote(str(run.run_dir))
    say = partial(console.print, soft_wrap=True)
    one = run.world.size == 1
    launcher = "python" if one else f"torchrun with {run.world.size} processes,"
    resume = f"go on with: {launcher} -m paint_engine.train --resume {directory}"
    try:
        writer = open_writer(run)
        with writer or nullcontext():
            try:
                train(run, writer, Progress(console), stop)
            except Stopped as stopped:
                say(f"stopped after step {run.step}; saved {save(run)}\n{resume}")
                # A scheduler that takes the machine back is no failure; a user's Ctrl-C is 130.
                sys.exit(0 if stopped.signal_number == signal.SIGTERM else 130)
            except EngineDied as death:
                say(f"the rollout engine died ({death}); saved {save(run)}\nthen {resume}")
                sys.exit(1)
            if run.world.is_main:
                summary = summarise(run)
                print_summary(console, summary, write_report(run.run_dir))
    except (Diverged, SaveFailed) as failure:
        say(f"error: {failure}", style="red")
        sys.exit(1)
    except KeyboardInterrupt:
        checkpoints = list_checkpoints(run.run_dir)
        if checkpoints:
            advice = f"newest checkpoint: {checkpoints[-1].name}; --resume {directory}"
        else:
            again = f"--config {directory}/{CONFIG_FILE} --run.dir {directory} --run.overwrite true"
            advice = (
                f"nothing was saved yet; start again with: python -m paint_engine.train {again}"
            )
        say(f"interrupted; {advice}")
        sys.exit(130)
    finally:
        run.sampler.close()


def main(argv: Sequence[str] | None = None) -> None:
    """Build in order, then the loop. A mistake of the user's ends with one message and exit code
    2."""
    rank = int(os.environ.get("RANK", "0"))
    console = Console(highlight=False, markup=False, quiet=rank > 0)
    transformers_logging.disable_progress_bar()
    # peft asks models of transformers for an attribute that has been renamed there.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    with user_errors(console, rank):
        command = load_config(sys.argv[1:] if argv is None else argv)
        if command.print_config:
            console.print(to_toml(command.config), soft_wrap=True, end="")
            return
        if command.dry_run:
            plan_run(command, partial(console.print, soft_wrap=True))
            return
    # From here on, so that a scheduler's signal while the model is loaded is not lost.
    with StopRequest() as stop:
        with user_errors(console, rank):
            run = build_run(command, init_world(pick_device(command.config.train.device)))
        console.print(f"run directory: {run.run_dir}", soft_wrap=True)
        stop.begin()
        run_training(run, console, stop)
    # The others wait for what the main rank still writes: none leaves the group under another.
    barrier()


if __name__ == "__main__":
    try:
        main()
    finally:
        close_world()
