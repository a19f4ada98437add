"""The state of a training run, and the checkpoint of its last finished step."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, Strict
from torch import nn
from transformers import PreTrainedTokenizerBase

from paint_engine.checkpoint.save import save_checkpoint
from paint_engine.config.schema import Config
from paint_engine.config.sections import EvalSection
from paint_engine.data import ProblemSet
from paint_engine.distributed import (
    World,
    gather_objects,
    merge_shares,
    raise_together,
    together,
)
from paint_engine.files import FILE_FAILURES, DirectoryLock, LockLost, Record, WriteFailed
from paint_engine.model import FixedTeacher, Teacher, max_context
from paint_engine.model.sharding import is_sharded
from paint_engine.monitor import NotFinite, ShorteningWatch
from paint_engine.monitor.timings import Timings
from paint_engine.recipes import Recipe
from paint_engine.rewards import Reward
from paint_engine.rollout import RolloutEngine, Sampler
from paint_engine.scoring import Scorer
from paint_engine.training.finite import bad_weight
from paint_engine.types import Reader

# JSON has lists for tuples.
_Completion = Annotated[tuple[list[NonNegativeInt], list[float], bool], Strict(False)]
_Ahead = Annotated[tuple[NonNegativeInt, list[_Completion]], Strict(False)]


class Skipped(Record):
    """Optimizer steps that were skipped, because their gradient was not finite: of the whole run,
    up to now in a row, and the reason of the last."""

    total: NonNegativeInt = 0
    in_a_row: NonNegativeInt = 0
    last: str = ""


class SavedProgress(Record):
    """What a checkpoint stores beside the weights and the optimizer's moments.

    sampled_ahead: the number of finished steps of the weights that sampled them, and the token ids,
        log-probabilities and truncation of each completion of the next step, on all ranks.
    skipped, shortening: an earlier version did not record them.
    """

    step: NonNegativeInt
    seconds_train: NonNegativeFloat
    sampled_ahead: _Ahead | None
    skipped: Skipped = Skipped()
    shortening: ShorteningWatch = ShorteningWatch()


@dataclass
class Run:
    """The state of a training run. `step` counts finished steps; `seconds_train` adds up over
    resumes.

    `eval_engine` answers evaluations, unless `open_eval_engine` starts one of their own.
    `base` is the model before training. `teacher` scores the rollouts and is often the base; with
    `scorer`, a server does. `readers` are the teachers that are other models, as readers of
    prompts. `eval_sets` are the held-out problems by benchmark, none if evaluation is off. `name`
    is the preset's name, or "run" for a configuration file. `saved` is the step and the path of the
    newest checkpoint that this process has written. `lock` is the main rank's, on the directory;
    the others have None.
    """

    config: Config
    recipe: Recipe
    name: str
    run_dir: Path
    lock: DirectoryLock | None
    world: World
    tokenizer: PreTrainedTokenizerBase
    model: nn.Module
    base: FixedTeacher
    teacher: Teacher
    optimizer: torch.optim.Optimizer
    train_set: ProblemSet
    readers: tuple[Reader, ...]
    eval_sets: dict[str, ProblemSet]
    attention: str
    sampler: Sampler
    eval_engine: RolloutEngine
    reward: Reward
    open_eval_engine: Callable[[], RolloutEngine] | None = None
    scorer: Scorer | None = None
    step: int = 0
    seconds_train: float = 0.0
    saved: tuple[int, Path] | None = None
    skipped: Skipped = field(default_factory=Skipped)
    shortening: ShorteningWatch = field(default_factory=ShorteningWatch)

    @property
    def parameters(self) -> list[torch.Tensor]:
        """The tensors that the optimizer trains."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def timings(self) -> Timings:
        """Seconds of each part of the steps."""
        return self.sampler.timings

    @property
    def is_sharded(self) -> bool:
        """Whether the weights are sharded over the ranks."""
        return is_sharded(self.config, self.world)

    @property
    def max_context(self) -> int:
        """Maximum number of tokens of a prompt and its completion."""
        return max_context(self.model)

    @property
    def teacher_context(self) -> int:
        """Maximum number of tokens of the teacher's prompt and a completion."""
        return self.max_context if self.scorer is None else self.scorer.room(self.max_context)

    def eval_section(self, *, final: bool) -> EvalSection:
        """The section of the evaluations during training, or of those by the full protocol after
        it, where there are any."""
        section = self.config.eval.final if final else self.config.eval
        assert section is not None, "the run has no protocol of its own for its end"
        return section

    @property
    def eval_seed(self) -> int:
        """Seed of the evaluations' answers."""
        own = self.config.eval.sampling_seed
        return self.config.train.seed if own is None else own

    def check_lock(self) -> None:
        """Before a write: raises LockLost on every rank if the directory is no longer this run's,
        and WriteFailed if that cannot be told. A collective call."""
        together(lambda: self.lock and self.lock.check(), (LockLost, WriteFailed))


class SaveFailed(Exception):
    """A checkpoint could not be written; older ones are intact."""


class StepNotRecorded(Exception):
    """A step's metrics or samples could not be written. The weights are a step ahead of them."""


def save(run: Run) -> Path:
    """Saves a checkpoint of the last finished step, unless there is one. A collective call.

    Raises SaveFailed, LockLost if the directory is no longer this run's, and NotFinite if a trained
    weight is not finite: the checkpoint would be of no use, and would push out an earlier one.
    """
    if run.saved is not None and run.saved[0] == run.step:
        return run.saved[1]
    bad = bad_weight(run.model, trained=True)
    where = f"after step {run.step}, rank {run.world.rank}"
    raise_together(bad and NotFinite(f"{where}: the trained weight {bad} is not finite"))
    ahead = run.sampler.pending()
    completions = [] if ahead is None else merge_shares(gather_objects(ahead.completions))
    state = {
        "step": run.step,
        "seconds_train": run.seconds_train,
        "sampled_ahead": ahead
        and [ahead.weights_version, [[c.token_ids, c.logprobs, c.truncated] for c in completions]],
        "skipped": run.skipped.model_dump(),
        "shortening": run.shortening.model_dump(),
    }
    keep = run.config.checkpoint.keep
    try:
        run.check_lock()
        path = save_checkpoint(
            *(run.run_dir, run.model, run.optimizer, state),
            keep=keep,
            world=run.world,
            teacher=run.teacher,
        )
    except LockLost:
        raise
    except FILE_FAILURES as error:
        raise SaveFailed(str(error)) from error
    run.saved = run.step, path
    return path
