"""What decides a reward is the rewards' own: nothing of the anchors' has a part in it."""

import ast
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paint_engine import rewards
from paint_engine.prompts import anchors, notation
from paint_engine.rewards.checker import check_answer
from paint_engine.rewards.notation import normalize_answer

EQUAL = [
    (r"\frac12", r"\dfrac{1}{2}"),
    (r"\frac{1}{2}", "1/2"),
    (r"3\frac12", "3 1/2"),
    ("½", r"\tfrac 1 2"),
    (r"\frac{\sqrt{3}}2", r"\frac{\sqrt3}{2}"),
    (r"\sqrt 2", "√2"),
    ("x^{2}", "x²"),
    ("a_{10}", "a_10"),
    ("2**3", "2^3"),
    ("2 x 3", r"2 \times 3"),
    ("1,234", r"1{,}234"),
    ("1.50", "01.5"),
    (r"90^{\circ}", "90°"),
    (r"\left( 1, 2 \right)", "(1,2)"),
    (r"\text{two thirds}", r"$\text{ two  thirds}$"),
    (r"x \leqslant 2", "x≤2"),
    (r"\boxed{\mathbf{7}}", "7"),
    ("<<3+4=7>>7", "7"),
    (r"\color{red} 5", "5"),
]
UNEQUAL = [
    ("x^23", "x^{2}3"),
    ("1B00_{16}", "1B0_{16}"),
    (r"3\frac{1}{2}", "31/2"),
    ("1 2", "12"),
    ("1, 234", "1234"),
    (r"\frac{1}{23}", r"\frac{12}{3}"),
    (r"\fraca", r"\frac a"),
    ("ab", r"\text{a b}"),
    (r"\pi r", r"\pir"),
]


@pytest.mark.parametrize(("first", "second"), EQUAL)
def test_two_ways_of_writing_one_answer(first: str, second: str) -> None:
    assert normalize_answer(first) == normalize_answer(second) != ""


@pytest.mark.parametrize(("first", "second"), UNEQUAL)
def test_different_answers_stay_different(first: str, second: str) -> None:
    assert normalize_answer(first) != normalize_answer(second)


pieces = st.sampled_from(
    ["\\frac", "\\sqrt", "{", "}", "^", "_", "\\text{a b}", "12", "3.40", "x", " ", "$", "\\", ","]
)


@given(st.lists(pieces, max_size=20).map("".join))
def test_any_text_has_a_notation_without_outer_spaces(text: str) -> None:
    once = normalize_answer(text)
    assert once == once.strip()
    assert normalize_answer(f" {text} ") == once or text.endswith("\\")


def test_a_change_to_the_anchors_rules_changes_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    solution = r"So $x = \frac{1}{2}$, and the answer is $\boxed{\frac{1}{2}}$."
    cases = [(gold, f"\\boxed{{{given}}}") for gold, given in (*EQUAL, *UNEQUAL)]
    before = [check_answer(gold, text) for gold, text in cases]
    assert anchors.overlap(solution, solution) == 1.0
    for module in (anchors, notation):
        monkeypatch.setattr(module, "tokenize", lambda text: [])
        monkeypatch.setattr(module, "join", lambda tokens: "")
    monkeypatch.setattr(anchors, "normalize_math", lambda text: "")
    assert anchors.overlap(solution, solution) == 0.0
    assert [check_answer(gold, text) for gold, text in cases] == before


def test_the_rewards_share_what_a_box_is_with_the_prompts_and_nothing_else() -> None:
    (folder,) = rewards.__path__
    imported = {
        name
        for file in Path(folder).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        for name in (
            [node.module]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else []
        )
    }
    shared = {name for name in imported if str(name).startswith("paint_engine.prompts")}
    assert shared == {"paint_engine.prompts.boxes"}
