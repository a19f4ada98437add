"""The training loop, and one step of it on one screen."""

import shlex
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

import torch
from rich.console import Console

from paint_engine.checkpoint.save import list_checkpoints
from paint_engine.checkpoint.weights import whole
from paint_engine.distributed import sum_gradients
from paint_engine.files import CONFIG_FILE
from paint_engine.model.packing import batch_to, build_batch
from paint_engine.model.sharding import sync_gradients
from paint_engine.monitor.metrics import Diverged, MetricsWriter, check_finite
from paint_engine.monitor.progress import Progress
from paint_engine.report.page import write_report
from paint_engine.rewards import RewardFailed
from paint_engine.rollout.engine import EngineDied
from paint_engine.seeds import request_seed
from paint_engine.training.evaluations import SaveFailed, evaluate_at, save
from paint_engine.training.interrupt import Stopped, StopRequest
from paint_engine.training.loss import score
from paint_engine.training.microbatches import plan_microbatches
from paint_engine.training.optim import learning_rate
from paint_engine.training.record import StepRecord
from paint_engine.training.rollouts import sample_step
from paint_engine.training.run import Run
from paint_engine.training.summary import print_summary, summarise
from paint_engine.types import PrivilegedRollout


def train_step(run: Run, step: int) -> tuple[dict[str, float], list[dict[str, object]]]:
    """One step on fresh rollouts: its metrics, and the samples to keep, of all ranks.

    step: from 0.
    """
    # ---------------------------------------------------------------------------------------------
    config, started, span = run.config, time.monotonic(), run.timings.span
    rollouts, lag = sample_step(run, step)
    record, sampled = StepRecord(config, step, rollouts), time.monotonic()
    rate = grad_norm = 0.0

    microbatches = my_microbatches(run, record.trained)
    for number in range(config.num_updates):
        # Dropout, where there is any, is in the student's pass alone and repeats when resumed.
        torch.manual_seed(request_seed("dropout", config.train.seed, step, run.world.rank))
        run.model.train()
        for place, items in enumerate(microbatches):
            # A rank without rollouts runs one at weight zero: sharded weights need every rank.
            shown = items or rollouts[:1]
            batch = batch_to(build_batch(shown), run.world.device)
            sync_gradients(run.model, last=place == len(microbatches) - 1)
            old_logprobs = record.old_logprobs.get(place)
            output, differences = score(run, batch, shown, record.denominator, old_logprobs)
            with span("backward"):
                (output.loss if items else 0.0 * output.loss).backward()
            if items:
                record.add(items, output)
            if items and number == 0:
                record.add_first(place, items, output, differences, run.tokenizer)
        with span("optimizer"):
            rate, grad_norm = update(run, step)
    # ---------------------------------------------------------------------------------------------
    metrics, samples, finished = record.metrics(), record.samples(), time.monotonic()
    return {
        "step": step + 1,
        **metrics,
        "rollout_lag": lag,
        "grad_norm": grad_norm,
        "learning_rate": rate,
        "tokens_per_s": record.num_tokens / (finished - started),
        "seconds": finished - started,
        "seconds_rollout": sampled - started,
        "seconds_update": finished - sampled,
    }, samples


def update(run: Run, step: int) -> tuple[float, float]:
    """One optimizer step on all ranks' gradients: the learning rate, and the gradients' L2 norm
    before they were scaled to `optim.max_grad_norm`."""
    rate = learning_rate(run.config.optim, step, run.config.train.num_steps)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    sum_gradients(run.parameters)
    norm = torch.nn.utils.clip_grad_norm_(run.parameters, run.config.optim.max_grad_norm)
    run.optimizer.step()
    run.teacher.update()
    run.optimizer.zero_grad()
    run.model.eval()
    return rate, whole(norm).item()


def my_microbatches(
    run: Run, rollouts: Sequence[PrivilegedRollout]
) -> list[list[PrivilegedRollout]]:
    """This rank's micro-batches of the step, as many as every rank's; the last may be empty."""
    if not rollouts:
        return [[]]
    limit, padded = run.config.train.max_tokens_per_microbatch, run.attention == "padded"
    return plan_microbatches(rollouts, limit, run.world.size, padded=padded)[run.world.rank]


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
                train(run, writer, Progress(console, run.config.objective.divergence), stop)
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
    except (Diverged, SaveFailed, RewardFailed) as failure:
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
        run.reward.close()
