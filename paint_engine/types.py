"""The objects that the stages of one training step pass on.

data -> Problem -> Request -> rollout -> Rollout -> rewards, prompts -> TrainExample -> packing ->
TrainBatch -> model, teacher -> recipe.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

# Not imported at run time: a reward function's process starts without torch.
if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


MAX_FEEDBACK_CHARACTERS = 20_000
"""the longest feedback that a reward function may return"""


@dataclass(frozen=True)
class Problem:
    """One row of the data set. `solution`, `answer` or `feedback` is "" if the row has none, and
    none is needed.

    Problem("gsm8k_train.jsonl:1", "Natalia sold clips to 48 of her friends ...",
            "Natalia sold 48/2 = 24 clips in May. ... \\\\boxed{72}", "72")

    route: names the teacher that scores its rollouts, if the data route them; else "".
    """

    problem_id: str
    problem: str
    solution: str
    answer: str
    feedback: str = ""
    route: str = ""


@dataclass(frozen=True)
class Reader:
    """A model as the reader of prompts: Reader(tokenizer, max_context=40960)

    max_context: maximum number of tokens of a prompt and its completion together.
    """

    tokenizer: PreTrainedTokenizerBase
    max_context: int


@dataclass(frozen=True)
class Request:
    """A request for one rollout: Request(index=3, problem=problem, prompt_ids=(1, 9, 4), seed=17)

    index: its place in the step's batch over all ranks.
    """

    index: int
    problem: Problem
    prompt_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class Rollout:
    """One completion that the student sampled, as the sampler's token ids.

    Rollout(problem, prompt_ids=(1, 9, 4), completion_ids=(17, 30, 2),
            rollout_logprobs=(-0.1, -2.3, -0.0), truncated=False, text="17 + 13 = 30")

    `completion_ids` ends with the stop token unless `truncated`. `rollout_logprobs` are in nats.
    `text` is decoded only for anchors and the answer check; it is never tokenised again. If a
    recipe trains on reference solutions, a solution replaces the rollout, without
    log-probabilities.
    """

    problem: Problem
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    rollout_logprobs: tuple[float, ...]
    truncated: bool
    text: str


@dataclass(frozen=True)
class Verdict:
    """The reward function's verdict on one completion.

    Verdict(reward=1.0, correct=True)
    Verdict(reward=0.0, correct=False, error="the comparison took longer than 5 s")

    reward: the value from which GRPO computes its advantages.
    correct: the value that accuracy counts.
    error: the reason if the completion could not be judged; it then counts as wrong.
    feedback: what to say about the completion; teacher.context "feedback" shows it to the teacher.
    """

    reward: float
    correct: bool
    error: str | None = None
    feedback: str = ""


@dataclass(frozen=True)
class TeacherView:
    """What the teacher sees for one rollout, such as a part of the verified solution (Eq. 4 to 6).

    TeacherView(prompt_ids=(1, 9, 4, 7, 7), shown="First ...(omitted)...", mask_ratio=0.35,
                context="solution", source="gsm8k_train.jsonl:1", text="First we add. Then ...")

    prompt_ids: the teacher's prompt; the completion's ids follow it. Of several teachers, the
        first's that scores the rollout.
    shown: the text in the prompt, or what the mask and the prompt's length leave of it.
    mask_ratio: the hidden fraction of the text; 0.0 where the context has no mask.
    shortened: the prompt had no room for all that the mask leaves.
    rationale: the text that a reasoning teacher wrote, else "".
    context: `teacher.context`.
    source: whose text it is: a problem's id, or for a sibling its rollout's place in the batch,
        counted from 0; "" for none.
    text: the whole text.
    scorers: the places, among the run's teachers, of those that score the rollout.
    other_prompt_ids: the prompts of the scorers after the first.
    """

    prompt_ids: tuple[int, ...]
    shown: str
    mask_ratio: float
    shortened: bool = False
    rationale: str = ""
    context: str = "solution"
    source: str = ""
    text: str = ""
    scorers: tuple[int, ...] = (0,)
    other_prompt_ids: tuple[tuple[int, ...], ...] = ()

    @property
    def prompts(self) -> dict[int, tuple[int, ...]]:
        """The prompt of each scorer, by its place."""
        return dict(zip(self.scorers, (self.prompt_ids, *self.other_prompt_ids), strict=True))


# By identity, because tensors have no single truth value.
@dataclass(frozen=True, eq=False)
class TopK:
    """A served teacher's scores of a completion of n tokens: for each, some tokens that the teacher
    might have put there, on the CPU.

    TopK(token_ids=tensor([[7, 3, -1]], dtype=int32), logprobs=tensor([[-0.1, -2.5, -inf]]))

    token_ids: int32. The likeliest tokens and always the completion's own, none twice in a row, in
        no order; -1 fills rows up.
    logprobs: float32, nats, at temperature 1 over the tokenizer's tokens.
    """

    token_ids: Int[Tensor, "n K"]
    logprobs: Float[Tensor, "n K"]


@dataclass(frozen=True)
class TrainExample:
    """A rollout and what the recipe adds to it. Fields that the recipe does not use are None.

    TrainExample(rollout, Verdict(1.0, True), overlap=0.5, teacher_view=view)

    verdict: for the logs, GRPO's reward and `objective.on`; the teacher sees it only by way of its
        context.
    overlap: the fraction of the anchors that the rollout contains, of the verified solution or of
        the text that the teacher's context masks. None where the context has no mask.
    teacher_view: None also where the context has nothing to show for this rollout.
    advantage: GRPO's advantage within the rollout's group.
    served: what the teacher's server says of the completion's tokens.
    """

    rollout: Rollout
    verdict: Verdict | None = None
    overlap: float | None = None
    teacher_view: TeacherView | None = None
    advantage: float | None = None
    served: TopK | None = None


@dataclass(frozen=True)
class PackedSequences:
    """B concatenated sequences (prompt + completion) of M tokens in total.

    Two sequences, prompts (5, 6) and (7,), completions (1, 2) and (3,):
    token_ids       5 6 1 2 7 3
    position_ids    0 1 2 3 0 1
    cu_seqlens      0 4 6         on the CPU, so reading lengths does not wait for a device
    loss_positions  1 2 4         the positions whose hidden states predict 1, 2 and 3
    """

    token_ids: Int[Tensor, " M"]
    position_ids: Int[Tensor, " M"]
    cu_seqlens: Int[Tensor, " B+1"]
    loss_positions: Int[Tensor, " N"]


@dataclass(frozen=True)
class ScoredSequences:
    """The sequences that one teacher scores: of all rollouts of a micro-batch, or of some.

    `rollouts` are the places of these rollouts in the micro-batch, in its order.
    """

    rollouts: tuple[int, ...]
    sequences: PackedSequences


@dataclass(frozen=True)
class TrainBatch:
    """Student and teacher sequences over the same N completion tokens. `teachers` are by the
    teacher's place among the run's; empty if no rollout has a teacher view.

    `completion_ids` (N,) are those tokens. `cu_seqlens` (B+1,) are the rollouts' bounds in them, on
    the CPU. Row n of the hidden states at `student.loss_positions`, and row n at
    `teacher.loss_positions`, both predict `completion_ids[n]`.
    """

    student: PackedSequences
    teachers: dict[int, ScoredSequences]
    completion_ids: Int[Tensor, " N"]
    cu_seqlens: Int[Tensor, " B+1"]

    @property
    def teacher(self) -> PackedSequences | None:
        """The sequences of the first teacher; None without one."""
        return self.teachers[0].sequences if 0 in self.teachers else None
