"""The writer of the pretraining's solutions: where he slips, what he checks and what he copies."""

import random
import re
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_formulas import drawn, formulas

from paint_engine.prompts.masking import OMISSION_MARKER, PLACEMENTS, mask_solution
from paint_engine.rewards.boxes import extract_boxed
from paint_engine.tiny.problems import draw_problem, render_reference, true_values, way_of
from paint_engine.tiny.stories import WAYS
from paint_engine.tiny.writer import (
    CHECK,
    Habits,
    is_hard,
    slip,
    visible_roles,
    write_solution,
    write_terse,
)

FLAWLESS = Habits(slip=0.0, confirmed_slip=0.0)
UNCHECKED = replace(FLAWLESS, careful=0.0)
RECKLESS = Habits(slip=0.3, careful=0.0)
RECKLESS_BUT_TOLD = replace(RECKLESS, confirmed_slip=0.0)
CAREFUL = Habits(slip=0.3, careful=1.0, check=1.0)


def test_without_slips_every_solution_is_right_by_either_way() -> None:
    rng = random.Random(1)
    for problem in drawn(200):
        for way in WAYS:
            text = write_solution(problem.plan, way, rng, FLAWLESS)
            assert all(left == right for left, right in formulas(text)), text
            assert extract_boxed(text) == str(problem.answer)
            assert way_of(text) == way
            assert "not" not in text


def test_slips_are_carried_on_to_the_box() -> None:
    rng = random.Random(2)
    num_wrong = 0
    for problem in drawn(300):
        way = rng.choice(WAYS)
        steps = formulas(write_solution(problem.plan, way, rng, RECKLESS))
        clean = formulas(write_solution(problem.plan, way, rng, UNCHECKED))
        first = next((i for i, (left, right) in enumerate(steps) if left // 1 != right), None)
        num_wrong += first is not None
        # Before the slip the clean solution; after it, operands that hold the wrong number.
        assert steps[:first] == clean[:first]
        if first is not None and first + 1 < len(steps):
            assert steps[first + 1] != clean[first + 1]
    assert num_wrong > 150


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_slips_come_at_their_rate_by_digit(rate: float) -> None:
    rng = random.Random(3)
    digits = [
        a != b
        for number in range(100, 1000)
        for a, b in zip(str(number), str(slip(number, rate, rng)), strict=True)
    ]
    share = sum(digits) / len(digits)
    # Five standard deviations.
    assert abs(share - rate) <= 5 * (rate * (1 - rate) / len(digits)) ** 0.5


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.integers(-999, 999), st.integers(0, 10))
def test_a_slip_keeps_the_length_and_has_one_alternative_at_each_digit(
    number: int, seed: int
) -> None:
    slipped = slip(number, 1.0, random.Random(seed))
    assert len(str(slipped)) == len(str(number))
    assert slipped == slip(number, 1.0, random.Random(seed + 1))
    for a, b in zip(str(number).lstrip("-"), str(slipped).lstrip("-"), strict=True):
        assert abs(int(a) - int(b)) == 1


def test_a_careful_writer_mends_what_he_got_wrong() -> None:
    rng = random.Random(4)
    num_mended = 0
    for problem in drawn(200):
        text = write_solution(problem.plan, rng.choice(WAYS), rng, CAREFUL)
        # Slips are in harder results alone, and all of these are checked.
        assert extract_boxed(text) == str(problem.answer), text
        for before, line in pairwise(text.splitlines()):
            if line.startswith(CHECK):
                ((left, right),) = formulas(before)
                assert formulas(line) == [(left, left)]
                num_mended += left != right
    assert num_mended > 200


def test_slips_and_checks_are_of_harder_results_alone() -> None:
    rng = random.Random(5)
    always = Habits(slip=1.0, careful=1.0, check=1.0)
    for problem in drawn(200):
        for line in write_solution(problem.plan, rng.choice(WAYS), rng, always).splitlines():
            if line.startswith("The answer") or line.startswith(CHECK):
                continue
            ((left, right),) = formulas(line)
            numbers = [int(n) for n in re.findall(r"\d+", line)][:2]
            multiplies = "times" in line
            easy = multiplies and (max(numbers) < 10 or any(n % 10 == 0 for n in numbers))
            easy = easy or (
                not multiplies and "frac" not in line and any(n % 10 == 0 for n in numbers)
            )
            assert (left == right) == easy, line
    assert is_hard("/", 40, 4) and not is_hard("*", 4, 30) and is_hard("*", 4, 13)


def test_a_result_that_the_reference_shows_is_copied() -> None:
    rng = random.Random(6)
    # He slips wherever nothing confirms the result, and what is copied stays right.
    habits = Habits(slip=1.0, confirmed_slip=0.0, careful=0.0)
    num_slips = 0
    for problem in drawn(100):
        text = write_solution(problem.plan, "apart", rng, habits, frozenset({"then", "answer"}))
        results = [right for _, right in formulas(text)]
        truth = true_values(problem.plan, "apart")
        assert results[-2:] == [truth["then"], truth["answer"]]
        num_slips += results[-3] != truth["after"]
        assert extract_boxed(text) == str(problem.answer)
        # The line that shows "after" has taken the total on its way.
        text = write_solution(problem.plan, "together", rng, habits, frozenset({"after"}))
        assert formulas(text)[1][1] == true_values(problem.plan, "together")["total"]
    assert num_slips > 50


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.integers(0, 1000), st.floats(0, 1), st.sampled_from(PLACEMENTS), st.sampled_from(WAYS))
def test_the_roles_in_sight_are_those_of_the_results_that_the_mask_leaves(
    seed: int, ratio: float, placement, way
) -> None:
    rng = random.Random(seed)
    plan = draw_problem(rng).plan
    whole = render_reference(plan, way)
    shown = mask_solution(whole, ratio, placement=placement, generator=rng, marker=OMISSION_MARKER)
    # Each character of the reference, or None where it is hidden.
    head, marker, tail = shown.partition(OMISSION_MARKER)
    num_hidden = len(whole) - len(head) - len(tail)
    seen = [*head, *([None] * num_hidden), *tail]
    assert len(seen) == len(whole) or not marker
    expected, place = set(), 0
    roles = [*(line[-1] for line in plan.lines[way]), "answer"]
    for line, role in zip(whole.splitlines(), roles, strict=True):
        first = place + (line.index("=") + 1 if "=" in line else 0)
        if None not in seen[first : place + len(line)]:
            expected.add(role)
        place += len(line) + 1
    assert visible_roles(plan, way, shown) == expected


def test_a_terse_solution_has_the_form_of_a_reference_and_its_own_slips() -> None:
    rng = random.Random(7)
    num_wrong = 0
    for problem in drawn(200):
        for way in WAYS:
            reference = render_reference(problem.plan, way)
            assert write_terse(problem.plan, way, rng, FLAWLESS) == reference
            text = write_terse(problem.plan, way, rng, RECKLESS)
            first, second = formulas(reference)[0], formulas(text)[0]
            # The first formula has the numbers of the story, whatever comes to be written.
            assert first[0] == second[0]
            assert len(formulas(text)) == len(formulas(reference))
            num_wrong += extract_boxed(text) != str(problem.answer)
            # A line of the reference that is in sight is copied, whatever came before.
            copied = write_terse(problem.plan, way, rng, RECKLESS_BUT_TOLD, frozenset({"answer"}))
            assert extract_boxed(copied) == str(problem.answer)
    assert num_wrong > 200
