"""Tiny problems: the same everywhere, in disjoint splits, with answers confirmed independently."""

import hashlib
import random
import re
from fractions import Fraction
from itertools import islice

import pytest

from paint_engine.prompts.anchors import extract_anchors
from paint_engine.rewards.boxes import extract_boxed
from paint_engine.tiny.problems import (
    PRETRAIN_BUCKETS,
    SPLIT_BUCKETS,
    SPLIT_SIZES,
    WordProblem,
    draw_drill,
    draw_problem,
    load_split,
    render_solution,
)
from paint_engine.tiny.stories import FAMILIES, Plan, Step

_FORMULA = re.compile(r"\$([^$]*=[^$]*)\$")
_FRACTION = re.compile(r"\\frac\{(-?\d+)\}\{(-?\d+)\}")
_PLAIN = re.compile(r"(-?\d+) ([+-]|\\times) (-?\d+)")
_PERCENT = re.compile(r"\\frac\{(\d+)\}\{100\} \\times (-?\d+)")


def value_of(expression: str) -> Fraction:
    """What a formula's left side comes to, exactly; the generator's own code is not used."""
    if match := _PERCENT.fullmatch(expression):
        return Fraction(int(match[1]), 100) * int(match[2])
    if match := _FRACTION.fullmatch(expression):
        return Fraction(int(match[1]), int(match[2]))
    match = _PLAIN.fullmatch(expression)
    assert match is not None, expression
    left, right = int(match[1]), int(match[3])
    return Fraction({"+": left + right, "-": left - right, "\\times": left * right}[match[2]])


def formulas(solution: str) -> list[tuple[Fraction, int]]:
    """(value of the left side, number written on the right) of each formula."""
    pairs = (text.rsplit(" = ", 1) for text in _FORMULA.findall(solution))
    return [(value_of(left), int(right)) for left, right in pairs]


def drawn(count: int, seed: int = 1) -> list[WordProblem]:
    rng = random.Random(seed)
    return [draw_problem(rng) for _ in range(count)]


def test_the_evaluator_knows_a_wrong_formula() -> None:
    solution = "A $3 \\times 4 = 12$, b $\\frac{25}{100} \\times 12 = 3$, c $\\frac{9}{2} = 4$."
    assert [left == right for left, right in formulas(solution)] == [True, True, False]


@pytest.mark.parametrize(
    ("split", "digest"),
    [
        ("test", "acf1be6c886943da"),
        ("validation", "4a3b0690a8979de5"),
        ("train", "a599b390232ca3e7"),
    ],
)
def test_a_split_is_the_same_on_every_machine(split: str, digest: str) -> None:
    problems = load_split(split)
    assert len(problems) == SPLIT_SIZES[split]
    # As they were written before problems had more fields, which are empty here.
    texts = (
        f"Problem(problem_id={p.problem_id!r}, problem={p.problem!r}, solution={p.solution!r}, "
        f"answer={p.answer!r})"
        for p in problems
    )
    written = f"[{', '.join(texts)}]"
    assert hashlib.sha256(written.encode()).hexdigest()[:16] == digest


def test_a_prefix_is_the_beginning_of_the_whole() -> None:
    whole = load_split("validation")
    assert load_split("validation", 7) == whole[:7]
    assert load_split("validation", 10_000) == whole
    load_split("validation").clear()
    assert load_split("validation") == whole, "a caller's list must not be the cache itself"


def test_an_unknown_split_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no split 'dev'.*'test', 'train', 'validation'"):
        load_split("dev")


def _arithmetic(solution: str) -> tuple[str, ...]:
    return tuple(_FORMULA.findall(solution))


def test_splits_and_pretraining_share_no_arithmetic() -> None:
    buckets = [set(r) for r in SPLIT_BUCKETS.values()] + [set(PRETRAIN_BUCKETS)]
    assert sum(map(len, buckets)) == len(set().union(*buckets)) == 64
    seen: dict[str, set[tuple[str, ...]]] = {}
    for split in SPLIT_BUCKETS:
        problems = load_split(split)
        seen[split] = {_arithmetic(p.solution) for p in problems}
        assert len({p.problem for p in problems}) == len(problems)
    pretraining = [p for p in drawn(3000) if p.bucket in PRETRAIN_BUCKETS]
    rng = random.Random(2)
    seen["pretraining"] = {_arithmetic(render_solution(p, rng)) for p in pretraining}
    names = list(seen)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            assert not seen[first] & seen[second], (first, second)


def test_the_bucket_ignores_names_and_wording() -> None:
    steps = (Step("*", 4, 12, ("what Mia picks",)), Step("-", -1, 15, ("what is left",)))
    renamed = (Step("*", 4, 12, ("what Tom picks",)), Step("-", -1, 15, ("the rest",)))
    plans = [Plan("harvest", ("Mia picks",), steps), Plan("harvest", ("Tom picks",), renamed)]
    assert plans[0].key == plans[1].key
    assert WordProblem("a", plans[0], 33).bucket == WordProblem("b", plans[1], 33).bucket
    others = [Plan("harvest", ("Mia",), (Step("*", 4, n, ("x",)), steps[1])) for n in range(40)]
    assert len({WordProblem("a", plan, 1).bucket for plan in others}) > 10


@pytest.mark.parametrize("split", list(SPLIT_BUCKETS))
def test_solutions_are_right_by_an_independent_evaluator(split: str) -> None:
    for problem in islice(load_split(split), 500):
        steps = formulas(problem.solution)
        assert 3 <= len(steps) <= 6
        assert all(left == right for left, right in steps), problem.solution
        assert problem.answer == str(steps[-1][1])
        assert extract_boxed(problem.solution) == problem.answer
        # One box, in the last line.
        assert problem.solution.count("\\boxed") == 1
        assert "\\boxed" in problem.solution.splitlines()[-1]
        assert len(problem.solution.splitlines()) == len(steps) + 1
        assert len(extract_anchors(problem.solution)) > len(steps)


def test_solutions_use_only_numbers_of_the_story_and_earlier_results() -> None:
    for problem in load_split("test"):
        known = {int(n) for n in re.findall(r"\d+", problem.problem)}
        # Twice, half, third, quarter, fifth and the two sides of a fence; hundredths of a percent.
        known |= {2, 3, 4, 5, 100}
        for formula in _FORMULA.findall(problem.solution):
            left, result = formula.rsplit(" = ", 1)
            operands = {int(n) for n in re.findall(r"\d+", left)}
            assert operands <= known, (formula, problem.problem)
            known.add(int(result))


def test_every_number_of_the_story_is_needed() -> None:
    for problem in load_split("test"):
        used = set(re.findall(r"\d+", " ".join(_FORMULA.findall(problem.solution))))
        assert set(re.findall(r"\d+", problem.problem)) <= used, problem


def test_the_story_does_not_tell_the_answer() -> None:
    told = sum(
        problem.answer in re.findall(r"\d+", problem.problem) for problem in load_split("test")
    )
    assert told < 0.1 * SPLIT_SIZES["test"]


def test_clean_renderings_vary_in_words_and_agree_in_numbers() -> None:
    rng = random.Random(3)
    for problem in drawn(30):
        texts = {render_solution(problem, rng) for _ in range(8)}
        assert len(texts) > 1
        assert len({_arithmetic(text) for text in texts}) == 1
        assert {extract_boxed(text) for text in texts} == {str(problem.answer)}


@pytest.mark.parametrize("rate", [0.0, 0.12, 0.5, 1.0])
def test_slips_come_at_their_rate(rate: float) -> None:
    rng = random.Random(4)
    slips = [
        # A division made inexact by an earlier slip is rounded down: that is no slip.
        left // 1 != right
        for problem in drawn(600)
        for left, right in formulas(render_solution(problem, rng, slip_rate=rate))
    ]
    share = sum(slips) / len(slips)
    # Five standard deviations.
    assert abs(share - rate) <= 5 * (rate * (1 - rate) / len(slips)) ** 0.5


def test_slips_are_carried_on_to_the_box() -> None:
    rng = random.Random(5)
    num_wrong = 0
    for problem in drawn(400):
        text = render_solution(problem, rng, slip_rate=0.3)
        clean = formulas(render_solution(problem, rng))
        written = formulas(text)
        assert extract_boxed(text) == str(written[-1][1])
        first = next((i for i, (left, right) in enumerate(written) if left // 1 != right), None)
        if first is None:
            assert written == clean
            continue
        # Before the slip the clean solution; after it, operands that hold the wrong number.
        assert written[:first] == clean[:first]
        num_wrong += written[-1][1] != problem.answer
    assert num_wrong > 150


def test_a_slip_is_used_by_the_steps_that_refer_to_it() -> None:
    steps = (
        Step("*", 4, 12, ("x",)),
        Step("-", -1, 15, ("x",)),
        Step("+", -2, -1, ("x",)),
    )
    problem = WordProblem("", Plan("p", (), steps), 81)
    for seed in range(50):
        text = render_solution(problem, random.Random(seed), slip_rate=0.4)
        first, second, third = (f.rsplit(" = ", 1) for f in _FORMULA.findall(text))
        assert second[0] == f"{first[1]} - 15"
        assert third[0] == f"{second[1]} + {first[1]}"


def test_every_family_is_drawn_about_equally_often() -> None:
    families = [problem.plan.family.split("-")[0] for problem in drawn(1200)]
    counts = {name: families.count(name) for name in set(families)}
    assert len(counts) == len(FAMILIES)
    assert min(counts.values()) > 0.7 * 1200 / len(FAMILIES)


def test_drills_are_right_small_and_of_every_operator() -> None:
    rng = random.Random(6)
    lines = [line for _ in range(60) for line in draw_drill(rng).splitlines()]
    assert len(lines) == 60 * 16
    for line in lines:
        ((left, right),) = formulas(line)
        assert left == right, line
        assert 0 < right <= 600
    for operator in (" + ", " - ", " \\times ", "\\frac{", "{100}"):
        assert sum(operator in line for line in lines) > 60, operator
