"""What the stages of one training step hand to each other.

data -> Problem -> rollout -> Rollout -> anchors, masking -> PrivilegedRollout -> batch ->
TrainBatch -> model, teacher, objectives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

# Not imported at run time: a reward function's process starts without torch.
if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """One row of the data set.

    Problem("gsm8k_train.jsonl:1", "Natalia sold clips to 48 of her friends ...",
            "Natalia sold 48/2 = 24 clips in May. ... \\\\boxed{72}", "72")
    """

    problem_id: str
    problem: str
    solution: str
    answer: str


@dataclass(frozen=True)
class Rollout:
    """One completion that the student sampled, as the token ids that the sampler produced.

    Rollout(problem, prompt_ids=(1, 9, 4), completion_ids=(17, 30, 2), rollout_logprobs=(-0.1, -2.3,
    -0.0),
            truncated=False, text="17 + 13 = 30")

    `completion_ids` ends with the stop token unless `truncated`. `text` is decoded for anchors and
    the answer check alone: nothing is ever tokenised again from it. A reference solution that is to
    be imitated takes a rollout's place, without log-probabilities.
    """

    problem: Problem
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    rollout_logprobs: tuple[float, ...]
    truncated: bool
    text: str


@dataclass(frozen=True)
class PrivilegedRollout:
    """A rollout, its verdict, and what the teacher sees of the verified solution (Eq. 4 to 6).

    PrivilegedRollout(rollout, correct=False, check_error=None, overlap=0.5, mask_ratio=0.35,
                      partial_solution="First ...(omitted)...", teacher_prompt_ids=(1, 9, 4, 7, 7))

    The verdict is logged and never steers the teacher; `check_error` says why the checker failed.
    Where the objective has no teacher, `partial_solution` is empty and `teacher_prompt_ids` are the
    student's. `shortened`: the prompt had no room for what the mask leaves. `reward` and
    `advantage` are GRPO's; `rationale` is what a teacher wrote that reasons first.
    """

    rollout: Rollout
    correct: bool
    check_error: str | None
    overlap: float
    mask_ratio: float
    partial_solution: str
    teacher_prompt_ids: tuple[int, ...]
    shortened: bool = False
    reward: float = 0.0
    advantage: float = 0.0
    rationale: str = ""


@dataclass(frozen=True)
class Verdict:
    """What the reward function says of one completion.

    Verdict(reward=1.0, correct=True)
    Verdict(reward=0.0, correct=False, error="the comparison took longer than 5 s")

    reward: what GRPO's advantages are computed from. correct: what accuracy counts. error: why the
    completion could not be judged; it then counts as wrong.
    """

    reward: float
    correct: bool
    error: str | None = None


@dataclass(frozen=True)
class PackedSequences:
    """B sequences (prompt + completion) laid end to end, M tokens in all.

    Two sequences, prompts (5, 6) and (7,), completions (1, 2) and (3,):
    token_ids       5 6 1 2 7 3
    position_ids    0 1 2 3 0 1
    cu_seqlens      0 4 6         on the CPU, where lengths are read without waiting for a device
    loss_positions  1 2 4         the positions whose hidden state predicts 1, 2 and 3
    """

    token_ids: Int[Tensor, " M"]
    position_ids: Int[Tensor, " M"]
    cu_seqlens: Int[Tensor, " B+1"]
    loss_positions: Int[Tensor, " N"]


@dataclass(frozen=True)
class TrainBatch:
    """Student and teacher sequences over the same N completion tokens.

    `completion_ids` (N,) are those tokens and `cu_seqlens` (B+1,) the rollouts' bounds in them: row
    n of the hidden states taken at `student.loss_positions` and at `teacher.loss_positions` both
    predict `completion_ids[n]`. `cu_seqlens` stays on the CPU.
    """

    student: PackedSequences
    teacher: PackedSequences
    completion_ids: Int[Tensor, " N"]
    cu_seqlens: Int[Tensor, " B+1"]
