# ruff: noqa: RUF001 (letters of other scripts are what is tested)
"""Units, currencies, orders of magnitude, and the words that make a bound of a number."""

import pytest

from paint_engine.rewards.answers.units import (
    Quantity,
    are_different_units,
    split_bound,
    split_unit,
)


@pytest.mark.parametrize(
    ("text", "quantity"),
    [
        ("7", Quantity("7")),
        ("7 cm", Quantity("7", "cm")),
        ("7cm", Quantity("7", "cm")),
        ("7 m", Quantity("7", "m")),
        (r"7\text{ cm}^2", Quantity("7", "cm^2")),
        (r"2\sqrt{2}\text{ cm}", Quantity(r"2\sqrt{2}", "cm")),
        ("7 apples", Quantity("7", "apples")),
        (r"\$7", Quantity("7", "$")),
        (r"-\$5", Quantity("-5", "$")),
        ("7€", Quantity("7", "€")),
        ("7个", Quantity("7", "个")),
        ("7 км", Quantity("7", "км")),
        ("7명", Quantity("7", "명")),
        ("3 मीटर", Quantity("3", "मीटर")),
        ("7万人", Quantity("7", "人", 4)),
        (r"7 \text{ million dollars}", Quantity("7", "dollars", 6)),
        (r"90^\circ", Quantity("90", "degree")),
        ("50 percent", Quantity(r"50\%")),
        ("about 7", Quantity("7")),
    ],
)
def test_words_beside_a_number_are_taken_off(text: str, quantity: Quantity) -> None:
    assert split_unit(text) == quantity


@pytest.mark.parametrize(
    "text",
    [
        "7x",
        "7t",
        "7х",
        "7γ",
        "7 sin",
        r"2\mathrm{e}",
        r"1-\frac{1}{\mathrm{e}}",
        r"\text{yes}",
        r"x\text{ or }y",
        r"7 \text{ dollars and 5 cents}",
        r"5\text{ or more}",
        "7以上",
        "7个半",
        "at least 7",
    ],
)
def test_what_is_no_unit_stays(text: str) -> None:
    assert split_unit(text) == Quantity(text)


def test_a_letter_that_touches_the_number_is_a_variable_of_the_reference() -> None:
    assert split_unit("7m", is_gold=True) == Quantity("7m")
    assert split_unit("7 m", is_gold=True) == Quantity("7", "m")


@pytest.mark.parametrize(
    ("text", "bound"),
    [
        (r"5 \text{ or more}", (">=", "5")),
        ("at least 5", (">=", "5")),
        ("5+", (">=", "5")),
        ("5以上", (">=", "5")),
        ("не менее 5", (">=", "5")),
        ("up to 5", ("<=", "5")),
        ("no more than 5", ("<=", "5")),
        (r"\text{fewer than } 5", ("<", "5")),
        ("over 5", (">", "5")),
        ("5", None),
        ("x+5", None),
        (r"\text{more}", None),
    ],
)
def test_bounds(text: str, bound: tuple[str, str] | None) -> None:
    assert split_bound(text) == bound


@pytest.mark.parametrize(
    ("first", "second", "differ"),
    [
        ("cm", "m", True),
        ("AM", "PM", True),
        ("$", "cents", True),
        ("feet", "ft", False),
        ("cm^2", "square cm", False),
        ("apples", "oranges", False),
        ("", "cm", False),
    ],
)
def test_only_known_units_differ(first: str, second: str, differ: bool) -> None:
    assert are_different_units(first, second) is differ
