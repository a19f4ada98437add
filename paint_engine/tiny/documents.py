"""The documents that a tiny model is pretrained on: drills, and solutions after a prompt."""

import random
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from paint_engine.config.sections import PromptsSection
from paint_engine.prompts.chat import encode_chat, student_text, teacher_text
from paint_engine.prompts.masking import OMISSION_MARKER, mask_solution
from paint_engine.tiny.problems import (
    PRETRAIN_BUCKETS,
    WordProblem,
    draw_drill,
    draw_problem,
    render_reference,
)
from paint_engine.tiny.stories import WAYS, Plan, Way
from paint_engine.tiny.writer import Habits, visible_roles, write_solution, write_terse

# The paper's prompt, fixed here: the base is trained on these words, whatever the configuration
# says.
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
_PROMPTS = PromptsSection(instruction=INSTRUCTION)

DRILL_SHARE = 0.15
TOGETHER_SHARE = 0.7
# Of the solutions, which are then as terse as a reference.
TERSE_SHARE = 0.08
PLACEMENT_WEIGHTS = {"whole": 0.3, "suffix": 0.45, "random": 0.25}


@dataclass(frozen=True)
class Mixture:
    """What the documents of a stage are.

    unaided, aided, control: shares of the documents that are no drills: without a reference, with
        one to the problem, with one to another problem.
    follows_any: whether another problem's reference draws the writer to its way as well. It
        confirms no result.
    habits: of the writer.
    """

    unaided: float = 0.35
    aided: float = 0.45
    control: float = 0.2
    follows_any: bool = False
    habits: Habits = field(default_factory=Habits)


@dataclass(frozen=True)
class Document:
    """Token ids of a prompt and its completion. Both are trained on."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]


def draw_pretraining_problem(rng: random.Random) -> WordProblem:
    """Draws a problem whose arithmetic no split has in the same family of stories."""
    while True:
        problem = draw_problem(rng)
        if problem.bucket in PRETRAIN_BUCKETS:
            return problem


def _draw_way(rng: random.Random, preferred: Way, share: float) -> Way:
    return preferred if rng.random() < share else next(way for way in WAYS if way != preferred)


def _draw_reference(plan: Plan, rng: random.Random) -> tuple[Way, str]:
    """Returns the way of a reference, and the reference, whole or with a part hidden."""
    way = _draw_way(rng, "together", TOGETHER_SHARE)
    placements, weights = zip(*PLACEMENT_WEIGHTS.items(), strict=True)
    placement = rng.choices(placements, weights)[0]
    reference = render_reference(plan, way)
    if placement == "whole":
        return way, reference
    ratio = rng.uniform(0.05, 0.95)
    return way, mask_solution(
        reference, ratio, placement=placement, generator=rng, marker=OMISSION_MARKER
    )


def _write(
    plan: Plan, way: Way, rng: random.Random, habits: Habits, visible: frozenset[str]
) -> str:
    write = write_terse if rng.random() < TERSE_SHARE else write_solution
    return write(plan, way, rng, habits, visible)


def draw_solution(rng: random.Random, mixture: Mixture) -> tuple[str, str]:
    """Returns a user message and the writer's solution: alone, or with a reference to this problem
    or to another."""
    problem = draw_pretraining_problem(rng)
    kind = rng.random() * (mixture.unaided + mixture.aided + mixture.control)
    plan, habits = problem.plan, mixture.habits
    if kind < mixture.unaided:
        text = student_text(problem.text, _PROMPTS)
        return text, _write(plan, rng.choice(WAYS), rng, habits, frozenset())
    is_control = kind < mixture.unaided + mixture.control
    shown_plan = draw_pretraining_problem(rng).plan if is_control else plan
    shown_way, shown = _draw_reference(shown_plan, rng)
    whole = OMISSION_MARKER not in shown
    text = teacher_text(problem.text, shown, _PROMPTS, whole=whole)
    if is_control and not mixture.follows_any:
        return text, _write(plan, rng.choice(WAYS), rng, habits, frozenset())
    # The more of a reference is visible, the more the writer is drawn to its way.
    visible_share = (len(shown) - (0 if whole else len(OMISSION_MARKER))) / len(
        render_reference(shown_plan, shown_way)
    )
    way = _draw_way(rng, shown_way, 0.5 + 0.49 * visible_share)
    visible = frozenset() if is_control else visible_roles(plan, shown_way, shown)
    return text, _write(plan, way, rng, habits, visible)


def draw_document(
    tokenizer: PreTrainedTokenizerBase, rng: random.Random, mixture: Mixture
) -> Document:
    """Draws a drill, or a solution of the writer after a prompt."""
    if rng.random() < DRILL_SHARE:
        return Document((), tuple(tokenizer.encode(draw_drill(rng) + "<|endoftext|>")))
    prompt, completion = draw_solution(rng, mixture)
    return Document(
        encode_chat(tokenizer, prompt, thinking=False),
        tuple(tokenizer.encode(completion + "<|im_end|>")),
    )
