"""Boxes without braces: which content they have, and that hostile text is bounded."""

import time

import pytest

from paint_engine.prompts.anchors import extract_anchors
from paint_engine.prompts.boxes import with_braces


@pytest.mark.parametrize(
    ("text", "braced"),
    [
        (r"$\boxed 2$.", r"$\boxed{2}$."),
        (r"\boxed\frac12", r"\boxed{\frac12}"),
        (r"\boxed \frac{1}2 x", r"\boxed{\frac{1}2} x"),
        (r"\boxed\dfrac{a}{b}.", r"\boxed{\dfrac{a}{b}}."),
        (r"\boxed\sqrt[3]{2}", r"\boxed{\sqrt[3]{2}}"),
        (r"\boxed\frac\pi2", r"\boxed{\frac\pi2}"),
        (r"\boxed -1,234.5.", r"\boxed{-1,234.5}."),
        (r"\boxed\$5", r"\boxed{\$5}"),
        (r"\boxed\left(1,2\right)", r"\boxed{\left(1,2\right)}"),
        (r"\boxed\{1,2\}", r"\boxed{\{1,2\}}"),
        (r"\boxed\text{no} way", r"\boxed{\text{no}} way"),
        (r"\fbox x+1", r"\fbox{x}+1"),
        (r"\framebox 7", r"\framebox{7}"),
        (r"\boxed\fbox{3}", r"\boxed{\fbox{3}}"),
        (r"\boxed{\fbox 3}", r"\boxed{\fbox{3}}"),
        (r"\boxed\boxed 4", r"\boxed{\boxed{4}}"),
    ],
)
def test_a_bare_content_gets_braces(text: str, braced: str) -> None:
    assert with_braces(text) == braced
    assert with_braces(braced) == braced


@pytest.mark.parametrize(
    "text",
    [
        *(r"\boxed{7}", r"\boxed {7}", r"$\boxed$", r"\boxed", r"\boxed.", r"the \boxed notation"),
        *(r"\boxedness 2", r"\boxed\begin{array}", r"\boxed(1,2)", r"\boxed\\"),
    ],
)
def test_what_is_no_bare_content_is_left_alone(text: str) -> None:
    assert with_braces(text) == text


@pytest.mark.parametrize(
    "piece",
    ["\\boxed", "\\boxed\\frac", "\\boxed\\left", "\\boxed\\text{", "\\boxed{", "\\boxed 1"],
)
def test_hostile_text_takes_bounded_time_and_depth(piece: str) -> None:
    started = time.monotonic()
    with_braces(piece * 20_000)
    assert time.monotonic() - started < 20


def test_a_bare_box_of_a_solution_is_an_anchor() -> None:
    assert extract_anchors(r"So $\boxed 2$.") == extract_anchors(r"So $\boxed{2}$.") == ("2",)
