"""Chunks: every row once, whole rollouts together where they fit, nothing read on a GPU."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paint_kernels import _plan
from paint_kernels._plan import most_rows, plan_chunks, row_slices


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    lengths=st.lists(st.integers(0, 30), max_size=12), most=st.integers(1, 40), whole=st.booleans()
)
def test_every_row_once_and_whole_rollouts_where_they_fit(lengths, most, whole):
    bounds = list(itertools.accumulate(lengths, initial=0))
    chunks = plan_chunks(torch.tensor(bounds), bounds[-1], most, whole=whole)
    covered = [row for chunk in chunks for row in range(chunk.rows.start, chunk.rows.stop)]
    assert covered == list(range(bounds[-1]))
    assert all(chunk.rows.stop - chunk.rows.start <= most for chunk in chunks)
    for chunk in chunks:
        if chunk.rollouts is not None:
            assert whole
            assert bounds[chunk.rollouts.start] == chunk.rows.start
            assert bounds[chunk.rollouts.stop] == chunk.rows.stop
        elif whole:
            inside = [
                (start, end)
                for start, end in itertools.pairwise(bounds)
                if start <= chunk.rows.start and chunk.rows.stop <= end
            ]
            assert any(end - start > most for start, end in inside)


def test_neighbours_share_a_chunk():
    chunks = plan_chunks(torch.tensor([0, 3, 3, 7, 9, 30, 32]), 32, 8, whole=True)
    rows = [(chunk.rows.start, chunk.rows.stop) for chunk in chunks]
    assert rows == [(0, 7), (7, 9), (9, 16), (16, 23), (23, 30), (30, 32)]
    assert [chunk.rollouts for chunk in chunks] == [
        slice(0, 3),
        slice(3, 4),
        None,
        None,
        None,
        slice(5, 6),
    ]


def test_two_rollouts_that_fit_exactly_share_a_chunk():
    chunks = plan_chunks(torch.tensor([0, 4, 8, 12]), 12, 8, whole=True)
    assert [chunk.rollouts for chunk in chunks] == [slice(0, 2), slice(2, 3)]


def test_bounds_that_are_not_on_the_host_are_not_read():
    bounds = torch.empty(4, device="meta")
    assert [chunk.rollouts for chunk in plan_chunks(bounds, 20, 8, whole=True)] == [None] * 3
    assert plan_chunks(bounds, 8, 8, whole=True)[0].rollouts == slice(0, 3)


@pytest.mark.parametrize(
    ("multiprocessors", "hidden_size", "rows"),
    [
        (132, 2048, 2048),
        (132, 2560, 1664),
        (132, 4096, 1024),
        (108, 4096, 1536),
        (132, 5120, 1536),
        (132, 64, 2048),
        (132, 10**6, 1024),
    ],
)
def test_rows_that_fill_a_gpu_and_hold_a_rollout(monkeypatch, multiprocessors, hidden_size, rows):
    """128 x 256 of the result for each multiprocessor, as often as 1024 tokens take."""
    monkeypatch.setattr(_plan, "UNKNOWN_MULTIPROCESSORS", multiprocessors)
    assert _plan.most_rows(151936, hidden_size, torch.device("meta")) == rows


def test_rows_have_bounds():
    assert most_rows(10**9, 64, torch.device("cpu")) == 1
    assert row_slices(0, 5) == []
    assert row_slices(11, 5) == [slice(0, 4), slice(4, 8), slice(8, 11)]
