"""Families of stories: plans that refer only to what is known, and words that say what is done."""

import random
import re

import pytest

from paint_engine.tiny.stories import FAMILIES

_WORDS = {
    2: ("twice", "half", "Half", "all around"),
    3: ("A third",),
    4: ("A quarter",),
    5: ("A fifth",),
}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__.strip("_"))
def test_plans_refer_only_to_numbers_told_and_results_known(family) -> None:
    rng = random.Random(7)
    for _ in range(200):
        plan = family(rng)
        text = " ".join(plan.story)
        numbers = {int(n) for n in re.findall(r"\d+", text)}
        for place, step in enumerate(plan.steps):
            for operand in (step.left, step.right):
                if operand < 0:
                    assert -operand - 1 < place, (plan.family, place)
                else:
                    words = _WORDS.get(operand, ())
                    assert operand in numbers or any(w in text for w in words), (operand, text)
        # A result that no later step uses would be a step for nothing.
        used = {-o - 1 for s in plan.steps for o in (s.left, s.right) if o < 0}
        assert used == set(range(len(plan.steps) - 1)), plan.family


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__.strip("_"))
def test_stories_end_with_one_question_and_repeat_for_one_seed(family) -> None:
    first, second = (family(random.Random(9)) for _ in range(2))
    assert first == second
    variants = set()
    for seed in range(100):
        plan = family(random.Random(seed))
        text = " ".join(plan.story)
        assert text.count("?") == 1 and text.endswith("?")
        assert "{" not in text
        assert all(len(set(step.labels)) >= 2 for step in plan.steps)
        variants.add(plan.family)
    assert len(variants) >= 2


def test_the_variant_is_part_of_the_key() -> None:
    rng = random.Random(10)
    for family in FAMILIES:
        plans = [family(rng) for _ in range(50)]
        for plan in plans:
            assert plan.key[0] == plan.family
            assert len(plan.key) == 1 + len(plan.steps)
