"""Evaluations while a run trains, and the checkpoints that it writes: the best among them."""

import json
import time
from contextlib import closing, suppress
from pathlib import Path

from paint_engine.checkpoint.directory import MANIFEST_FILE, mark_best
from paint_engine.checkpoint.save import save_checkpoint
from paint_engine.checkpoint.weights import ADAPTER_FILE, MODEL_FILE
from paint_engine.distributed import any_rank, gather_objects, merge_shares
from paint_engine.evaluation.accuracy import best_step
from paint_engine.evaluation.answers import all_requests, check_reward, evaluate
from paint_engine.evaluation.store import (
    EvalSample,
    Header,
    SampleFiles,
    benchmark_name,
    evaluation_directory,
    evaluation_settings,
    fingerprints,
)
from paint_engine.monitor.progress import Progress
from paint_engine.rewards import RewardFailed
from paint_engine.training.interrupt import Stopped, StopRequest
from paint_engine.training.run import Run
from paint_engine.training.summary import present_evaluations


class SaveFailed(Exception):
    """A checkpoint could not be written, for want of room for one; older ones are intact."""


def evaluate_at(run: Run, step: int, progress: Progress, stop: StopRequest) -> None:
    """Avg@k of the weights after `step` steps: the current ones, or the base at step 0.

    An evaluation that the run has already finished with these settings is kept, and one that was
    cut short goes on. The weights are saved before, so that it is of the same, and marked where
    none were better.
    """
    assert run.eval_set is not None and step in (0, run.step)
    started = time.monotonic()
    if gather_objects(run.world.is_main and step in present_evaluations(run))[0]:
        return
    base = step == 0 and run.step > 0
    checkpoint = save(run) if step > 0 else None
    if not base:
        run.sampler.sync(step)
    header = gather_objects(run.world.is_main and evaluation_header(run, step, checkpoint))[0]
    assert isinstance(header, Header)
    directory = evaluation_directory(run.run_dir)
    with closing(SampleFiles(directory, f"step-{step}", header, run.world, replace=True)) as files:
        mine = files.share(all_requests(run.eval_set.problems, run.config.eval.num_samples))
        failure: str | None = None

        def answer() -> bool:
            nonlocal failure
            try:
                return answer_all(run, step, base, files, files.missing(mine), progress, stop)
            except RewardFailed as failed:
                failure = str(failed)
                return True

        finished = run.sampler.guarded(answer)
        check_reward(run.reward, files, failure)
        if any_rank(not finished):
            stop.check_together()
        assert finished
        files.finish(time.monotonic() - started)
    keep_best(run, step)


def evaluation_header(run: Run, step: int, checkpoint: Path | None) -> Header:
    """What the evaluation after `step` steps is of.

    checkpoint: of the weights; None for the base.
    """
    assert run.eval_set is not None
    section, weights = run.config.eval, "base"
    if checkpoint is not None:
        manifest = json.loads((checkpoint / MANIFEST_FILE).read_text())
        weights = manifest[ADAPTER_FILE if ADAPTER_FILE in manifest else MODEL_FILE][1]
    return Header(
        benchmark_name(section.path),
        evaluation_settings(
            section, run.config.train.seed, run.config.prompts, run.config.reward.function
        ),
        {"weights": weights},
        fingerprints(run.eval_set.problems),
        step,
    )


def answer_all(
    run: Run,
    step: int,
    base: bool,
    files: SampleFiles,
    requests: list[tuple[int, int]],
    progress: Progress,
    stop: StopRequest,
) -> bool:
    """Answers what is left of this rank's share of an evaluation; False where a signal stopped
    it."""
    assert run.eval_set is not None
    section = run.config.eval
    share = "" if run.world.size == 1 else f" (this of {run.world.size} ranks)"
    title = f"Avg@{section.num_samples} after {step} steps{share}"
    with progress.evaluation(title, len(requests)) as advance:
        record, num_left = files.recorder(advance), len(requests)

        def on_samples(group: list[EvalSample]) -> None:
            nonlocal num_left
            record(group)
            num_left -= len(group)
            if num_left:
                stop.check()

        with suppress(Stopped):
            evaluate(
                run.eval_engine,
                run.tokenizer,
                run.eval_set.problems,
                run.eval_set.prompts,
                requests,
                run.eval_params,
                run.reward,
                seed=run.config.train.seed,
                base=base,
                on_samples=on_samples,
            )
            return True
    return False


def keep_best(run: Run, step: int) -> None:
    """Marks the checkpoint of the weights that were evaluated last, where none were better."""
    best = gather_objects(run.world.is_main and best_step(present_evaluations(run)))[0]
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
            run.run_dir, run.model, run.optimizer, state, keep=keep, world=run.world, ema=run.ema
        )
    except ValueError as error:
        raise SaveFailed(str(error)) from error
    run.saved = run.step, path
    return path
