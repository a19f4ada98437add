"""Exact numbers: what is read, the limits of size, and the rule for decimals."""

import time
from fractions import Fraction

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from paint_engine.rewards.answers import exact
from paint_engine.rewards.answers.exact import equal_numbers, is_finite_decimal, read_number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12),
        (r"3\frac12", Fraction(7, 2)),
        ("-3^2", -9),
        ("2^-3", Fraction(1, 8)),
        ("3/2^2", Fraction(3, 4)),
        ("1/2/3", Fraction(1, 6)),
        ("5!!", 15),
        ("2^{3}!", 40320),
        (r"\sqrt[3]{27}", 3),
        ("1e-07", Fraction(1, 10**7)),
        (".5e3", 500),
        ("101_2", 5),
        (r"1010 \text{ (base 2)}", 10),
        ("FF_{16}", 255),
        ("0x1f", 31),
        (r"5 \cdot -3", -15),
        ("|-5|", 5),
    ],
)
def test_numbers_are_read(text: str, value: Fraction) -> None:
    number = read_number(text)
    assert number is not None and number.value == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "2 3",
        r"\sqrt{2}",
        "1/0",
        "2023_2",
        "A_{16}",
        "2^3^2",
        "(1",
        "1)",
        "1+",
        r"\frac{1}",
    ],
)
def test_other_texts_are_no_numbers(text: str) -> None:
    assert read_number(text) is None


def test_the_modulus_of_large_numbers_is_prime() -> None:
    assert sympy.isprime(exact.PRIME) and exact.PRIME.bit_length() == 510


@pytest.mark.parametrize(
    ("first", "second", "equal"),
    [
        ("3^{10^{30}}", r"3 \cdot 3^{10^{30}-1}", True),
        ("3^{10^{30}}", "3^{10^{30}+1}", False),
        ("100000!", r"100000 \cdot 99999!", True),
        ("100000!", "100001!", False),
        (r"\binom{100000}{50000}", r"\binom{100000}{49999}", False),
        (r"\binom{10^{40}}{3}", r"\binom{10^{40}}{10^{40}-3}", True),
        ("2^{-1000000}", "0", False),
        ("10^{10^{10}}", "10^{10^{11}}", False),
        ("9^{9^{9^{9}}}", "9^{9^{9^{8}}}", None),
        ("9^{9^{9^{9}}}", "9^{9^{9^{9}}}", True),
        ("((10!)!)!", "1", None),
    ],
)
def test_large_numbers_are_compared_without_being_computed(
    first: str, second: str, equal: bool | None
) -> None:
    numbers = read_number(first), read_number(second)
    assert numbers[0] is not None and numbers[1] is not None
    start = time.process_time()
    assert equal_numbers(numbers[0], numbers[1]) is equal
    assert time.process_time() - start < 5.0


HOSTILE = {
    "tower": "^{9".join("9" for _ in range(100)) + "}" * 99,
    "nested brackets": "(" * 990 + "1" + ")" * 990,
    "nested braces": "{" * 900 + "1" + "}" * 900,
    "factorials": "3" + "!" * 1000,
    "sums": "+".join("1/7" for _ in range(400)),
    "fractions": r"\frac{1}{1+" * 150 + "1" + "}" * 150,
    "powers": "*".join(f"{n}^{{3000}}" for n in range(2, 150)),
    "roots": r"\sqrt[64]{" + "9" * 1900 + "}",
    "digits": "9" * 2000 + "!",
    "exponent": "2^{" + "9" * 1900 + "}",
    "scientific": "1e999999",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_numbers_end_in_time(name: str) -> None:
    start = time.process_time()
    number, one = read_number(HOSTILE[name]), read_number("1")
    assert one is not None
    assert number is None or equal_numbers(number, one) is not True
    assert time.process_time() - start < 5.0


@given(st.integers(-(10**9), 10**9), st.integers(1, 10**6), st.integers(6, 30))
def test_a_fraction_is_its_decimal_to_the_digits_shown(
    numerator: int, denominator: int, places: int
) -> None:
    value = Fraction(numerator, denominator)
    scaled = abs(value) * 10**places
    first, fraction = read_number(f"\\frac{{{numerator}}}{{{denominator}}}"), value
    assert first is not None
    for cut in (int(scaled), int(scaled + Fraction(1, 2)), int(scaled) + 3):
        digits = str(cut).zfill(places + 1)
        text = f"{'-' if fraction < 0 else ''}{digits[:-places]}.{digits[-places:]}"
        second = read_number(text)
        assert second is not None
        is_long = len(str(cut)) >= exact.MIN_SHOWN_DIGITS and cut > 0
        is_shown = cut != int(scaled) + 3 and is_long and not is_finite_decimal(value)
        assert equal_numbers(first, second) is (Fraction(text) == value or is_shown)
