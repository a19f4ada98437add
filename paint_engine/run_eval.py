"""Evaluations while a run trains, and the checkpoints that it writes: the best among them."""

import time
from contextlib import suppress
from pathlib import Path

from paint_engine.checkpoint import save_checkpoint
from paint_engine.checkpoint_files import mark_best
from paint_engine.distributed import any_rank, gather_objects, merge_shares
from paint_engine.evaluate import (
    EvalSample,
    Evaluation,
    evaluate,
    evaluation_settings,
    my_requests,
    read_evaluations,
    write_evaluation,
)
from paint_engine.interrupt import Stopped, StopRequest
from paint_engine.metrics import Progress
from paint_engine.setup import Run
from paint_engine.summary import best_step


class SaveFailed(Exception):
    """A checkpoint could not be written, for want of room for one; older ones are intact."""


def evaluate_at(run: Run, step: int, progress: Progress, stop: StopRequest) -> None:
    """Avg@k of the weights after `step` steps: the current ones, or the base at step 0.

    An evaluation that the run has already finished with these settings is kept. The weights are
    saved before, for a long evaluation may be cut short, and marked where none were better.
    """
    assert run.eval_set is not None and step in (0, run.step)
    section, started = run.config.eval, time.monotonic()
    settings = evaluation_settings(section, run.config.train.seed)
    known = gather_objects(step in finished_evaluations(run, settings))[0]
    if known:
        return
    base = step == 0 and run.step > 0
    if step > 0:
        save(run)
    if not base:
        run.sampler.sync(step)
    samples = run.sampler.guarded(lambda: answer_all(run, step, base, progress, stop))
    if any_rank(samples is None):
        stop.check_together()
    assert samples is not None
    everything = merge_shares(gather_objects(samples))
    if run.world.is_main:
        seconds = time.monotonic() - started
        write_evaluation(run.run_dir, Evaluation(step, settings, seconds, everything))
    keep_best(run, step, settings)


def answer_all(
    run: Run, step: int, base: bool, progress: Progress, stop: StopRequest
) -> list[EvalSample] | None:
    """This rank's share of the evaluation's answers; None where a signal stopped it."""
    assert run.eval_set is not None
    section, done = run.config.eval, []
    total = len(my_requests(len(run.eval_set.problems), section.num_samples, run.world))
    share = "" if run.world.size == 1 else f" (this of {run.world.size} ranks)"
    title = f"Avg@{section.num_samples} after {step} steps{share}"
    with progress.evaluation(title, total) as advance:

        def on_samples(group: list[EvalSample]) -> None:
            done.extend(sample.correct for sample in group)
            advance(len(group), sum(done) / len(done))
            if len(done) < total:
                stop.check()

        with suppress(Stopped):
            return evaluate(
                run.eval_engine,
                run.tokenizer,
                run.eval_set.problems,
                run.eval_set.prompts,
                section,
                run.eval_params,
                seed=run.config.train.seed,
                world=run.world,
                base=base,
                on_samples=on_samples,
            )
    return None


def finished_evaluations(run: Run, settings: dict[str, object]) -> dict[int, Evaluation]:
    """The run's evaluations with these settings, by step. On the main rank; elsewhere none."""
    known = read_evaluations(run.run_dir) if run.world.is_main else {}
    return {step: found for step, found in known.items() if found.settings == settings}


def keep_best(run: Run, step: int, settings: dict[str, object]) -> None:
    """Marks the checkpoint of the weights that were evaluated last, where none were better."""
    best = gather_objects(best_step(finished_evaluations(run, settings)))[0]
    if run.world.is_main and best == step > 0:
        mark_best(run.run_dir, step)


def save(run: Run) -> Path:
    """A checkpoint of the last finished step, unless there is one. A collective."""
    if run.saved is not None and run.saved[0] == run.step:
        return run.saved[1]
    ahead = run.sampler.pending()
    completions = [] if ahead is None else merge_shares(gather_objects(ahead.completions))
    state = {
        "step": run.step,
        "seconds_train": run.seconds_train,
        "sampled_ahead": ahead
        and [ahead.weights_version, [[c.token_ids, c.logprobs, c.truncated] for c in completions]],
    }
    keep = run.config.checkpoint.keep
    try:
        path = save_checkpoint(
            run.run_dir, run.model, run.optimizer, state, keep=keep, world=run.world
        )
    except ValueError as error:
        raise SaveFailed(str(error)) from error
    run.saved = run.step, path
    return path
