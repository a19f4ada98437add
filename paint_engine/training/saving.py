"""The checkpoint of a run's last finished step."""

from pathlib import Path

from paint_engine.checkpoint.save import save_checkpoint
from paint_engine.distributed import gather_objects, merge_shares
from paint_engine.training.run import Run


class SaveFailed(Exception):
    """A checkpoint could not be written; older ones are intact."""


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
