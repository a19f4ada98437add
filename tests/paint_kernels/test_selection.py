"""entropy_ratio and select_top_fraction."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paint_kernels import entropy_ratio, reference, select_top_fraction, selection
from paint_kernels.selection import selected_counts, teacher_top_k_indices


@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    lengths=st.lists(st.integers(0, 12), max_size=6),
    top_fraction=st.sampled_from([0.0, 0.01, 0.03, 0.07, 0.25, 0.5, 0.9, 1.0]),
    data=st.data(),
)
def test_selection_is_that_of_a_sort_per_rollout(lengths, top_fraction, data):
    num_tokens = sum(lengths)
    # Few distinct values: most comparisons are ties.
    values = st.lists(st.integers(0, 3), min_size=num_tokens, max_size=num_tokens)
    ratio = torch.tensor(data.draw(values), dtype=torch.float32)
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    selected = select_top_fraction(ratio, bounds, top_fraction)
    assert torch.equal(selected, reference.select_top_fraction(ratio, bounds, top_fraction))


def test_ties_go_to_the_lower_position():
    ratio = torch.tensor([1.0, 2.0, 2.0, 2.0, 5.0, 5.0])
    selected = select_top_fraction(ratio, torch.tensor([0, 4, 6]), 0.5)
    assert selected.tolist() == [False, True, True, False, True, False]


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    thousandths=st.integers(0, 1000),
    lengths=st.lists(st.integers(0, 10**6), min_size=1, max_size=20),
)
def test_count_is_the_exact_ceiling(thousandths, lengths):
    counts = selected_counts(torch.tensor(lengths), thousandths / 1000)
    expected = [math.ceil(Fraction(thousandths, 1000) * length) for length in lengths]
    assert counts.tolist() == expected


def test_count_where_floats_are_off_by_one():
    assert math.ceil(0.07 * 100) == 8
    assert selected_counts(torch.tensor([100]), 0.07).tolist() == [7]
    assert selected_counts(torch.tensor([3]), 1 / 3).tolist() == [1]


def test_entropy_ratio_and_its_floor():
    teacher, student = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([2.0, 0.0, 0.0])
    ratio = entropy_ratio(teacher, student, entropy_floor=1e-3)
    torch.testing.assert_close(ratio, torch.tensor([0.5, 2000.0, 0.0]))
    with pytest.raises(ValueError, match="entropy_floor"):
        entropy_ratio(teacher, student, entropy_floor=0.0)


@pytest.mark.parametrize("tile", [1, 3, 64])
def test_top_k_breaks_ties_by_index(monkeypatch, tile):
    """Few distinct values: most comparisons are ties, within a tile and between tiles."""
    monkeypatch.setattr(selection, "TOP_K_TILE", tile)
    monkeypatch.setattr(selection, "TOP_K_ELEMENTS", 20)

    @settings(deadline=None, derandomize=True, max_examples=100)
    @given(values=st.lists(st.integers(-2, 2), min_size=1, max_size=30), data=st.data())
    def check(values, data):
        k = data.draw(st.integers(1, len(values)))
        logits = torch.tensor([values, values[::-1], [0] * len(values)], dtype=torch.float32)
        logits[logits == -2] = -math.inf
        found = teacher_top_k_indices(logits, k).tolist()
        for row, columns in zip(logits.tolist(), found, strict=True):
            ranked = sorted(range(len(row)), key=lambda index: (-row[index], index))
            assert sorted(columns) == sorted(ranked[:k])

    check()


@pytest.mark.parametrize("column", [0, 63, 64, 199])
def test_top_k_counts_nan_as_the_largest(column):
    logits = torch.randn(2, 200, generator=torch.Generator().manual_seed(0))
    logits[1, column] = math.nan
    found = teacher_top_k_indices(logits, 2)
    assert column in found[1].tolist()
    assert sorted(found[0].tolist()) == sorted(logits[0].topk(2).indices.tolist())
