"""Multi-step word problems whose solutions resemble real ones: prose, LaTeX, intermediate results,
a box.

A problem is a story (the text of the problem) and a plan (the steps that solve it). A plan can be
rendered many times in different words. It is rendered correctly, or with slips that later steps
use, like the solutions of a fallible writer. The split of a problem is a hash of its arithmetic
alone, so a held-out problem never reappears under other names: no two splits share a family,
structure and set of numbers.
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from paint_engine.tiny.stories import FAMILIES, Operator, Plan, Step
from paint_engine.types import Problem

# The hash buckets, of 64, of each split; the base is pretrained on the rest.
SPLIT_BUCKETS = {"test": range(0, 4), "validation": range(4, 6), "train": range(6, 22)}
SPLIT_SIZES = {"test": 512, "validation": 256, "train": 4096}
PRETRAIN_BUCKETS = range(22, 64)

# Sums and differences need the most practice.
_DRILL_OPERATORS: tuple[Operator, ...] = ("+", "+", "-", "-", "*", "/", "%")
_STEP_PATTERNS = (
    "{Label} is {formula}.",
    "We compute {label}: {formula}.",
    "So {label} is {formula}.",
    "{Label} comes to {formula}.",
)
_CLOSING_PATTERNS = (
    "The answer is $\\boxed{{{answer}}}$.",
    "Therefore the answer is $\\boxed{{{answer}}}$.",
    "This gives $\\boxed{{{answer}}}$ in the end.",
)


@dataclass(frozen=True)
class WordProblem:
    """A story, the plan that solves it, and its correct answer."""

    text: str
    plan: Plan
    answer: int

    @property
    def bucket(self) -> int:
        """The hash bucket, one of 64, from family, structure and numbers (no names, no wording)."""
        digest = hashlib.sha256(repr(self.plan.key).encode()).digest()
        return digest[0] % 64


def _apply(step: Step, left: int, right: int) -> int:
    """Returns a step's result. After a slip a division can be inexact; the quotient is rounded
    down."""
    if step.op == "+":
        return left + right
    if step.op == "-":
        return left - right
    if step.op == "*":
        return left * right
    if step.op == "/":
        return left // right
    assert step.op == "%", step.op
    return left * right // 100


def _formula(step: Step, left: int, right: int, result: int) -> str:
    if step.op == "+":
        return f"${left} + {right} = {result}$"
    if step.op == "-":
        return f"${left} - {right} = {result}$"
    if step.op == "*":
        return f"${left} \\times {right} = {result}$"
    if step.op == "/":
        return f"$\\frac{{{left}}}{{{right}}} = {result}$"
    return f"$\\frac{{{right}}}{{100}} \\times {left} = {result}$"


def _slip(result: int, rng: random.Random) -> int:
    """Returns a plausible wrong result: one digit, at any place, is off by one or two.

    An earlier slip can have made the result negative; its sign stays.
    """
    digits = [int(digit) for digit in str(abs(result))]
    place = rng.randrange(len(digits))
    lowest = 1 if place == 0 else 0
    near = [digits[place] + offset for offset in (-2, -1, 1, 2)]
    digits[place] = rng.choice([digit for digit in near if lowest <= digit <= 9])
    return int("".join(map(str, digits))) * (-1 if result < 0 else 1)


def _values(plan: Plan, slip_rate: float, rng: random.Random) -> list[tuple[int, int, int]]:
    """Returns (left, right, result) of every step. Steps that use a slipped result use it as
    written."""
    results: list[int] = []
    values = []
    for step in plan.steps:
        left = results[-step.left - 1] if step.left < 0 else step.left
        right = results[-step.right - 1] if step.right < 0 else step.right
        result = _apply(step, left, right)
        if rng.random() < slip_rate:
            result = _slip(result, rng)
        results.append(result)
        values.append((left, right, result))
    return values


def render_solution(problem: WordProblem, rng: random.Random, *, slip_rate: float = 0.0) -> str:
    """Writes a solution in words chosen by `rng`.

    slip_rate: probability, per step, that the written result is wrong. Later steps use the wrong
        result.
    """
    values = _values(problem.plan, slip_rate, rng)
    lines = []
    for step, (left, right, result) in zip(problem.plan.steps, values, strict=True):
        label = rng.choice(step.labels)
        pattern = rng.choice(_STEP_PATTERNS)
        formula = _formula(step, left, right, result)
        lines.append(
            pattern.format(label=label, Label=label[0].upper() + label[1:], formula=formula)
        )
    lines.append(rng.choice(_CLOSING_PATTERNS).format(answer=values[-1][2]))
    return "\n".join(lines)


def _is_within_reach(op: str, left: int, right: int, result: int) -> bool:
    """Returns whether a result is exact, positive and small: up to 200, or up to 600 if a multiple
    of ten. A model of a million parameters can learn such results in minutes."""
    if op == "/" and (left % right or result > 40):
        return False
    if op == "%" and left * right % 100:
        return False
    return 0 < result <= 200 or (result % 10 == 0 and 0 < result <= 600)


def draw_problem(rng: random.Random) -> WordProblem:
    """Draws one problem. Families are equally likely, and intermediate results are positive
    integers."""
    family: Callable[[random.Random], Plan] = rng.choice(FAMILIES)
    while True:
        plan = family(rng)
        values = _values(plan, 0.0, rng)
        steps = zip(plan.steps, values, strict=True)
        if all(_is_within_reach(step.op, *value) for step, value in steps):
            return WordProblem(" ".join(plan.story), plan, values[-1][2])


def draw_drill(rng: random.Random, num_lines: int = 16) -> str:
    """Draws correct formulas like those in solutions: practice without a story."""
    lines: list[str] = []
    while len(lines) < num_lines:
        op = rng.choice(_DRILL_OPERATORS)
        left = rng.choice((rng.randint(2, 200), 10 * rng.randint(1, 60)))
        if op in "+-":
            right = rng.choice((rng.randint(2, 60), rng.randint(2, 200), 10 * rng.randint(1, 60)))
        elif op == "%":
            right = rng.choice((10, 20, 25, 50))
        else:
            right = rng.choice((rng.randint(2, 9), 10 * rng.randint(1, 4)))
        step = Step(op, left, right, ())
        result = _apply(step, left, right)
        if _is_within_reach(op, left, right, result):
            lines.append(_formula(step, left, right, result))
    return "\n".join(lines)


@lru_cache(maxsize=8)
def _draw_split(split: str) -> tuple[Problem, ...]:
    rng = random.Random(f"paint-tiny-{split}")
    seen: set[tuple[object, ...]] = set()
    problems: list[Problem] = []
    while len(problems) < SPLIT_SIZES[split]:
        drawn = draw_problem(rng)
        if drawn.bucket not in SPLIT_BUCKETS[split] or drawn.plan.key in seen:
            continue
        seen.add(drawn.plan.key)
        solution = render_solution(drawn, rng)
        name = f"tiny-{split}:{len(problems)}"
        problems.append(Problem(name, drawn.text, solution, str(drawn.answer)))
    return tuple(problems)


def load_split(split: str, max_rows: int | None = None) -> list[Problem]:
    """Returns the first `max_rows` problems of "train", "validation" or "test", equal on every
    machine.

    Raises ValueError for another split name.
    """
    if split not in SPLIT_BUCKETS:
        raise ValueError(
            f"the tiny domain has no split {split!r}; it has {sorted(SPLIT_BUCKETS)}; "
            "set --data.split or --eval.split to one of them"
        )
    return list(_draw_split(split)[:max_rows])
