"""Two rollouts of three tokens over a vocabulary of two, for losses worked out by hand.

The first rollout answers wrong with tokens 0 and 1, the second right with token 0:

    token           0            1            2
    sampled         0            1            0
    student         1/2, 1/2     3/4, 1/4     1/2, 1/2
    teacher         3/4, 1/4     1/4, 3/4     1/4, 3/4

KL(teacher, student) is KL_0, KL_1, KL_0 and its gradient by the student's logits p_S - p_T; the
gradient of the sampled token's log-probability is its one-hot vector minus p_S.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from paint_engine.config.schema import Config
from paint_engine.recipes import LossInputs, LossOutput, Recipe, SecondPass, recipe_of
from paint_engine.types import Problem, Rollout, TrainExample, Verdict

KL_0 = 0.75 * math.log(3 / 2) - 0.25 * math.log(2)
KL_1 = 0.5 * math.log(3)
STUDENT = ((1, 1), (3, 1), (1, 1))
TEACHER = ((3, 1), (1, 3), (1, 3))
IDS = ((0, 1), (0,))
PLAIN = {
    "temperature": 1.0,
    "pointwise_clip": None,
    "interpolation_weight": 0.0,
    "top_fraction": 0.0,
}
GROUP = {"group_size": 2, "scale_by_std": False}


def recipe(
    name: str,
    *,
    grpo: dict[str, object] | None = None,
    teacher: dict[str, object] | None = None,
    **objective: object,
) -> Recipe:
    """Without clip and interpolation, at temperature 1."""
    sections = {"objective": {"name": name, **PLAIN, **objective}}
    return recipe_of(
        Config.model_validate({**sections, "grpo": grpo or {}, "teacher": teacher or {}})
    )


def hand_examples(verdicts: Sequence[bool | None] = (False, True)) -> list[TrainExample]:
    """The rollouts with these verdicts; a right one has reward 1."""
    found = []
    for place, (ids, correct) in enumerate(zip(IDS, verdicts, strict=True)):
        problem = Problem(f"p:{place}", "", "", "")
        rollout = Rollout(problem, (0,), ids, (0.0,) * len(ids), False, "")
        verdict = None if correct is None else Verdict(float(correct), correct)
        found.append(TrainExample(rollout, verdict))
    return found


def logits(rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


def loss_of(
    of: Recipe, examples: Sequence[TrainExample], old_logprobs: Tensor | None = None
) -> tuple[LossOutput, list[list[float]]]:
    """The loss of a step of one micro-batch, and its gradient by the student's logits. With a
    context that may show nothing, the teacher scores the rollouts that have a teacher view."""
    rows = [(0, 1) if e.rollout.problem.problem_id == "p:0" else (2,) for e in examples]
    student = logits(STUDENT)[[row for of_one in rows for row in of_one]].requires_grad_()
    scored, shows = tuple(range(len(rows))), of.context
    if shows is not None and shows.is_optional:
        scored = tuple(place for place, e in enumerate(examples) if e.teacher_view is not None)
    teacher = logits(TEACHER)[[row for place in scored for row in rows[place]]]
    lengths = [len(example.rollout.completion_ids) for example in examples]
    per_rollout = of.config.objective.reduction == "sequence_mean"
    inputs = LossInputs(
        student_hidden_states=student,
        lm_head_weight=torch.eye(2, dtype=torch.float64),
        second_passes=(SecondPass(teacher, rollouts=scored),) if of.second_pass else (),
        completion_ids=torch.tensor([i for e in examples for i in e.rollout.completion_ids]),
        cu_seqlens=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        examples=examples,
        old_logprobs=old_logprobs,
        vocab_size=2,
        # Of the whole step, whichever of its rollouts are here.
        denominator=len(IDS) if per_rollout else sum(map(len, IDS)),
    )
    output = of.loss(inputs)
    (gradient,) = torch.autograd.grad(output.loss, student)
    return output, gradient.tolist()


def judged(examples: Sequence[TrainExample], correct: bool) -> list[TrainExample]:
    """The same rollouts, all with this verdict."""
    return [replace(e, verdict=Verdict(float(correct), correct)) for e in examples]
