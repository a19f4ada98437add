"""Chunks: every row once, full ones at any mixture of lengths, nothing read on a GPU."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paint_kernels import _plan
from paint_kernels._plan import head_group_rows, most_rows, plan_chunks, row_slices
from paint_kernels._sources import chunk_buffer


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    lengths=st.lists(st.integers(0, 30), max_size=12), most=st.integers(1, 40), full=st.booleans()
)
def test_every_row_once_and_every_rollout_ends_once(lengths, most, full):
    bounds = list(itertools.accumulate(lengths, initial=0))
    chunks = plan_chunks(torch.tensor(bounds), bounds[-1], most, full=full)
    sizes = [chunk.rows.stop - chunk.rows.start for chunk in chunks]
    covered = [row for chunk in chunks for row in range(chunk.rows.start, chunk.rows.stop)]
    assert covered == list(range(bounds[-1]))
    assert max(sizes, default=0) <= most
    if not full:
        assert all(chunk.ended is None for chunk in chunks)
        assert max(sizes, default=0) - min(sizes, default=0) <= max(1, len(sizes))
        return
    assert set(sizes[:-1]) <= {most}
    ended = [place for chunk in chunks for place in range(chunk.ended.start, chunk.ended.stop)]
    assert {place for place, length in enumerate(lengths) if length} <= set(ended)
    assert len(ended) == len(set(ended))
    for chunk in chunks:
        assert chunk.span == slice(bounds[chunk.ended.start], bounds[chunk.ended.stop])
        early = [row for row in range(chunk.span.start, chunk.span.stop) if row < chunk.rows.start]
        assert chunk.early_rows == len(early)
        for place in range(chunk.ended.start + 1, chunk.ended.stop):
            assert bounds[place] >= chunk.rows.start


def test_chunks_are_full_whatever_the_lengths():
    chunks = plan_chunks(torch.tensor([0, 3, 3, 7, 9, 30, 32]), 32, 8, full=True)
    rows = [(chunk.rows.start, chunk.rows.stop) for chunk in chunks]
    assert rows == [(0, 8), (8, 16), (16, 24), (24, 32)]
    assert [chunk.ended for chunk in chunks] == [
        slice(0, 3),
        slice(3, 4),
        slice(4, 4),
        slice(4, 6),
    ]
    assert [chunk.early_rows for chunk in chunks] == [0, 1, 0, 15]


def test_rollouts_that_fill_chunks_are_not_computed_twice():
    chunks = plan_chunks(torch.tensor([0, 4, 8, 16]), 16, 8, full=True)
    assert [chunk.ended for chunk in chunks] == [slice(0, 2), slice(2, 3)]
    assert [chunk.early_rows for chunk in chunks] == [0, 0]


def test_bounds_that_are_not_on_the_host_are_not_read():
    bounds = torch.empty(4, device="meta")
    assert [chunk.ended for chunk in plan_chunks(bounds, 20, 8, full=True)] == [None] * 3
    assert plan_chunks(bounds, 8, 8, full=True)[0].ended == slice(0, 3)


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
    cpu = torch.device("cpu")
    assert most_rows(10**9, 64, cpu) == 1
    assert most_rows(2**20, 64, cpu) == 16 and most_rows(2**20, 64, cpu, 1) == 37
    assert row_slices(0, 5) == []
    assert row_slices(11, 5) == [slice(0, 4), slice(4, 8), slice(8, 11)]


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_buffers_of_a_gpu_have_sizes_that_repeat(backend):
    """Of batches smaller than a chunk; the memory of the last is then used again."""
    sizes = set()
    for num_rows in (257, 300, 384):
        buffer = chunk_buffer(num_rows, 100, torch.float32, torch.device("cpu"), backend)
        assert buffer.shape == (num_rows, 100) and buffer.stride(1) == 1
        sizes.add(buffer.untyped_storage().nbytes())
    assert len(sizes) == (1 if backend == "triton" else 3)


@pytest.mark.parametrize(
    ("rows_per_chunk", "num_rows", "expected"),
    [
        (1024, 32768, 8192),
        (1664, 32768, 8320),
        (2048, 32768, 8192),
        (1024, 3000, 3000),
        (512, 300, 512),
        (10000, 32768, 10000),
        (0, 0, 0),
    ],
)
def test_groups_are_whole_chunks(rows_per_chunk, num_rows, expected):
    assert head_group_rows(rows_per_chunk, num_rows) == expected
