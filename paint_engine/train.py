"""Trains a model with PAINT: `python -m paint_engine.train [--preset NAME] [--section.key value
...]`."""

import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
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
    avg_at_k,
    correct_matrix,
    evaluate,
    paired_bootstrap,
    pass_at_k,
)
from paint_engine.interrupt import Stopped, StopRequest
from paint_engine.masking import mask_ratio, mask_solution
from paint_engine.metrics import MetricsWriter, Progress, read_jsonl
from paint_engine.model import hidden_states, lm_head_weight
from paint_engine.prompts import encode_teacher_prompt
from paint_engine.report import write_report
from paint_engine.rollout import request_rng, request_seed, sample_rollouts, sampling_params
from paint_engine.samples import sample_records
from paint_engine.setup import Run, build_run, describe, learning_rate
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
    teacher_prompt_ids = encode_teacher_prompt(
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
        rollout, verdict.correct, verdict.error, alpha, rho, partial_solution, teacher_prompt_ids
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


def evaluate_at(run: Run, step: int, progress: Progress, stop: StopRequest) -> list[EvalSample]:
    """Avg@k's samples after `step` steps, from the run's file where that evaluation is complete."""
    assert run.eval_set is not None
    file = run.evaluation_file(step)
    if file.exists():
        return [EvalSample(**row) for row in read_jsonl(file)]
    section, started = run.config.eval, time.monotonic()
    done: list[bool] = []
    total = len(run.eval_set.problems) * section.num_samples
    with progress.evaluation(f"Avg@{section.num_samples} after {step} steps", total) as advance:

        def on_samples(group: list[EvalSample]) -> None:
            stop.check()
            done.extend(sample.correct for sample in group)
            advance(len(group), sum(done) / len(done))

        samples = evaluate(
            run.model,
            run.tokenizer,
            run.eval_set.problems,
            run.eval_set.prompts,
            section,
            seed=run.config.train.seed,
            max_sequences=section.max_sequences,
            on_samples=on_samples,
        )
    run.seconds_eval += time.monotonic() - started
    file.parent.mkdir(exist_ok=True)
    lines = "".join(json.dumps(asdict(sample)) + "\n" for sample in samples)
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(lines)
    unfinished.rename(file)
    return samples


def save(run: Run) -> Path:
    """A checkpoint of the last finished step."""
    state = {
        "step": run.step,
        "seconds_train": run.seconds_train,
        "seconds_eval": run.seconds_eval,
    }
    keep = run.config.checkpoint.keep
    return save_checkpoint(run.run_dir, run.model, run.optimizer, state, keep=keep)


def train(run: Run, progress: Progress, stop: StopRequest) -> None:
    """The loop, from the last finished step to the last one asked for, evaluations included."""
    config = run.config
    num_steps, section = config.train.num_steps, config.eval
    in_between = range(section.every, num_steps + 1, section.every) if section.every else ()
    if run.eval_set is not None and section.at_start and run.step == 0:
        evaluate_at(run, 0, progress, stop)
    writer = MetricsWriter(
        run.run_dir,
        tensorboard=config.run.tensorboard,
        wandb_project=config.run.wandb_project,
        config=config.model_dump(),
        resume_step=run.step,
    )
    with writer, progress.training(num_steps, run.step) as show:
        while run.step < num_steps:
            stop.check()
            evaluated = {}
            # Before the step whose rollouts come from the same weights, so that a stop in an
            # evaluation loses no step's metrics, and a resumed run begins with it again.
            if run.eval_set is not None and run.step in in_between:
                results = evaluate_at(run, run.step, progress, stop)
                evaluated = {"eval_avg_at_k": avg_at_k(correct_matrix(results))}
            metrics, samples = train_step(run, run.step)
            run.step += 1
            run.seconds_train += metrics["seconds"]
            writer.write(metrics | evaluated)
            for sample in samples:
                writer.write_sample(sample)
            show(metrics)
            if config.checkpoint.every and run.step % config.checkpoint.every == 0:
                save(run)
    save(run)
    if run.eval_set is not None and (section.at_end or num_steps in in_between):
        evaluate_at(run, num_steps, progress, stop)


def summarise(run: Run) -> dict[str, Any]:
    """`summary.json`: Avg@k before and after on the same problems, and what it took."""
    config = run.config
    correct: dict[str, np.ndarray] = {}
    problem_ids: list[list[str]] = []
    for moment, step in (("before", 0), ("after", config.train.num_steps)):
        file = run.evaluation_file(step)
        if file.exists():
            samples = [EvalSample(**row) for row in read_jsonl(file)]
            correct[moment] = correct_matrix(samples)
            problem_ids.append(list(dict.fromkeys(sample.problem_id for sample in samples)))
    # A resumed run may have been given another evaluation, whose problems cannot be paired.
    pairs = len(correct) == 2 and problem_ids[0] == problem_ids[1]
    paired = paired_bootstrap(correct["before"], correct["after"]) if pairs else None
    summary = {
        "avg_at_k_before": avg_at_k(correct["before"]) if "before" in correct else None,
        "avg_at_k_after": avg_at_k(correct["after"]) if "after" in correct else None,
        "paired_difference": paired.difference if paired else None,
        "paired_difference_ci95": [paired.low, paired.high] if paired else None,
        "pass_at_k_before": pass_at_k(correct["before"]) if "before" in correct else None,
        "pass_at_k_after": pass_at_k(correct["after"]) if "after" in correct else None,
        "num_problems": len(run.eval_set.problems) if run.eval_set else 0,
        "num_samples": config.eval.num_samples,
        "seconds": run.seconds_train + run.seconds_eval,
        "seconds_train": run.seconds_train,
        "seconds_eval": run.seconds_eval,
        "num_steps": run.step,
        "seed": config.train.seed,
        "preset": run.name,
        "run_dir": str(run.run_dir),
    }
    (run.run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def print_summary(console: Console, summary: dict[str, Any], report: Path) -> None:
    """What the run came to, in a few lines."""
    for moment in ("before", "after"):
        if (value := summary[f"avg_at_k_{moment}"]) is not None:
            label = f"Avg@{summary['num_samples']} {moment}:"
            console.print(f"{label:15}{value:.1%}  ({summary['num_problems']} held-out problems)")
    if summary["paired_difference"] is not None:
        low, high = (100 * bound for bound in summary["paired_difference_ci95"])
        difference = f"{100 * summary['paired_difference']:+.1f} points"
        console.print(f"difference:    {difference}  (95% interval {low:+.1f} to {high:+.1f})")
    console.print(
        f"time:          {summary['seconds']:.0f} s ({summary['seconds_train']:.0f} s for "
        f"{summary['num_steps']} steps, {summary['seconds_eval']:.0f} s for evaluation)"
    )
    console.print(f"run directory: {summary['run_dir']}\nreport:        {report}", soft_wrap=True)


def run_training(run: Run, console: Console) -> None:
    """Trains to the end, or to the user's stop; either way nothing that was finished is lost."""
    resume = f"go on with: python -m paint_engine.train --resume {run.run_dir}"
    try:
        with StopRequest() as stop:
            train(run, Progress(console), stop)
    except Stopped:
        checkpoint = save(run)
        console.print(
            f"stopped after step {run.step}; saved {checkpoint}\n{resume}", soft_wrap=True
        )
        sys.exit(130)
    except KeyboardInterrupt:
        checkpoints = list_checkpoints(run.run_dir)
        newest = checkpoints[-1].name if checkpoints else "none"
        console.print(f"interrupted; newest checkpoint: {newest}\n{resume}", soft_wrap=True)
        sys.exit(130)
    summary = summarise(run)
    print_summary(console, summary, write_report(run.run_dir))


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
    except ValueError as error:
        console.print(f"error: {error}", style="red", soft_wrap=True)
        sys.exit(2)
    if command.dry_run:
        console.print(describe(run), soft_wrap=True)
        return
    console.print(f"run directory: {run.run_dir}", soft_wrap=True)
    run_training(run, console)


if __name__ == "__main__":
    main()
