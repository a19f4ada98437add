"""Random answers, compared with exact arithmetic as the oracle.

ANSWER_PAIRS=5000 python -m pytest tests/paint_engine/rewards/answers/test_random_pairs.py
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import comb, factorial
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from paint_engine.rewards.checker import AnswerChecker

NUM_PAIRS = int(os.environ.get("ANSWER_PAIRS", "200"))
many = settings(
    max_examples=NUM_PAIRS,
    deadline=None,
    suppress_health_check=[HealthCheck.filter_too_much],
    database=None,
)


@pytest.fixture(scope="module")
def checker() -> Iterator[AnswerChecker]:
    with AnswerChecker(timeout_s=20.0) as shared:
        yield shared


@dataclass(frozen=True)
class Written:
    """An answer as text, and what it is: a rational, (multiple, radicand), or a structure."""

    text: str
    value: Any


def integer_text(value: int) -> str:
    return str(value)


def fraction_text(value: Fraction) -> str:
    sign = "-" if value < 0 else ""
    return f"{sign}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def digits_in(value: int, base: int) -> str:
    digits = ""
    while value or not digits:
        value, digit = divmod(value, base)
        digits = "0123456789ABCDEF"[digit] + digits
    return digits


small = st.integers(-30, 30)
positive = st.integers(1, 40)
large = st.integers(-(10**60), 10**60)


@st.composite
def powers(draw: DrawFn) -> Written:
    base, exponent = draw(st.integers(2, 12)), draw(st.integers(-120, 120))
    shift = draw(st.sampled_from((0, 0, 1, -1)))
    text = f"{base}^{{{exponent}}}" + (f"{shift:+d}" if shift else "")
    return Written(text, Fraction(base) ** exponent + shift)


@st.composite
def factorials(draw: DrawFn) -> Written:
    n, inverse = draw(st.integers(3, 300)), draw(st.booleans())
    shift = draw(st.sampled_from((0, 0, 1, -1)))
    value = Fraction(1, factorial(n)) if inverse else Fraction(factorial(n))
    text = f"\\frac{{1}}{{{n}!}}" if inverse else f"{n}!"
    return Written(text + (f"{shift:+d}" if shift else ""), value + shift)


@st.composite
def decimals(draw: DrawFn) -> Written:
    value, places = draw(st.integers(-(10**12), 10**12)), draw(st.integers(1, 14))
    digits = str(abs(value)).zfill(places + 1)
    text = f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"
    return Written(text, Fraction(value, 10**places))


@st.composite
def scientific(draw: DrawFn) -> Written:
    mantissa, exponent = draw(st.integers(1, 999)), draw(st.integers(-30, 30))
    value = Fraction(mantissa, 100) * Fraction(10) ** exponent
    text = f"{mantissa // 100}.{mantissa % 100:02d}"
    return Written(f"{text} \\times 10^{{{exponent}}}", value)


@st.composite
def in_bases(draw: DrawFn) -> Written:
    value, base = draw(st.integers(1, 5000)), draw(st.integers(2, 16))
    digits = digits_in(value, base)
    assume(digits[0].isdigit())
    return Written(f"{digits}_{{{base}}}", Fraction(value))


@st.composite
def combined(draw: DrawFn) -> Written:
    first, second = draw(simple), draw(simple)
    match draw(st.sampled_from("+-*/")):
        case "+":
            return Written(f"{first.text}+({second.text})", first.value + second.value)
        case "-":
            return Written(f"{first.text}-({second.text})", first.value - second.value)
        case "*":
            return Written(f"({first.text}) \\cdot ({second.text})", first.value * second.value)
    assume(second.value != 0)
    return Written(f"\\frac{{{first.text}}}{{{second.text}}}", first.value / second.value)


integers = (small | large).map(lambda n: Written(integer_text(n), Fraction(n)))
fractions = st.builds(Fraction, small, positive).map(lambda f: Written(fraction_text(f), f))
binomials = st.tuples(st.integers(0, 80), st.integers(0, 80)).map(
    lambda nk: Written(f"\\binom{{{nk[0]}}}{{{nk[1]}}}", Fraction(comb(*nk)))
)
simple: SearchStrategy[Written] = integers | fractions | powers() | factorials()
numbers: SearchStrategy[Written] = (
    simple | decimals() | scientific() | in_bases() | binomials | combined()
)
exact: SearchStrategy[Written] = simple | in_bases() | binomials


@st.composite
def roots(draw: DrawFn) -> Written:
    """q sqrt(d) + r, with a term that may be tiny."""
    factor, radicand = draw(fractions), draw(st.sampled_from((2, 3, 5, 6, 7, 10)))
    term = draw(simple)
    assume(factor.value != 0)
    text = f"{factor.text}\\sqrt{{{radicand}}}+({term.text})"
    return Written(text, ("root", factor.value, radicand, term.value))


BRACKETS = {"()": ("(", ")"), "[]": ("[", "]"), "(]": ("(", "]"), "[)": ("[", ")")}


@st.composite
def pairs(draw: DrawFn) -> Written:
    """An interval or a point."""
    brackets = draw(st.sampled_from(sorted(BRACKETS)))
    first, second = draw(exact), draw(exact)
    left, right = BRACKETS[brackets]
    value = (brackets, first.value, second.value)
    return Written(f"{left}{first.text}, {second.text}{right}", value)


@st.composite
def tuples(draw: DrawFn) -> Written:
    items = draw(st.lists(exact, min_size=3, max_size=4))
    text = ", ".join(item.text for item in items)
    return Written(f"({text})", ("()", *(item.value for item in items)))


@st.composite
def sets(draw: DrawFn) -> Written:
    items = draw(st.lists(exact, min_size=2, max_size=4))
    assume(len({item.value for item in items}) > 1)
    text = ", ".join(item.text for item in items)
    return Written(f"\\{{{text}\\}}", ("{}", frozenset(item.value for item in items)))


@st.composite
def matrices(draw: DrawFn) -> Written:
    columns = draw(st.integers(1, 3))
    row = st.lists(exact, min_size=columns, max_size=columns)
    rows = draw(st.lists(row, min_size=1, max_size=2))
    assume(len(rows) * columns > 1)
    text = " \\\\ ".join(" & ".join(item.text for item in row) for row in rows)
    value = ("matrix", *(tuple(item.value for item in row) for row in rows))
    return Written(f"\\begin{{pmatrix}}{text}\\end{{pmatrix}}", value)


@st.composite
def bounds(draw: DrawFn) -> Written:
    sign, end = draw(st.sampled_from(("<", ">", "\\le ", "\\ge "))), draw(exact)
    return Written(f"x {sign}{end.text}", ("bound", sign, end.value))


answers: SearchStrategy[Written] = (
    numbers | numbers | roots() | pairs() | tuples() | sets() | matrices() | bounds()
)


@st.composite
def near_pairs(draw: DrawFn) -> tuple[Written, Written]:
    """Two answers that differ little: a step in one number, an end, an order, a base."""
    n, k = draw(st.integers(2, 200)), draw(st.integers(1, 3))
    tiny = draw(st.integers(15, 300))
    value = draw(large)
    kind = draw(st.sampled_from(range(9)))
    swapped = (f"({n}, {n + k})", ("()", n, n + k)), (f"({n + k}, {n})", ("()", n + k, n))
    table = [
        ((f"{n}!", factorial(n)), (f"{n + k}!", factorial(n + k))),
        ((f"\\frac{{1}}{{{n}!}}", Fraction(1, factorial(n))), ("0", Fraction(0))),
        ((f"2^{{-{n}}}", Fraction(1, 2**n)), (f"2^{{-{n + k}}}", Fraction(1, 2 ** (n + k)))),
        ((f"{value}", value), (f"{value + k}", value + k)),
        ((f"{n}+10^{{-{tiny}}}", n + Fraction(1, 10**tiny)), (f"{n}", n)),
        ((f"\\sqrt{{2}}+10^{{-{tiny}}}", ("tiny", tiny)), ("\\sqrt{2}", ("tiny", None))),
        ((f"[{n}, {n + k})", ("[)", n)), (f"[{n}, {n + k}]", ("[]", n))),
        swapped,
        ((f"1{n}_{{10}}", int(f"1{n}")), (f"1{n}_{{{11 + k}}}", int(f"1{n}", 11 + k))),
    ]
    first, second = table[kind]
    return Written(*first), Written(*second)


@many
@given(st.tuples(answers, answers) | near_pairs())
def test_no_unequal_pair_is_judged_equal(
    checker: AnswerChecker, pair: tuple[Written, Written]
) -> None:
    first, second = pair
    assume(first.value != second.value)
    check = checker.check(first.text, f"\\boxed{{{second.text}}}")
    assert not check.correct


@many
@given(positive, st.integers(3, 400), st.integers(1, 30), st.data())
def test_a_decimal_with_a_wrong_last_digit_is_no_fraction(
    checker: AnswerChecker, numerator: int, denominator: int, places: int, data: st.DataObject
) -> None:
    value = Fraction(numerator, denominator)
    scaled = int(value * 10**places)
    # Neither cut nor rounded.
    digits = str(data.draw(st.sampled_from((scaled - 1, scaled + 2)))).zfill(places + 1)
    assume("-" not in digits)
    decimal = f"{digits[:-places]}.{digits[-places:]}"
    assume(Fraction(decimal) != value)
    assert not checker.check(fraction_text(value), f"\\boxed{{{decimal}}}").correct


def rewritten(value: Any) -> SearchStrategy[str]:
    """Other ways to write a value."""
    assert isinstance(value, Fraction)
    ways = [
        st.just(fraction_text(value)),
        positive.map(lambda k: f"\\frac{{{value.numerator * k}}}{{{value.denominator * k}}}"),
        small.map(lambda k: f"{fraction_text(value - k)}+({k})"),
        positive.map(lambda k: f"{k} \\cdot ({fraction_text(value / k)})"),
        st.just(f"x = {fraction_text(value)}"),
        st.just(f"{fraction_text(value)}\\text{{ cm}}"),
        st.just(f"\\left( {fraction_text(value)} \\right)"),
    ]
    if value.denominator == 1:
        ways.append(st.just(f"{value.numerator:,}"))
        ways.append(st.just("".join(chr(0x660 + int(c)) if c.isdigit() else c for c in str(value))))
    if value.denominator == 1 and value > 0:
        ways.append(st.integers(2, 10).map(lambda b: f"{digits_in(int(value), b)}_{{{b}}}"))
    return st.one_of(ways)


@many
@given(numbers, st.data())
def test_equal_numbers_written_otherwise_are_equal(
    checker: AnswerChecker, number: Written, data: st.DataObject
) -> None:
    assume(number.value.numerator.bit_length() + number.value.denominator.bit_length() < 2000)
    other = data.draw(rewritten(number.value))
    check = checker.check(number.text, f"\\boxed{{{other}}}")
    assert check.error is None and check.correct


@many
@given(sets() | tuples() | pairs() | matrices(), st.data())
def test_equal_structures_written_otherwise_are_equal(
    checker: AnswerChecker, answer: Written, data: st.DataObject
) -> None:
    def entry(value: Any) -> str:
        return data.draw(rewritten(value)).removeprefix("x = ").replace(",", "")

    kind, *values = answer.value
    match kind:
        case "{}":
            order = data.draw(st.permutations(sorted(values[0])))
            text = "\\left\\{ " + ", ".join(map(entry, order)) + " \\right\\}"
        case "matrix":
            rows = " \\\\ ".join(" & ".join(map(entry, row)) for row in values)
            text = f"\\begin{{bmatrix}} {rows} \\end{{bmatrix}}"
        case _:
            left, right = BRACKETS[kind]
            text = f"\\left{left} {', '.join(map(entry, values))} \\right{right}"
    check = checker.check(answer.text, f"\\boxed{{{text}}}")
    assume("characters" not in (check.error or ""))
    assert check.error is None and check.correct
