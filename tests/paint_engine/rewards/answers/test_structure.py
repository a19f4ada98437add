"""How the structure of an answer is read."""

import time

import pytest

from paint_engine.rewards.answers.structure import (
    Answer,
    Expression,
    Listing,
    Matrix,
    Relation,
    Union,
    read,
    tidy,
)


def items(*texts: str) -> tuple[Answer, ...]:
    return tuple(map(Expression, texts))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("1, 2", Listing(items("1", "2"), "")),
        ("1,234", Expression("1,234")),
        ("(100,200)", Listing(items("100", "200"), "()")),
        ("(1,000, 2,000)", Listing(items("1000", "2000"), "()")),
        ("[1,2)", Listing(items("1", "2"), "[)")),
        ("]1,2]", Listing(items("1", "2"), "(]")),
        (r"\left\{1,2\right\}", Listing(items("1", "2"), "{}")),
        (r"\langle 1,2\rangle", Listing(items("1", "2"), "()")),
        (
            "1, 2; 3, 4",
            Listing((Listing(items("1", "2"), "()"), Listing(items("3", "4"), "()")), ""),
        ),
        ("((A))", Expression("A")),
        ("(x+1)(x-1)", Expression("(x+1)(x-1)")),
        ("f(1,2)", Expression("f(1,2)")),
        (r"\{x : x>1\}", Relation(("x", "1"), (">",), "x>1")),
        (r"\{n \in \mathbb{Z} : n>1\}", Expression(r"\{n \in \mathbb{Z} : n>1\}")),
        (r"12\text{ and }13", Listing(items("12", "13"), "")),
        (r"2\pm\sqrt3", Listing(items(r"2+\sqrt3", r"2-\sqrt3"), "")),
        (r"1<x\leq2", Relation(("1", "x", "2"), ("<", "<="), r"1<x\le 2")),
        (r"5\text{ or more}", Relation(("", "5"), (">=",), r"5\text{ or more}")),
        (r"\{1\}\cup\{2\}", Union((Listing(items("1"), "{}"), Listing(items("2"), "{}")))),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", Matrix((items("1", "2"), items("3", "4")))),
        (r"\left[\begin{array}{c}1\\2\end{array}\right]", Matrix((items("1"), items("2")))),
        (r"0.1\overline{6}", Expression(r"\frac{15}{90}")),
        ("0.1666...", Expression(r"\frac{1500}{9000}")),
        ("3.14159...", Expression("3.14159")),
        ("1 000", Expression("1000")),
        ("2 3", Expression("2 3")),
        ("（１，２）", Listing(items("1", "2"), "()")),  # noqa: RUF001
    ],
)
def test_read(text: str, answer: Answer) -> None:
    assert read(tidy(text)) == answer


@pytest.mark.parametrize(
    "text",
    [
        "(" * 990 + "1" + ")" * 990,
        "{" * 900 + "1" + "}" * 900,
        "(1," * 400 + "1" + ")" * 400,
        "1," * 900,
        "x<" * 900,
        "1 or " * 390,
        r"\text{a or }" * 160,
        "0." + "3" * 1900 + "...",
        "1,234" * 390,
        r"\text{ " * 280,
    ],
)
def test_hostile_texts_end_in_time(text: str) -> None:
    start = time.process_time()
    read(tidy(text))
    assert time.process_time() - start < 5.0
