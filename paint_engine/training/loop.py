"""The training loop: steps, evaluations and checkpoints, to the end or to a stop."""

import shlex
import signal
import sys
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from typing import Any

from paint_engine.checkpoint.directory import checkpoint_step, list_checkpoints
from paint_engine.checkpoint.push import push_adapter
from paint_engine.checkpoint.run_dir import resume_again, start_again
from paint_engine.contexts import ContextFailed
from paint_engine.distributed import gather_objects, together
from paint_engine.files import FILE_FAILURES, LockLost, ReadFailed, WriteFailed
from paint_engine.files.terminal import Terminal
from paint_engine.model import hub_commit
from paint_engine.monitor import MetricsWriter, NotFinite, Progress, check_finite
from paint_engine.prompts.template import BadTemplate
from paint_engine.report.page import write_report
from paint_engine.rewards import RewardFailed
from paint_engine.rollout import EngineDied
from paint_engine.training.evaluations import evaluate_at, evaluate_finally
from paint_engine.training.finite import bad_weight, largest_weight
from paint_engine.training.interrupt import Stopped, StopRequest
from paint_engine.training.run import Run, SaveFailed, StepNotRecorded, save
from paint_engine.training.step import train_step
from paint_engine.training.summary import (
    evaluation_metrics,
    evaluation_samples,
    present_evaluations,
    print_summary,
    summarise,
)


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

    def evaluate_after(step: int) -> None:
        evaluate_at(run, step, progress, stop)
        record_evaluation(run, writer, step)

    if run.eval_sets and section.at_start:
        evaluate_after(0)
    with progress.training(num_steps, run.step) as show:
        while run.step < num_steps:
            stop.check_together()
            # An evaluation runs before the step that samples from the same weights. A stop during
            # it then loses no step, and a resumed run starts with it.
            if run.eval_sets and section.is_evaluated(run.step, num_steps):
                evaluate_after(run.step)
            metrics, samples = train_step(run, run.step)
            check_finite(metrics)
            record_step(run, writer, metrics, samples)
            run.step += 1
            run.seconds_train += metrics["seconds"]
            if run.skipped.in_a_row:
                progress.note(f"{run.skipped.last}: its optimizer step was skipped")
            for shortening in run.shortening.found[-1:]:
                if shortening.step == run.step:
                    progress.note(f"note: {shortening.note}")
            show(metrics)
            if checkpoint.every and run.step % checkpoint.every == 0:
                save(run)
    save(run)
    if run.eval_sets and section.is_evaluated(num_steps, num_steps):
        evaluate_after(num_steps)
        if section.final is not None:
            evaluate_finally(run, progress, stop)


def record_step(
    run: Run,
    writer: MetricsWriter | None,
    metrics: dict[str, float],
    samples: list[dict[str, object]],
) -> None:
    """Writes a step's metrics and samples. A collective: raises StepNotRecorded on every rank, and
    LockLost."""
    try:
        run.check_lock()
        together(lambda: writer and writer.write(metrics, samples), (WriteFailed,))
    except WriteFailed as failure:
        raise StepNotRecorded(str(failure)) from failure


def record_evaluation(run: Run, writer: MetricsWriter | None, step: int) -> None:
    """Writes the metrics of the evaluation after `step` steps, unless they are written already. A
    collective: raises WriteFailed, ReadFailed and BadFile on every rank, and LockLost.

    That of the base is absent if the run could not evaluate it any more.
    """
    run.check_lock()

    def write() -> None:
        if writer is not None and (found := present_evaluations(run).get(step)) is not None:
            problems = {name: held_out.problems for name, held_out in run.eval_sets.items()}
            shown = evaluation_samples(found, problems, run.config.run.samples_per_evaluation)
            writer.write_evaluation(evaluation_metrics(step, found), shown)

    together(write, FILE_FAILURES)


def _launcher(run: Run) -> str:
    one = run.world.size == 1
    launcher = "python" if one else f"torchrun --nproc-per-node {run.world.size}"
    return f"{launcher} -m paint_engine.train"


def _resume_with(run: Run) -> str:
    return f"resume with: {_launcher(run)} {resume_again(run.run_dir, run.config)}"


def what_is_safe(run: Run) -> tuple[str, ...]:
    """What of the run is on the disk, and how to resume it, as a line or two."""
    try:
        checkpoints = list_checkpoints(run.run_dir)
    except ReadFailed as failure:
        return ("safe: what was saved before", str(failure))
    if not checkpoints:
        again = f"{_launcher(run)} {start_again(run.run_dir, run.config)}"
        return (
            "no checkpoint is saved yet; the finished answers of evaluations are; start again "
            f"with: {again}",
        )
    saved = checkpoint_step(checkpoints[-1])
    later = f"; {run.step - saved} later steps are lost" if run.step > saved else ""
    return (
        f"safe: all {saved} steps up to the newest checkpoint: {checkpoints[-1].name}, and the "
        f"finished answers of evaluations{later}",
        _resume_with(run),
    )


def explain_weights(run: Run) -> str:
    """What the weights are like after a value was not finite. A collective."""
    bad = next(filter(None, gather_objects(bad_weight(run.model, trained=False))), None)
    if bad is not None:
        return f"the weight {bad} is not finite"
    size, name = max(gather_objects(largest_weight(run.model)))
    return f"all weights are finite; the largest of the trained ones is {size:.3g}, in {name}"


def finish(run: Run, writer: MetricsWriter, console: Terminal) -> None:
    """Writes and prints the summary, and writes and logs the report. For the main rank.

    Training is over and saved by then: a report that cannot be made, as of records that were
    changed while the run was stopped, is a message and no failure of the run.
    """
    summary, report = summarise(run), None
    try:
        report = write_report(run.run_dir, run.recipe)
    except (ValueError, ArithmeticError, ReadFailed) as error:
        again = f"python -m paint_engine.report {shlex.quote(str(run.run_dir))}"
        console.say(
            f"note: no report was made: {error}; the run is finished and saved; then make the "
            f"report with: {again}"
        )
    print_summary(console, summary, report)
    if report is not None:
        writer.add_report(report)
    if run.config.run.push_to_hub is not None:
        console.say(push(run, run.config.run.push_to_hub, summary))


def push(run: Run, repo: str, summary: Mapping[str, Any]) -> str:
    """Pushes the adapter of a finished run to the hub. Returns a line for the console."""
    config = run.config
    facts = {
        "recipe": config.objective.name,
        "rollouts per step": str(config.train.batch_size),
        "learning rate": str(config.optim.learning_rate),
        "seed": str(config.train.seed),
    }
    for moment in ("before", "after"):
        if (value := summary[f"avg_at_k_{moment}"]) is not None:
            facts[f"Avg@{summary['num_samples']} {moment}"] = (
                f"{value:.1%} of {summary['num_problems']} held-out problems"
            )
    base = config.model.model_copy(update={"revision": hub_commit(config.model)})
    return push_adapter(run.run_dir, base, repo, run.run_dir.resolve().name, facts)


def run_training(run: Run, console: Terminal, stop: StopRequest) -> None:
    """Trains to the end or until a signal.

    The first signal finishes the step and saves. A second Ctrl-C stops at once; the run then
    resumes from its newest checkpoint. What cannot continue ends the program with one message, what
    is safe, how to resume, and exit code 1.
    """
    say = console.say
    resume = _resume_with(run)
    try:
        writer = together(lambda: open_writer(run), FILE_FAILURES)
        with writer or nullcontext():
            try:
                train(run, writer, Progress(console, run.recipe.display), stop)
            except Stopped as stopped:
                say(f"stopped after step {run.step}; saved {save(run)}", resume)
                # A scheduler that takes the machine back is no failure; a user's Ctrl-C is 130.
                sys.exit(0 if stopped.signal_number == signal.SIGTERM else 130)
            except EngineDied as death:
                say(f"{death.part} failed ({death}); saved {save(run)}", resume)
                sys.exit(1)
            except BadTemplate as failure:
                say(f"error: {failure}; saved {save(run)}", resume, style="red")
                sys.exit(1)
            except WriteFailed:
                # Perhaps of another disk, such as the shared memory that vLLM reads.
                with suppress(SaveFailed):
                    save(run)
                raise
            run.check_lock()
            together(lambda: writer and finish(run, writer, console), FILE_FAILURES)
    except LockLost as lost:
        say(f"error: {lost}", style="red")
        sys.exit(1)
    except NotFinite as failure:
        say(f"error: {failure}; {explain_weights(run)}", *what_is_safe(run), style="red")
        sys.exit(1)
    except (SaveFailed, StepNotRecorded, RewardFailed, ContextFailed, *FILE_FAILURES) as failure:
        say(f"error: {failure}", *what_is_safe(run), style="red")
        sys.exit(1)
    except KeyboardInterrupt:
        first, *others = what_is_safe(run)
        say(f"interrupted; {first}", *others)
        sys.exit(130)
    finally:
        run.sampler.close()
        run.reward.close()
        if run.lock is not None:
            run.lock.release()
