"""The state of a training run that the loop works with."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from paint_engine.config.schema import Config
from paint_engine.data.problem_sets import ProblemSet
from paint_engine.distributed import World
from paint_engine.model.forward import max_context
from paint_engine.model.teacher import EmaTeacher, FixedTeacher, Teacher
from paint_engine.monitor.timings import Timings
from paint_engine.rewards import Reward
from paint_engine.rollout.engine import RolloutEngine, SamplingParams, sampling_params
from paint_engine.rollout.sampler import Sampler


@dataclass
class Run:
    """What the loop works with. `step` counts finished steps; `seconds_train` adds up over resumes.

    `base` is the model as it was before training, `teacher` what scores the rollouts: often the
    same. `name` is the preset's, or "run" for a configuration of the user's. `saved` is the step of
    the newest checkpoint that this process has written, and where it is.
    """

    config: Config
    name: str
    run_dir: Path
    world: World
    tokenizer: PreTrainedTokenizerBase
    model: nn.Module
    base: FixedTeacher
    teacher: Teacher
    optimizer: torch.optim.Optimizer
    train_set: ProblemSet
    eval_set: ProblemSet | None
    attention: str
    sampler: Sampler
    eval_engine: RolloutEngine
    reward: Reward
    step: int = 0
    seconds_train: float = 0.0
    saved: tuple[int, Path] | None = None

    @property
    def parameters(self) -> list[torch.Tensor]:
        """What the optimizer trains."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def timings(self) -> Timings:
        """Where the steps' time goes."""
        return self.sampler.timings

    @property
    def ema(self) -> EmaTeacher | None:
        """The teacher where it has weights of its own that change, which a checkpoint keeps."""
        return self.teacher if isinstance(self.teacher, EmaTeacher) else None

    @property
    def max_context(self) -> int:
        """Tokens that a prompt and its completion may take."""
        return max_context(self.model)

    @property
    def max_teacher_prompt(self) -> int:
        """Tokens that the teacher's prompt may take beside the longest completion."""
        return self.max_context - self.config.rollout.max_new_tokens

    @property
    def eval_params(self) -> SamplingParams:
        """How the evaluations' answers are drawn."""
        return sampling_params(self.config.eval, self.model, self.tokenizer)
