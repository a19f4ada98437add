"""The training loop: steps, evaluations and checkpoints, to the end or to a stop."""

import shlex
import signal
import sys
from contextlib import nullcontext
from functools import partial

from rich.console import Console

from paint_engine.checkpoint.save import list_checkpoints
from paint_engine.files import CONFIG_FILE
from paint_engine.monitor import Diverged, MetricsWriter, Progress, check_finite
from paint_engine.report import write_report
from paint_engine.rewards import RewardFailed
from paint_engine.rollout import EngineDied
from paint_engine.training.evaluations import evaluate_at
from paint_engine.training.interrupt import Stopped, StopRequest
from paint_engine.training.run import Run, SaveFailed, save
from paint_engine.training.step import train_step
from paint_engine.training.summary import print_summary, summarise


def open_writer(run: Run) -> MetricsWriter | None:
    """Opens the run's metrics and samples, truncated to the last finished step. Returns None on
    every rank but the main one."""
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
    """Runs the remaining steps, with the evaluations and checkpoints between them."""
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
            # An evaluation runs before the step that samples from the same weights. A stop during
            # it then loses no step, and a resumed run starts with it.
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
    """Trains to the end or until a signal.

    The first signal finishes the step and saves. A second Ctrl-C stops at once; the run then
    resumes from its newest checkpoint.
    """
    directory = shlex.quote(str(run.run_dir))
    say = partial(console.print, soft_wrap=True)
    one = run.world.size == 1
    launcher = "python" if one else f"torchrun --nproc-per-node {run.world.size}"
    resume = f"resume with: {launcher} -m paint_engine.train --resume {directory}"
    try:
        writer = open_writer(run)
        with writer or nullcontext():
            try:
                train(run, writer, Progress(console, run.recipe.display), stop)
            except Stopped as stopped:
                say(f"stopped after step {run.step}; saved {save(run)}\n{resume}")
                # A scheduler that takes the machine back is no failure; a user's Ctrl-C is 130.
                sys.exit(0 if stopped.signal_number == signal.SIGTERM else 130)
            except EngineDied as death:
                say(f"the rollout engine died ({death}); saved {save(run)}\n{resume}")
                sys.exit(1)
            if run.world.is_main:
                summary = summarise(run)
                print_summary(console, summary, write_report(run.run_dir, run.recipe))
    except (Diverged, SaveFailed, RewardFailed) as failure:
        say(f"error: {failure}", style="red")
        sys.exit(1)
    except KeyboardInterrupt:
        checkpoints = list_checkpoints(run.run_dir)
        if checkpoints:
            advice = f"newest checkpoint: {checkpoints[-1].name}; {resume}"
        else:
            again = f"--config {directory}/{CONFIG_FILE} --run.dir {directory} --run.overwrite true"
            advice = f"nothing is saved yet; start again with: python -m paint_engine.train {again}"
        say(f"interrupted; {advice}")
        sys.exit(130)
    finally:
        run.sampler.close()
        run.reward.close()
