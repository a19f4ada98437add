"""Families of stories: two ways that use what is told, and meet in the same total."""

import random
import re

import pytest

from paint_engine.tiny.stories import FAMILIES, WAYS, Family, Plan, draw_draft, write_plan


def draw_plan(rng: random.Random, family: Family) -> Plan:
    return write_plan(draw_draft(rng, family))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_each_way_uses_every_number_told_and_every_result_known(family: Family) -> None:
    rng = random.Random(7)
    for _ in range(200):
        plan = draw_plan(rng, family)
        told = {int(n) for n in re.findall(r"\d+", " ".join(plan.story))}
        for way in WAYS:
            operands = [n for s in plan.ways[way] for n in (s.left, s.right)]
            known: set[str] = set()
            for step in plan.ways[way]:
                assert {n for n in (step.left, step.right) if isinstance(n, str)} <= known
                known.add(step.role)
            assert {n for n in operands if isinstance(n, int)} == told
            # A result that no later step uses would be a step for nothing.
            assert {n for n in operands if isinstance(n, str)} == known - {"answer"}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_the_ways_share_their_steps_from_the_total_on(family: Family) -> None:
    plan = draw_plan(random.Random(8), family)
    together, apart = (plan.ways[way] for way in WAYS)
    assert together[-3:] == apart[-3:]
    assert [s.role for s in together[:-3]] == ["at_a_time", "total"]
    assert [s.role for s in apart[:-3]] == ["first", "second", "total"]
    for way in WAYS:
        grouped = [role for line in plan.lines[way] for role in line]
        assert grouped == [step.role for step in plan.ways[way]]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_stories_end_with_one_question_and_repeat_for_one_seed(family: Family) -> None:
    first, second = (draw_plan(random.Random(9), family) for _ in range(2))
    assert first == second
    variants = set()
    for seed in range(100):
        plan = draw_plan(random.Random(seed), family)
        text = " ".join(plan.story)
        assert text.count("?") == 1 and text.endswith("?")
        assert "{" not in text
        assert plan.key[0] == plan.family
        variants.add(plan.family)
    # What is taken away comes first or last; each has two endings.
    assert len(variants) == 4


def test_families_call_each_result_by_a_name_of_its_own() -> None:
    for family in FAMILIES:
        labels = [*family.words, *(ending.label for ending in family.endings)]
        assert len(set(labels)) == len(labels), family.name
