"""Finding delimited formulas, and the tokens that text becomes."""

import pytest

from paint_engine.prompts.notation import formula_spans, join, tokenize


@pytest.mark.parametrize(
    ("text", "formulas"),
    [
        (r"so $x=5$ and \(y=6\), \[z=7\] $$w=8$$", ["x=5", "y=6", "z=7", "w=8"]),
        (r"\begin{align*}a&=b\\&=c\end{align*}", [r"a&=b\\&=c"]),
        ("costs $5 and $6 more", []),
        ("80,000+50,000=$130,000 so the new value is $200,000", []),
        ("pays $2 per egg and gets $3", []),
        ("pays $5, so the total is $x = 7$.", ["x = 7"]),
        ("one $x\n\ny$ two", []),
        (r"an escaped \$5 and \$6", []),
        (r"an open $x and nothing", []),
        (r"the \\[2pt] of a line break", []),
        (r"$\text{number of boys} = 5$", [r"\text{number of boys} = 5"]),
        ("$ x = 5 $", [" x = 5 "]),
    ],
)
def test_formula_spans_tell_formulas_from_currency(text: str, formulas: list[str]) -> None:
    assert [text[start:end] for start, end in formula_spans(text)] == formulas


def test_tokens_know_their_formula_and_box() -> None:
    tokens = tokenize(r"so $2x = \boxed{12}$, then $y$")
    assert [(token.text, token.formula > 0, token.box) for token in tokens] == [
        ("so", False, 0),
        ("2", True, 0),
        ("x", True, 0),
        ("=", True, 0),
        ("12", True, 1),
        (",", False, 0),
        ("then", False, 0),
        ("y", True, 0),
    ]
    assert tokens[1].formula == tokens[4].formula != tokens[-1].formula


def test_lines_of_one_formula_are_told_apart() -> None:
    tokens = tokenize(r"\[a = 1 \\[3pt] b = 2 \implies c = 3\]")
    assert len({token.formula for token in tokens}) == 3
    assert join(tokens) == "a=1 b=2 c=3"


def test_only_the_number_that_opens_a_line_is_an_index() -> None:
    tokens = tokenize("1. First 12. then\n12) or\n34.5 and\n56.")
    assert [token.text for token in tokens if token.is_index] == ["1", "12"]
