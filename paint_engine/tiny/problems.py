"""Multi-step word problems with two sound ways to each answer, in disjoint splits.

A problem is a story (its text) and a plan (the steps of each way). The split of a problem is a hash
of its arithmetic alone, so a held-out problem never reappears under other names: no two splits
share a family, structure and set of numbers. The references of the splits are terse and go the way
"together".
"""

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice

from paint_engine.tiny.stories import (
    FAMILIES,
    Draft,
    Operator,
    Plan,
    Step,
    Way,
    draw_draft,
    write_plan,
)
from paint_engine.types import Problem

# The hash buckets, of 64, of each split; the base is pretrained on the rest.
SPLIT_BUCKETS = {"test": range(0, 6), "validation": range(6, 8), "train": range(8, 22)}
SPLIT_SIZES = {"test": 2048, "validation": 512, "train": 4096}
PRETRAIN_BUCKETS = range(22, 64)

_DRILL_OPERATORS: tuple[Operator, ...] = ("+", "-", "*", "/")


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


def apply_operator(op: Operator, left: int, right: int) -> int:
    """Returns a step's result. After a slip a division can be inexact; the quotient is rounded
    down."""
    match op:
        case "+":
            return left + right
        case "-":
            return left - right
        case "*":
            return left * right
        case "/":
            return left // right


def formula(op: Operator, left: int | str, right: int | str) -> str:
    """Returns the left side of a formula in LaTeX."""
    match op:
        case "*":
            return f"{left}\\times {right}"
        case "/":
            return f"\\frac{{{left}}}{{{right}}}"
        case _:
            return f"{left}{op}{right}"


def operands_of(step: Step, values: Mapping[str, int]) -> tuple[int, int]:
    """Returns the two numbers of a step.

    values: the results of earlier steps, by role.
    """
    left, right = (values[n] if isinstance(n, str) else n for n in (step.left, step.right))
    return left, right


def true_values(plan: Plan, way: Way) -> dict[str, int]:
    """Returns the right result of every step of a way, by role."""
    values: dict[str, int] = {}
    for step in plan.ways[way]:
        values[step.role] = apply_operator(step.op, *operands_of(step, values))
    return values


def combined_side(steps: Sequence[Step], values: Mapping[str, int]) -> str:
    """Returns the left side of one formula that takes several steps, the last of which uses the
    others.

    values: of the roles that earlier formulas have found.
    """
    texts: dict[str, str] = {}
    for step in steps:
        left, right = (
            n if isinstance(n, int) else texts[n] if n in texts else str(values[n])
            for n in (step.left, step.right)
        )
        texts[step.role] = formula(step.op, left, right)
    return texts[steps[-1].role]


def terse_lines(plan: Plan, way: Way) -> list[list[Step]]:
    """Returns the steps of each formula of a terse solution."""
    steps = {step.role: step for step in plan.ways[way]}
    return [[steps[role] for role in roles] for roles in plan.lines[way]]


def terse_text(formulas: Sequence[str], answer: int) -> str:
    return "\n".join([*(f"${text}$" for text in formulas), f"$\\boxed{{{answer}}}$"])


def render_reference(plan: Plan, way: Way) -> str:
    """Writes a terse solution: formulas without words, some of which take several steps at once."""
    values = true_values(plan, way)
    formulas = [
        f"{combined_side(steps, values)}={values[steps[-1].role]}"
        for steps in terse_lines(plan, way)
    ]
    return terse_text(formulas, values["answer"])


def _is_within_reach(op: Operator, left: int, right: int, result: int) -> bool:
    """Returns whether a result is exact, positive and up to 300. A model of a million parameters
    can learn such results in minutes."""
    if op == "/" and (left % right or result > 100):
        return False
    return 0 < result <= 300


def draw_problem(rng: random.Random) -> WordProblem:
    """Draws one problem. Families are equally likely, and intermediate results are positive
    integers."""
    family = rng.choice(FAMILIES)
    while True:
        draft = draw_draft(rng, family)
        if (answer := _answer_within_reach(draft)) is not None:
            plan = write_plan(draft)
            return WordProblem(" ".join(plan.story), plan, answer)


def _answer_within_reach(draft: Draft) -> int | None:
    """Returns the answer; None if it or an intermediate result is out of reach."""
    value = draft.b
    for op, number in draft.chain:
        result = apply_operator(op, value, number)
        if not _is_within_reach(op, value, number, result):
            return None
        value = result
    return value


def draw_drill(rng: random.Random, num_lines: int = 16) -> str:
    """Draws correct formulas of one step, like those in solutions: practice without a story."""
    lines: list[str] = []
    while len(lines) < num_lines:
        op = rng.choice(_DRILL_OPERATORS)
        if op in "+-":
            left, right = rng.randint(10, 300), rng.randint(2, 99)
        elif op == "*":
            left, right = rng.randint(2, 9), rng.choice((rng.randint(2, 49), rng.randint(10, 150)))
            left, right = rng.sample((left, right), 2)
        else:
            right = rng.randint(2, 5)
            left = right * rng.randint(2, 100)
        result = apply_operator(op, left, right)
        if _is_within_reach(op, left, right, result):
            lines.append(f"${formula(op, left, right)}={result}$")
    return "\n".join(lines)


def draw_split(split: str, max_rows: int | None = None) -> list[WordProblem]:
    """Returns the first `max_rows` problems of a split with their plans; None for all."""
    problems, others = _begun(split)
    count = SPLIT_SIZES[split] if max_rows is None else max_rows
    problems += islice(others, max(0, count - len(problems)))
    # An iterator that an exception has ended draws no more.
    assert len(problems) >= min(count, SPLIT_SIZES[split]), (split, len(problems))
    return problems[:max_rows]


@cache
def _begun(split: str) -> tuple[list[WordProblem], Iterator[WordProblem]]:
    """Returns the problems that were drawn so far, and an iterator over the others: drawing a whole
    split takes a second."""
    return [], _draw_in_order(split)


def _draw_in_order(split: str) -> Iterator[WordProblem]:
    rng = random.Random(f"paint-tiny-{split}")
    seen: set[tuple[object, ...]] = set()
    while len(seen) < SPLIT_SIZES[split]:
        drawn = draw_problem(rng)
        if drawn.bucket not in SPLIT_BUCKETS[split] or drawn.plan.key in seen:
            continue
        seen.add(drawn.plan.key)
        yield drawn


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
    return [
        Problem(
            f"tiny-{split}:{index}",
            problem.text,
            render_reference(problem.plan, "together"),
            str(problem.answer),
        )
        for index, problem in enumerate(draw_split(split, max_rows))
    ]


def way_of(solution: str) -> Way | None:
    """Returns the way of a solution by its first formula with a result; None if it has none."""
    left, equals, _ = solution.partition("$")[2].partition("=")
    if not equals:
        return None
    return "apart" if "\\times" in left else "together"
