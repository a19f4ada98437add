"""Statistics of the paper's tables: counts, the clustered interval, differences of rows."""

from typing import Any

import numpy as np
import pytest

from bench.paper.cells import difference_cells
from bench.paper.stats import (
    clustered_mean,
    decode_counts,
    encode_counts,
    expected_half_width,
    row_numbers,
    student_quantile,
    student_tails,
)


def planted(
    rng: np.random.Generator,
    shape: tuple[int, int],
    num_samples: int,
    sds: tuple[float, float, float],
) -> np.ndarray:
    """(S, P) differences without a true one. sds: of seeds, of problems and of single answers."""
    seed_sd, problem_sd, answer_sd = sds
    return (
        seed_sd * rng.standard_normal((shape[0], 1))
        + problem_sd * rng.standard_normal(shape[1])
        + answer_sd * rng.standard_normal((*shape, num_samples)).mean(axis=2)
    )


def test_counts_come_back_from_their_text() -> None:
    correct = np.random.default_rng(0).random((50, 12)) < 0.5
    text = encode_counts(correct)
    assert len(text) == 50
    assert decode_counts(text).tolist() == correct.sum(axis=1).tolist()


@pytest.mark.parametrize(
    ("level", "degrees", "expected"),
    [(0.95, 1, 12.7062), (0.95, 7, 2.3646), (0.99, 4, 4.6041), (0.9, 30, 1.6973)],
)
def test_students_t_is_that_of_the_printed_tables(
    level: float, degrees: int, expected: float
) -> None:
    assert student_quantile(level, degrees) == pytest.approx(expected, abs=1e-4)
    assert student_tails(expected, degrees) == pytest.approx(1 - level, abs=1e-5)


def test_the_interval_of_four_values_by_hand() -> None:
    """D = [[3, 1], [1, -1]] has seeds' means 2 and 0, problems' means 2 and 0, and no rest: the
    variance is 2/2 + 2/2 = 2."""
    mean = clustered_mean(np.array([[3.0, 1.0], [1.0, -1.0]]))
    assert mean.value == 1 and mean.standard_error == pytest.approx(2**0.5) and mean.degrees == 1
    # Student's t with 1 degree of freedom is Cauchy's: half of it lies within 1.
    low, high = mean.interval(0.5)
    assert (low, high) == pytest.approx((1 - 2**0.5, 1 + 2**0.5))
    assert mean.p_value == pytest.approx(1 - 2 / np.pi * np.arctan(0.5**0.5))


def test_the_noise_of_cells_is_subtracted_but_not_below_the_larger_part() -> None:
    """[[1, -1], [-1, 1]] is noise of cells alone, and all means are 0: nothing is left. With 1 more
    in the first row, V_seeds / 2 = 1/4, V_problems / 2 = 0 and V_cells / 4 = 1."""
    noise = np.array([[1.0, -1.0], [-1.0, 1.0]])
    nothing = clustered_mean(noise)
    assert (nothing.standard_error, nothing.p_value) == (0, 1)
    assert clustered_mean(noise + np.array([[1], [0]])).standard_error == pytest.approx(0.5)
    equal = clustered_mean(np.ones((3, 4)))
    assert equal.interval(0.95) == (1, 1) and equal.p_value == 0


def test_one_seed_is_refused() -> None:
    with pytest.raises(AssertionError):
        clustered_mean(np.zeros((1, 10)))


@pytest.mark.parametrize(
    ("num_seeds", "sds"),
    [(8, (0.05, 0.15, 0.3)), (8, (0.1, 0.3, 0.3)), (3, (0.1, 0.1, 0.3))],
)
def test_intervals_cover_the_truth(num_seeds: int, sds: tuple[float, float, float]) -> None:
    """Where most of the error is that of the seeds, as the degrees of freedom suppose."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        low, high = clustered_mean(planted(rng, (num_seeds, 100), 2, sds)).interval(0.95)
        held += low <= 0 <= high
    assert 0.93 <= held / 2000 <= 0.975


def test_intervals_are_wider_than_needed_where_seeds_do_not_differ() -> None:
    """By as much as the docstring says: Student's t for the normal quantile, 1.2 at 8 seeds."""
    rng = np.random.default_rng(0)
    means = [clustered_mean(planted(rng, (8, 400), 2, (0.0, 0.2, 0.3))) for _ in range(1000)]
    needed = 1.96 * np.std([mean.value for mean in means])
    widths = [(high - low) / 2 for low, high in (mean.interval(0.95) for mean in means)]
    assert 1.1 < np.mean(widths) / needed < 1.3


def test_p_values_agree_with_the_intervals() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        mean = clustered_mean(0.02 + planted(rng, (8, 50), 2, (0.02, 0.1, 0.3)))
        low, high = mean.interval(1 - mean.p_value)
        assert min(abs(low), abs(high)) == pytest.approx(0, abs=1e-9)


def test_what_both_rows_share_does_not_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    row, reference = rng.random((2, 3, 40))
    difficulty = 100 * rng.random(40) + 50 * rng.random((3, 1))
    plain = clustered_mean(row - reference)
    shared = clustered_mean((row + difficulty) - (reference + difficulty))
    assert shared.standard_error == pytest.approx(plain.standard_error, abs=1e-10)


def test_the_expected_half_width_is_that_of_simulations() -> None:
    rng = np.random.default_rng(0)
    sds = (0.03, 0.2, 0.5)
    for num_seeds, num_problems, num_samples in ((8, 128, 2), (5, 64, 4)):
        squares = []
        for _ in range(1000):
            mean = clustered_mean(planted(rng, (num_seeds, num_problems), num_samples, sds))
            low, high = mean.interval(0.99)
            squares.append(((high - low) / 2) ** 2)
        expected = expected_half_width(*sds, num_seeds, num_problems, num_samples, 0.99)
        assert np.mean(squares) ** 0.5 == pytest.approx(expected, rel=0.05)


def test_seeds_are_counted_above_and_equal() -> None:
    """Three seeds of two problems with two answers each: one above, one equal, one below."""

    def records(*seeds: str) -> list[dict[str, Any]]:
        return [
            {
                "seed": seed,
                "num_samples": 2,
                "learning_rate": 1e-4,
                "seconds": 1.0,
                "evaluations": [{"avg_at_k": decode_counts(c).sum() / 4, "correct": c}],
            }
            for seed, c in enumerate(seeds)
        ]

    row = row_numbers("paint", records("21", "02", "00"), {"opsd": records("20", "11", "10")})
    (found,) = row["differences"]
    assert (found["seeds_above"], found["seeds_equal"]) == (1, 1)
    assert found["difference"] == 0 and found["p_value"] == 1
    assert difference_cells(row, "opsd")[2] == "1 of 3, 1 equal"
    # Of a row with more seeds than the other, the first are compared.
    longer = row_numbers("paint", records("21", "02", "00", "22"), {"opsd": records("20", "11")})
    (found,) = longer["differences"]
    assert (found["num_seeds"], found["seeds_above"], found["seeds_equal"]) == (2, 1, 1)
