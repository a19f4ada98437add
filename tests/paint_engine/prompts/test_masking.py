"""The mask schedule (Eq. 5) and the placements of the hidden block (Eq. 6)."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paint_engine.prompts.masking import (
    OMISSION_MARKER,
    PLACEMENTS,
    Placement,
    mask_ratio,
    mask_solution,
)

# No solution below contains this marker's sign.
MARKER = "\u2603"
PLAIN: tuple[Placement, ...] = ("suffix", "prefix", "middle", "random")
SOLUTIONS = st.text(st.sampled_from("ab1. !?\n$"), max_size=60)
RATIOS = st.floats(0.0, 1.0)


def masked_parts(solution: str, ratio: float, placement: Placement, seed: int = 0) -> list[str]:
    masked = mask_solution(
        solution, ratio, placement=placement, generator=random.Random(seed), marker=MARKER
    )
    return masked.split(MARKER)


def test_schedule_is_affine_in_the_overlap() -> None:
    assert mask_ratio(0.0, 0.3, 0.4) == pytest.approx(0.3)
    assert mask_ratio(0.5, 0.3, 0.4) == pytest.approx(0.35)
    assert mask_ratio(1.0, 0.3, 0.4) == pytest.approx(0.4)
    assert mask_ratio(0.7, 0.4, 0.4) == 0.4
    assert mask_ratio(0.7, 0.0, 0.0) == 0.0


@given(st.tuples(RATIOS, RATIOS).map(sorted), RATIOS)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_schedule_stays_between_its_ends(ends: list[float], overlap: float) -> None:
    ratio = mask_ratio(overlap, *ends)
    assert ends[0] <= ratio <= ends[1] + 1e-15


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((-0.1, 0.3, 0.4), "overlap is -0.1"),
        ((1.1, 0.3, 0.4), "overlap is 1.1"),
        ((float("nan"), 0.3, 0.4), "overlap is nan"),
        ((0.5, -0.3, 0.4), "rho_wrong is -0.3"),
        ((0.5, 0.3, 1.4), "rho_correct is 1.4"),
        ((0.5, 0.4, 0.3), "rho_correct is 0.3 and rho_wrong is 0.4"),
    ],
)
def test_schedule_refuses_impossible_values(
    arguments: tuple[float, float, float], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        mask_ratio(*arguments)


@given(SOLUTIONS, RATIOS, st.sampled_from(PLAIN), st.integers(0, 99))
@settings(max_examples=400, deadline=None, derandomize=True)
def test_hidden_block_is_one_span_of_the_exact_length(
    solution: str, ratio: float, placement: Placement, seed: int
) -> None:
    num_hidden = round(ratio * len(solution))
    parts = masked_parts(solution, ratio, placement, seed)
    if num_hidden == 0:
        assert parts == [solution]
        return
    before, after = parts
    assert len(before) + num_hidden + len(after) == len(solution)
    assert solution.startswith(before) and solution.endswith(after)


@given(SOLUTIONS, RATIOS)
@settings(max_examples=400, deadline=None, derandomize=True)
def test_sentence_suffix_hides_at_least_as_much_as_suffix(solution: str, ratio: float) -> None:
    plain = masked_parts(solution, ratio, "suffix")
    if len(plain) == 1:
        assert masked_parts(solution, ratio, "sentence_suffix") == plain
        return
    before, after = masked_parts(solution, ratio, "sentence_suffix")
    assert after == ""
    assert plain[0].startswith(before)
    if before != plain[0]:
        assert before[-1] == "\n" or (before[-2] in ".!?" and before[-1].isspace())


def test_placements_lie_where_their_names_say() -> None:
    solution = "0123456789"
    assert masked_parts(solution, 0.4, "suffix") == ["012345", ""]
    assert masked_parts(solution, 0.4, "prefix") == ["", "456789"]
    assert masked_parts(solution, 0.4, "middle") == ["012", "789"]
    assert mask_solution(solution, 0.4) == "012345" + OMISSION_MARKER
    for placement in PLACEMENTS:
        assert masked_parts(solution, 1.0, placement) == ["", ""]


def test_random_placement_reaches_every_position_evenly() -> None:
    generator = random.Random(7)
    starts = [
        mask_solution("0123456789", 0.4, placement="random", generator=generator).index(".")
        for _ in range(1400)
    ]
    counts = [starts.count(start) for start in range(7)]
    assert sum(counts) == 1400
    # 200 expected at each of the 7 positions, standard deviation 13.
    assert all(140 < count < 260 for count in counts)


def test_random_placement_follows_its_generator() -> None:
    solution = "abcdefghij" * 10
    first, second = (masked_parts(solution, 0.3, "random", seed=5) for _ in range(2))
    assert first == second != masked_parts(solution, 0.3, "random", seed=6)


@pytest.mark.parametrize(
    ("solution", "visible"),
    [
        ("One two. Three four five six", "One two. "),
        ("One two! Three four five six", "One two! "),
        ("One two? Three four five six", "One two? "),
        ("One two\nThree four five six", "One two\n"),
        ("First. One two. Three four five", "First. One two. "),
        ("Half is 2.5 apples or so and on", "Half is 2.5 apples "),
        ("Now $a. b. c! d$ is what it is. ", "Now $a. b. c! d$ is"),
        ("Yes. Now $a. b$ is what it is. ", "Yes. "),
        ("nothing ends here, not even now", "nothing ends here, "),
    ],
)
def test_sentence_suffix_cuts_at_a_sentence_end(solution: str, visible: str) -> None:
    before, after = masked_parts(solution, 0.4, "sentence_suffix")
    assert (before, after) == (visible, "")


def test_bad_arguments_say_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"mask_ratio is 1\.2"):
        mask_solution("abc", 1.2)
    with pytest.raises(ValueError, match=r"'tail'; needs one of suffix, prefix"):
        mask_solution("abc", 0.5, placement="tail")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"generator=random\.Random"):
        mask_solution("abc", 0.5, placement="random")
