"""A fallible writer, whose solutions the base is pretrained on.

The writer puts one step on a line, in either way. Without a reference, digits of a harder result
can be wrong, and later steps use the wrong result. Some solutions are careful: a check computes a
harder result a second time, and later steps use the second result. Slips and checks are rarer where
a visible part of a reference confirms a result. A reference to another problem changes nothing.
"""

import random
from collections.abc import Set
from dataclasses import dataclass

from paint_engine.prompts.masking import OMISSION_MARKER
from paint_engine.tiny.problems import (
    apply_operator,
    combined_side,
    formula,
    operands_of,
    render_reference,
    terse_lines,
    terse_text,
    true_values,
)
from paint_engine.tiny.stories import Operator, Plan, Way

CHECK = "Check"
"""the word that begins a check, and occurs nowhere else"""

# A line of a reference that shows one of these results confirms the step.
_CONFIRMED_BY = {"total": ("total", "after")}


@dataclass(frozen=True)
class Habits:
    """The rates of the writer, as shares.

    slip, confirmed_slip: of the digits of harder results that are written wrong, where he works
        alone and where a reference confirms the result. The first lies above the 5% that top-p 0.95
        cuts off, the second below it; their distance is near what the clip at 0.06 lets pass
        (docs/decisions.md).
    careful: of the solutions that have checks at all.
    check, confirmed_check: of the harder results in them that are checked.
    """

    slip: float = 0.09
    confirmed_slip: float = 0.028
    careful: float = 0.5
    check: float = 0.5
    confirmed_check: float = 0.25


def visible_roles(plan: Plan, way: Way, shown: str) -> frozenset[str]:
    """Returns the roles whose results are still in a reference after a part was hidden.

    shown: the reference of `render_reference`, with one block replaced by the marker or none.
    """
    whole = render_reference(plan, way)
    head, marker, tail = shown.partition(OMISSION_MARKER)
    hidden = range(len(head), len(whole) - len(tail)) if marker else range(0)
    roles, end = set(), 0
    for line, role in zip(
        whole.split("\n"), (*(r[-1] for r in plan.lines[way]), "answer"), strict=True
    ):
        start = end + line.rfind("=") + 1
        end += len(line)
        if not hidden or end <= hidden.start or start >= hidden.stop:
            roles.add(role)
        end += 1
    return frozenset(roles)


def is_hard(op: Operator, left: int, right: int) -> bool:
    """Returns whether the writer slips and checks here: no number of a sum or difference ends in
    0, or a number above 9 is multiplied, not a multiple of ten, or any is divided."""
    if op in "+-":
        return left % 10 != 0 and right % 10 != 0
    return op == "/" or (max(left, right) > 9 and left % 10 != 0 and right % 10 != 0)


def slip(result: int, rate: float, rng: random.Random) -> int:
    """Returns the result with each digit wrong with probability `rate`: an odd one is 1 less, an
    even one 1 more. A 1 in front becomes 2.

    One wrong digit at each place, so that it stays likely enough to be drawn with top-p 0.95.
    """
    digits = [int(digit) for digit in str(abs(result))]
    for place, digit in enumerate(digits):
        if rng.random() < rate:
            is_lowest = place == 0 and digit == 1
            digits[place] = digit - 1 if digit % 2 and not is_lowest else digit + 1
    return int("".join(map(str, digits))) * (-1 if result < 0 else 1)


def _put_down(
    exact: int,
    shown: int | None,
    rng: random.Random,
    habits: Habits,
    *,
    hard: bool,
    confirmed: bool,
) -> int:
    """Returns what the writer writes for a result: the reference's number if it shows one, whatever
    was written before, else his own. Harder results get slips."""
    result = exact if shown is None else shown
    if not hard:
        return result
    return slip(result, habits.confirmed_slip if confirmed else habits.slip, rng)


def write_solution(
    plan: Plan, way: Way, rng: random.Random, habits: Habits, visible: Set[str] = frozenset()
) -> str:
    """Writes a solution.

    visible: the roles whose results a reference shows.
    """
    truth = true_values(plan, way)
    is_careful = rng.random() < habits.careful
    written: dict[str, int] = {}
    lines: list[str] = []
    for step in plan.ways[way]:
        left, right = operands_of(step, written)
        exact = apply_operator(step.op, left, right)
        shown = truth[step.role] if step.role in visible else None
        confirmed = any(r in visible for r in _CONFIRMED_BY.get(step.role, (step.role,)))
        hard = is_hard(step.op, left, right)
        result = _put_down(exact, shown, rng, habits, hard=hard, confirmed=confirmed)
        label = step.label[0].upper() + step.label[1:]
        left_side = formula(step.op, left, right)
        lines.append(f"{label}: ${left_side}={result}$.")
        rate = habits.confirmed_check if confirmed else habits.check
        is_consistent = shown is None or shown == exact
        if hard and is_careful and is_consistent and rng.random() < rate:
            # Where the line above is wrong, this mends it.
            result = exact
            lines.append(f"{CHECK}: ${left_side}={result}$.")
        written[step.role] = result
    return "\n".join([*lines, f"The answer is $\\boxed{{{written['answer']}}}$."])


def write_terse(
    plan: Plan, way: Way, rng: random.Random, habits: Habits, visible: Set[str] = frozenset()
) -> str:
    """Writes a solution in the form of a reference, without checks; see `write_solution`."""
    truth = true_values(plan, way)
    written: dict[str, int] = {}
    formulas = []
    for steps in terse_lines(plan, way):
        left_side, hard = combined_side(steps, written), False
        for step in steps:
            left, right = operands_of(step, written)
            written[step.role] = apply_operator(step.op, left, right)
            hard = hard or is_hard(step.op, left, right)
        role = steps[-1].role
        shown = truth[role] if role in visible else None
        confirmed = shown is not None
        written[role] = _put_down(written[role], shown, rng, habits, hard=hard, confirmed=confirmed)
        formulas.append(f"{left_side}={written[role]}")
    return terse_text(formulas, written["answer"])
