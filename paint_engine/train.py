"""Trains a model with PAINT: `python -m paint_engine.train [--preset NAME] [--section.key value
...]`."""

import shlex
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from paint_engine import objectives
from paint_engine.anchors import overlap
from paint_engine.batch import batch_to, build_batch, split_microbatches
from paint_engine.checkpoint import list_checkpoints, save_checkpoint
from paint_engine.cli import load_config
from paint_engine.config import to_toml
from paint_engine.data import batch_indices
from paint_engine.evaluate import (
    EvalSample,
    Evaluation,
    evaluate,
    evaluation_settings,
    read_evaluations,
    write_evaluation,
)
from paint_engine.interrupt import Stopped, StopRequest
from paint_engine.masking import mask_ratio, mask_solution
from paint_engine.metrics import MetricsWriter, Progress
from paint_engine.model import hidden_states, lm_head_weight
from paint_engine.prompts import encode_teacher_prompt
from paint_engine.report import CONFIG_FILE, write_report
from paint_engine.rollout import request_rng, request_seed, sample_rollouts, sampling_params
from paint_engine.samples import sample_records
from paint_engine.setup import Run, build_run, describe, learning_rate
from paint_engine.summary import print_summary, summarise
from paint_engine.types import PrivilegedRollout, Rollout
from paint_engine.verify import check_answer


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


def sample_step(run: Run, step: int) -> list[PrivilegedRollout]:
    """The step's problems, one rollout each from the current student, and the teacher's view of
    each."""
    config, seed = run.config, run.config.train.seed
    indices = batch_indices(len(run.train_set.problems), config.train.batch_size, seed, step)
    problems = [run.train_set.problems[i] for i in indices]
    rollouts = sample_rollouts(
        run.model,
        run.tokenizer,
        problems,
        [run.train_set.prompts[i] for i in indices],
        [request_seed("rollout", seed, step, p.problem_id, i) for i, p in enumerate(problems)],
        sampling_params(config.rollout, run.model, run.tokenizer),
        max_sequences=config.rollout.max_sequences,
    )
    return [reveal(run, rollout, step, i) for i, rollout in enumerate(rollouts)]


def train_step(run: Run, step: int) -> tuple[dict[str, float], list[dict[str, object]]]:
    """One optimizer step on fresh rollouts: its metrics, and the samples to keep.

    step: from 0.
    """
    # ---------------------------------------------------------------------------------------------
    config, started = run.config, time.monotonic()
    privileged = sample_step(run, step)
    kept = privileged[: config.run.samples_per_step]
    num_tokens = sum(len(p.rollout.completion_ids) for p in privileged)
    per_rollout = config.objective.reduction == "sequence_mean"
    sums: Counter[str] = Counter()
    samples: list[dict[str, object]] = []
    sampled = time.monotonic()

    # Dropout, where there is any, is in the student's pass alone and repeats when resumed.
    torch.manual_seed(request_seed("dropout", config.train.seed, step))
    run.model.train()
    for items in split_microbatches(privileged, config.train.max_tokens_per_microbatch):
        batch = batch_to(build_batch(items), run.device)
        with run.teacher.scoring() as scorer:
            teacher_states = hidden_states(scorer, batch.teacher, attention=run.attention)
            teacher_head = None if scorer is run.model else lm_head_weight(scorer)
        output = objectives.paint(
            hidden_states(run.model, batch.student, attention=run.attention),
            teacher_states,
            lm_head_weight(run.model),
            batch.cu_seqlens,
            config.objective,
            teacher_lm_head_weight=teacher_head,
            vocab_size=len(run.tokenizer),
            denominator=len(privileged) if per_rollout else num_tokens,
        )
        output.loss.backward()
        sums.update(objectives.metric_sums(output))
        samples += sample_records(step + 1, items, kept, output, run.tokenizer)

    rate = learning_rate(config.optim, step, config.train.num_steps)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    grad_norm = torch.nn.utils.clip_grad_norm_(run.parameters, config.optim.max_grad_norm)
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.model.eval()
    # ---------------------------------------------------------------------------------------------
    finished = time.monotonic()
    return {
        "step": step + 1,
        "loss": sums.pop("loss"),
        **{name: total / num_tokens for name, total in sums.items()},
        **rollout_metrics(privileged),
        "grad_norm": grad_norm.item(),
        "learning_rate": rate,
        "num_loss_tokens": num_tokens,
        "tokens_per_s": num_tokens / (finished - started),
        "seconds": finished - started,
        "seconds_rollout": sampled - started,
        "seconds_update": finished - sampled,
    }, samples


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


def evaluate_at(run: Run, step: int, progress: Progress, stop: StopRequest) -> None:
    """Avg@k of the weights after `step` steps: the current ones, or the base at step 0.

    An evaluation that the run has already finished with these settings is kept.
    """
    assert run.eval_set is not None and step in (0, run.step)
    section, started = run.config.eval, time.monotonic()
    settings = evaluation_settings(section, run.config.train.seed)
    known = read_evaluations(run.run_dir).get(step)
    if known is not None and known.settings == settings:
        return
    done: list[bool] = []
    total = len(run.eval_set.problems) * section.num_samples
    with ExitStack() as stack:
        title = f"Avg@{section.num_samples} after {step} steps"
        advance = stack.enter_context(progress.evaluation(title, total))
        base = step == 0 and run.step > 0
        model = stack.enter_context(run.teacher.scoring()) if base else run.model

        def on_samples(group: list[EvalSample]) -> None:
            done.extend(sample.correct for sample in group)
            advance(len(group), sum(done) / len(done))
            if len(done) < total:
                stop.check()

        samples = evaluate(
            model,
            run.tokenizer,
            run.eval_set.problems,
            run.eval_set.prompts,
            section,
            seed=run.config.train.seed,
            on_samples=on_samples,
        )
    seconds = time.monotonic() - started
    write_evaluation(run.run_dir, Evaluation(step, settings, seconds, samples))


def save(run: Run) -> Path:
    """A checkpoint of the last finished step."""
    state = {"step": run.step, "seconds_train": run.seconds_train}
    keep = run.config.checkpoint.keep
    return save_checkpoint(run.run_dir, run.model, run.optimizer, state, keep=keep)


def open_writer(run: Run) -> MetricsWriter:
    """The run's metrics and samples, cut back to the last finished step."""
    return MetricsWriter(
        run.run_dir,
        tensorboard=run.config.run.tensorboard,
        wandb_project=run.config.run.wandb_project,
        config=run.config.model_dump(),
        resume_step=run.step,
    )


def train(run: Run, writer: MetricsWriter, progress: Progress, stop: StopRequest) -> None:
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
            stop.check()
            # Before the step whose rollouts come from the same weights, so that a stop in an
            # evaluation loses no step, and a resumed run begins with it again.
            if run.eval_set is not None and run.step in evaluated:
                evaluate_at(run, run.step, progress, stop)
            metrics, samples = train_step(run, run.step)
            run.step += 1
            run.seconds_train += metrics["seconds"]
            writer.write(metrics)
            for sample in samples:
                writer.write_sample(sample)
            show(metrics)
            if checkpoint.every and run.step % checkpoint.every == 0:
                save(run)
    save(run)
    if run.eval_set is not None and num_steps in evaluated:
        evaluate_at(run, num_steps, progress, stop)


def run_training(run: Run, writer: MetricsWriter, console: Console) -> None:
    """Trains to the end, or to the user's stop; either way nothing that was finished is lost."""
    command = "python -m paint_engine.train"
    directory = shlex.quote(str(run.run_dir))
    try:
        with writer, StopRequest() as stop:
            try:
                train(run, writer, Progress(console), stop)
            except Stopped:
                saved = save(run)
                console.print(
                    f"stopped after step {run.step}; saved {saved}\n"
                    f"go on with: {command} --resume {directory}",
                    soft_wrap=True,
                )
                sys.exit(130)
            summary = summarise(run)
            print_summary(console, summary, write_report(run.run_dir))
    except KeyboardInterrupt:
        checkpoints = list_checkpoints(run.run_dir)
        if checkpoints:
            advice = f"newest checkpoint: {checkpoints[-1].name}; --resume {directory}"
        else:
            again = f"--config {directory}/{CONFIG_FILE} --run.dir {directory} --run.overwrite true"
            advice = f"nothing was saved yet; start again with: {command} {again}"
        console.print(f"interrupted; {advice}", soft_wrap=True)
        sys.exit(130)


def main(argv: Sequence[str] | None = None) -> None:
    """Build in order, then the loop. A mistake of the user's ends with one message and exit code
    2."""
    console = Console(highlight=False, markup=False)
    transformers_logging.disable_progress_bar()
    # peft asks models of transformers for an attribute that has been renamed there.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    try:
        command = load_config(sys.argv[1:] if argv is None else argv)
        if command.print_config:
            console.print(to_toml(command.config), soft_wrap=True, end="")
            return
        run = build_run(command)
        if command.dry_run:
            console.print(describe(run), soft_wrap=True)
            return
        writer = open_writer(run)
    except ValueError as error:
        console.print(f"error: {error}", style="red", soft_wrap=True)
        sys.exit(2)
    console.print(f"run directory: {run.run_dir}", soft_wrap=True)
    run_training(run, writer, console)


if __name__ == "__main__":
    main()
