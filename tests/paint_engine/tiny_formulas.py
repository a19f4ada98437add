"""Reads the formulas of tiny solutions, without the generator's own code."""

import random
import re
from fractions import Fraction

from paint_engine.tiny.problems import WordProblem, draw_problem

_FORMULA = re.compile(r"\$([^$]*=[^$]*)\$")


def value_of(expression: str) -> Fraction:
    """What a formula's left side comes to, exactly; the generator's own code is not used."""
    if match := re.fullmatch(r"\\frac\{(.*)\}\{(.*)\}", expression):
        return value_of(match[1]) / value_of(match[2])
    total = Fraction(0)
    for sign, term in re.findall(r"([+-]?)((?:\d+\\times )*\d+)", expression):
        product = Fraction(1)
        for factor in term.split("\\times "):
            product *= int(factor)
        total += -product if sign == "-" else product
    return total


def formulas(solution: str) -> list[tuple[Fraction, int]]:
    """(value of the left side, number written on the right) of each formula."""
    pairs = (text.rsplit("=", 1) for text in _FORMULA.findall(solution))
    return [(value_of(left), int(right)) for left, right in pairs]


def drawn(count: int, seed: int = 1) -> list[WordProblem]:
    rng = random.Random(seed)
    return [draw_problem(rng) for _ in range(count)]
