"""Tiny problems: the same everywhere, in disjoint splits, with answers confirmed independently."""

import hashlib
import random
import re
from itertools import islice

import pytest
from tiny_formulas import drawn, formulas

from paint_engine.prompts.anchors import extract_anchors
from paint_engine.rewards.boxes import extract_boxed
from paint_engine.tiny import problems
from paint_engine.tiny.problems import (
    PRETRAIN_BUCKETS,
    SPLIT_BUCKETS,
    SPLIT_SIZES,
    WordProblem,
    draw_drill,
    draw_split,
    load_split,
    render_reference,
    true_values,
    way_of,
)
from paint_engine.tiny.stories import FAMILIES, WAYS, Plan, Step


def test_the_evaluator_knows_a_wrong_formula() -> None:
    solution = "$3\\times 4=12$, $\\frac{9}{2}=4$, $6\\times 20-6\\times 7=78$, $5-9=-4$"
    assert [left == right for left, right in formulas(solution)] == [True, False, True, True]


@pytest.mark.parametrize(
    ("split", "digest"),
    [
        ("test", "66c5c7b48a274fcd"),
        ("validation", "7a4b5c31d98728a0"),
        ("train", "d0193b407ae3c559"),
    ],
)
def test_a_split_is_the_same_on_every_machine(split: str, digest: str) -> None:
    problems = load_split(split)
    assert len(problems) == SPLIT_SIZES[split]
    texts = "\n".join(f"{p.problem_id} {p.problem} {p.solution} {p.answer}" for p in problems)
    assert hashlib.sha256(texts.encode()).hexdigest()[:16] == digest


def test_a_split_is_drawn_as_far_as_it_is_read() -> None:
    problems._begun.cache_clear()
    first = draw_split("validation", 7)
    assert len(problems._begun("validation")[0]) == 7
    whole = draw_split("validation")
    assert len(whole) == SPLIT_SIZES["validation"] and whole[:7] == first
    assert draw_split("validation", 10_000) == whole
    draw_split("validation").clear()
    assert draw_split("validation") == whole, "a caller's list must not be the cache itself"
    assert load_split("validation", 7) == load_split("validation")[:7]


def test_an_unknown_split_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no split 'dev'.*'test', 'train', 'validation'"):
        load_split("dev")


def test_splits_and_pretraining_share_no_arithmetic_within_a_family() -> None:
    buckets = [set(r) for r in SPLIT_BUCKETS.values()] + [set(PRETRAIN_BUCKETS)]
    assert sum(map(len, buckets)) == len(set().union(*buckets)) == 64
    seen = {}
    for split in SPLIT_BUCKETS:
        problems = draw_split(split)
        seen[split] = {p.plan.key for p in problems}
        assert len({p.text for p in problems}) == len(seen[split]) == SPLIT_SIZES[split]
    seen["pretraining"] = {p.plan.key for p in drawn(3000) if p.bucket in PRETRAIN_BUCKETS}
    names = list(seen)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            assert not seen[first] & seen[second], (first, second)
    # What a run trains on and is tested on shares none across families, either.
    arithmetic = {name: {key[1:] for key in keys} for name, keys in seen.items()}
    assert not arithmetic["train"] & (arithmetic["test"] | arithmetic["validation"])


def test_the_bucket_ignores_names_and_wording() -> None:
    def plan(name: str, factor: int) -> Plan:
        steps = (Step("total", "*", 4, factor, f"what {name} picks"),)
        return Plan("harvest", (f"{name} picks",), {"together": steps, "apart": steps}, {})

    assert plan("Mia", 12).key == plan("Tom", 12).key
    first, second = WordProblem("a", plan("Mia", 12), 48), WordProblem("b", plan("Tom", 12), 48)
    assert first.bucket == second.bucket
    assert len({WordProblem("a", plan("Mia", n), 1).bucket for n in range(40)}) > 10


@pytest.mark.parametrize("split", list(SPLIT_BUCKETS))
def test_references_are_right_terse_and_go_one_way(split: str) -> None:
    for problem in islice(load_split(split), 500):
        lines = formulas(problem.solution)
        assert len(lines) == 4
        assert all(left == right for left, right in lines), problem.solution
        assert problem.answer == str(lines[-1][1]) == extract_boxed(problem.solution)
        assert problem.solution.splitlines()[-1] == f"$\\boxed{{{problem.answer}}}$"
        assert way_of(problem.solution) == "together"
        assert len(extract_anchors(problem.solution)) > len(lines)


def test_both_ways_give_the_answer_and_are_told_apart() -> None:
    for problem in drawn(300):
        for way in WAYS:
            reference = render_reference(problem.plan, way)
            assert all(left == right for left, right in formulas(reference)), reference
            assert extract_boxed(reference) == str(problem.answer)
            assert way_of(reference) == way
            results = [right for _, right in formulas(reference)]
            values = true_values(problem.plan, way)
            assert results == [values[roles[-1]] for roles in problem.plan.lines[way]]
    assert way_of("no formula") is None
    assert way_of("The answer is $\\boxed{12}$.") is None


def test_results_are_whole_positive_and_within_reach() -> None:
    for problem in drawn(300):
        for way in WAYS:
            values = true_values(problem.plan, way)
            # The largest is a product of one part alone.
            assert all(0 < value <= 9 * 40 for value in values.values()), values
            assert all(right > 0 for _, right in formulas(render_reference(problem.plan, way)))


def test_the_story_does_not_tell_the_answer() -> None:
    told = sum(
        problem.answer in re.findall(r"\d+", problem.problem) for problem in load_split("test")
    )
    assert told < 0.1 * SPLIT_SIZES["test"]


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
        assert 0 < right <= 300
    for operator in ("+", "-", "\\times ", "\\frac{"):
        assert sum(operator in line for line in lines) > 60, operator
