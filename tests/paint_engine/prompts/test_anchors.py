"""Notation, anchors and overlap (Sec. 3.2, Eq. 4)."""

import gc
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paint_engine.prompts.anchors import extract_anchors, find_anchors, normalize_math, overlap

# Pieces whose combinations reach every rule of the notation, well formed or not.
FRAGMENTS = [
    *(
        r"\frac",
        r"\dfrac",
        r"\sqrt",
        r"\circ",
        r"\cdot",
        r"\left",
        r"\right.",
        r"\quad",
        r"\implies",
    ),
    *(
        r"\text{",
        r"\boxed{",
        r"\boxed",
        r"\tag{",
        r"\pi",
        r"\,",
        r"\!",
        r"\%",
        r"\{",
        r"\}",
        "\\\\",
    ),
    *(
        r"\begin{align}",
        r"\end{align}",
        "[asy]",
        "[/asy]",
        "$",
        "$$",
        r"\(",
        r"\)",
        r"\[",
        r"\]",
        "&",
    ),
    *(
        "1",
        "12",
        "0.5",
        ".5",
        "1,000",
        "1. ",
        ",",
        ".",
        "{,}",
        "<",
        "<<",
        "<<3>>",
        ">",
        "%",
        "~",
        "!",
    ),
    *(
        "{",
        "}",
        "(",
        ")",
        "^",
        "_",
        "=",
        "+",
        "-",
        "- ",
        "/",
        "*",
        "**",
        "|",
        " ",
        "\n",
        "x",
        "X",
        "ab",
    ),
    *("\u00d7", "\u2212", "\u00b0", "\u00b2", "\u221a", "\u00bd", "\u03c0", "\u00e9", "\u0663"),
]
HOSTILE_TEXT = st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join)

GSM8K = (
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
    "Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.\n"
    r"The answer is \boxed{72}."
)
AIME = (
    r"$\frac{9}{s} + t = 4$ in hours and $\frac{9}{s+2} + t = 2.4$ in hours." + "\n"
    r"Subtracting, we get $9s+18-9s=18=1.6s^{2} + 3.2s$, so $s=2.5$." + "\n"
    r"Lastly, $\frac{9}{3} + 0.4 = 3.4$ hours, or $\framebox{204}$ minutes"
)

SAME = [
    [r"\dfrac{x}{2}", r"\tfrac{x}{2}", r"\frac{x}{2}", r"\frac x2", r"$\frac{x}{2}$"],
    [r"\frac{1}{2}", r"\frac12", "1/2", r"$\dfrac 1 2$", "½", "1 / 2", "1÷2"],
    ["1000", "1,000", "1{,}000", r"1\,000", r"1,\!000", "$1,000", "1\u202f000", "1000.00"],
    ["(x+1)", r"\left(x+1\right)", r"\bigl( x + 1 \bigr)", r"$\left( x\, +\; 1 \right)$"],
    ["2*3", r"2 \times 3", r"2\cdot3", "2 \u00d7 3", "2·3", "2 x 3", "2 X 3", r"$2 \times 3$"],
    ["x-5", "x \u2212 5", "x \u2013 5", "$x - 5$", r"\(x-5\)", r"\[ x - 5 \]"],
    ["90", "90°", r"90^\circ", r"90^{\circ}", r"$90^\circ$", r"90\degree"],
    ["x^2", "x^{2}", "x²", "$x ^ { 2 }$", r"x**2"],
    [r"\sqrt{3}", "√3", r"\sqrt3", r"$\sqrt 3$"],
    [r"x\le5", r"x \leq 5", "x ≤ 5", r"$x \leqslant 5$"],
    [r"\pi r^2", "πr²", r"$\pi r^{2}$"],
    ["(1,2)", "(1, 2)", "$( 1 , 2 )$"],
    ["2x+3y", "$2 x + 3 y$", "$2x+3y$"],
    ["50%", r"50\%", r"$50 \%$"],
    ["x=5", r"x = \boxed{5}", r"$x=\fbox{5}$", r"\(x=\framebox{ 5 }\)", "**x = 5**"],
    ["48/2=24", "48/2 = <<48/2=24>>24", r"48/2 = \$24"],
    ["the value 7", r"\text{the value } 7", r"$\text{the value}~7$"],
    ["25", "025", "25.0", "25.00"],
    ["x=1 y=2", r"$x=1 \\ y=2$", r"\[x &= 1 \quad y = 2 \tag{3}\]"],
]
DIFFERENT = [
    ("12. 5", "12.5"),
    ("1, 000", "1000"),
    ("12 34", "1234"),
    (r"\frac{1}{2x}", r"\frac{1}{2}x"),
    (r"\frac{x+1}{2}", r"x+\frac{1}{2}"),
    ("x^{10}", "x^{1}0"),
    ("x^{2y}", "x^2y"),
    ("no table", "notable"),
    (r"1\frac{1}{2}", "11/2"),
    (r"\sqrt{\frac{1}{2}}", r"\sqrt{1}/2"),
]


@pytest.mark.parametrize("writings", SAME, ids=lambda writings: writings[0])
def test_notation_does_not_hide_a_match(writings: list[str]) -> None:
    assert {normalize_math(text) for text in writings} == {normalize_math(writings[0])}


@pytest.mark.parametrize(("left", "right"), DIFFERENT)
def test_what_differs_stays_different(left: str, right: str) -> None:
    assert normalize_math(left) != normalize_math(right)


@given(st.text(max_size=40) | HOSTILE_TEXT)
@settings(max_examples=400, deadline=None, derandomize=True)
def test_normalization_is_idempotent(text: str) -> None:
    once = normalize_math(text)
    assert normalize_math(once) == once


@given(st.text(max_size=40) | HOSTILE_TEXT)
@settings(max_examples=400, deadline=None, derandomize=True)
def test_a_solution_contains_its_own_anchors(text: str) -> None:
    anchors = extract_anchors(text)
    assert overlap(text, text) == (1.0 if anchors else 0.0)
    assert [normalize_math(anchor) for anchor in anchors] == list(anchors)
    assert len(set(anchors)) == len(anchors)


@given(st.sampled_from([GSM8K, AIME]), st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_cutting_a_completion_never_raises_the_overlap(solution: str, data: st.DataObject) -> None:
    ends = sorted(data.draw(st.tuples(*[st.integers(0, len(solution))] * 2)))
    # At white space: a cut inside 204 would make the numbers 2 and 20.
    shorter, longer = (solution[: solution.rfind(" ", 0, end) + 1] for end in ends)
    found_shorter, found_longer = (
        set(extract_anchors(solution)) & set(extract_anchors(text)) for text in (shorter, longer)
    )
    assert found_shorter <= found_longer
    assert overlap(shorter, solution) <= overlap(longer, solution)


def test_gsm8k_anchors_in_order_of_appearance() -> None:
    assert extract_anchors(GSM8K) == ("48/2=24", "48", "24", "48+24=72", "72")


def test_aime_anchors_in_order_of_appearance() -> None:
    assert extract_anchors(AIME) == (
        r"\frac{9}{s}+t=4",
        r"\frac{9}{s+2}+t=2.4",
        "2.4",
        "9s+18-9s=18",
        "18",
        "18=1.6s^2+3.2s",
        "1.6",
        "3.2",
        "s=2.5",
        "2.5",
        "9/3+0.4=3.4",
        "0.4",
        "3.4",
        "204",
    )


@pytest.mark.parametrize(
    ("solution", "anchors"),
    [
        (r"\boxed{\frac{1}{\sqrt{2}}}", (r"\frac{1}{\sqrt{2}}",)),
        (r"so \boxed{\text{Monday}}", ("Monday",)),
        (r"\boxed{5}", ("5",)),
        (r"$\boxed{(1, 2)}$", ("(1, 2)",)),
        (r"$x = 12\text{ cm}$", ("x=12", "12")),
        (r"$x=5, y=\frac12$; \(z=7\)", ("x=5", "y=1/2", "z=7")),
        (r"\begin{align*} a &= b+1 \\ &= c+2 \end{align*}", ("a=b+1", "c+2")),
        ("He has 4 * 20 sheep = <<4*20=80>>80 sheep", ("4*20", "20", "80")),
        ("It took (48/2 = 24) days.", ("48/2=24", "48", "24")),
        ("5 cups * 3 = 15 cups", ("15",)),
        ("so x = -7!", ("x=-7",)),
        ("1. First\n2. Second\n12. Twelfth\n(a) w/o e-mail", ()),
        ("3 apples and 2 pears, $n$ of them", ()),
        ("$x_{12}$ and $x^{34}$", ("x_12", "x^34")),
        ("paid $1,250.50 on day 9", ("1250.5",)),
        ("[asy]\ndraw((0,0)--(12,13)); [/asy] so 14", ("14",)),
        ("", ()),
    ],
)
def test_what_counts_as_an_anchor(solution: str, anchors: tuple[str, ...]) -> None:
    assert extract_anchors(solution) == anchors


@pytest.mark.parametrize(
    ("anchor", "completion", "is_found"),
    [
        ("12", "3124", False),
        ("12", "12.5", False),
        ("12", "0.12", False),
        ("12", "1,012", False),
        ("12", "the total is 12.", True),
        ("12", "x=12,", True),
        ("12", "12cm long", True),
        ("12", r"$12\%$ and \$12.00", True),
        ("12", "012", True),
        ("12", "x12 and x_{12}", False),
        ("12", "12. Then we add.", False),
        ("5", "1. a\n5. b", False),
        ("5", r"so \boxed{5}", True),
        ("x=1", "x=12", False),
        ("x=1", "2x=1", False),
        ("x=1", "max=1", False),
        ("x=1", "x=1.5", False),
        ("x=1", "x=1y", False),
        ("x=1", "so $x = 1$.", True),
        ("x=1", "so x=1, y=2", True),
        (r"\frac{a}{b}=2", r"we get $\dfrac{a}{b} = 2$ and", True),
        ("48/2=24", r"$\frac{48}{2}=24$", True),
        ("48/2=24", "148/2=24", False),
        ("1000", r"1{,}000", True),
        ("-5", "x = \u22125", True),
        ("Monday", "on Mondays", False),
        ("Monday", "on Monday.", True),
        ("", "anything", False),
    ],
)
def test_anchors_match_only_whole(anchor: str, completion: str, is_found: bool) -> None:
    assert find_anchors(completion, (anchor,)) == (is_found,)


def test_overlap_is_the_recalled_fraction() -> None:
    # 48/2=24, 48 and 24, of five anchors; 48+24=72 and 72 are missing.
    assert overlap(r"First $\frac{48}{2} = 24$.", GSM8K) == pytest.approx(3 / 5)
    assert overlap("I do not know.", GSM8K) == 0.0
    assert overlap(GSM8K, "It rained.") == 0.0


HOSTILE = {
    "open braces": "{" * 100_000,
    "closed braces": "}" * 100_000,
    "dollars": "$" * 50_000,
    "dollars and letters": "$a" * 50_000,
    "unfinished fractions": r"\frac{" * 16_000,
    "unfinished boxes": r"\boxed{" * 14_000,
    "calculator marks": "<<a" * 33_000,
    "one number": "1" * 100_000,
    "separators": "1,000" * 20_000,
    "equations": "(1=" * 33_000,
    "drawings": "[asy][" * 16_000,
    "white space": " \n" * 50_000,
    "backslashes": "\\" * 100_000,
    "numbers": " ".join(map(str, range(10, 17_000))),
    "sums": ", ".join(f"{i}+{i + 1}={2 * i + 1}" for i in range(5_000)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_takes_linear_time(name: str) -> None:
    def seconds(text: str) -> float:
        # A collection walks every object of the test session, whatever the text.
        gc.disable()
        start = time.process_time()
        overlap(text, text)
        elapsed = time.process_time() - start
        gc.enable()
        return elapsed

    text = HOSTILE[name]
    whole = seconds(text)
    assert whole < 3.0
    # Quadratic work would take 16 times a quarter's time.
    assert whole < max(0.5, 8 * seconds(text[: len(text) // 4]))
