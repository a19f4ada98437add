"""The counted work of losses on a teacher's top-k."""

import pytest

from bench.floor import topk
from bench.floor.__main__ import count_top_k


@pytest.fixture(scope="module")
def rows():
    return {
        (row["model"], row["device"], row["case"], row["trainable"]): row for row in count_top_k()
    }


@pytest.mark.parametrize("device", ["H100", "H200"])
@pytest.mark.parametrize("trainable", [False, True])
def test_a_top_k_costs_half_of_the_vocabulary_at_most(rows, device, trainable):
    for case in ("teacher_top_k", "served, renormalise"):
        assert rows["8b", device, case, trainable]["ratio_to_whole_vocabulary"] <= 0.5


def test_products(rows):
    counts = {
        (case, trainable): row["num_products"] for (_, _, case, trainable), row in rows.items()
    }
    assert counts == {
        ("teacher_top_k", False): 1,
        ("teacher_top_k", True): 1,
        ("served, renormalise", False): 0,
        ("served, renormalise", True): 0,
        ("served, bucket or drop", False): 2,
        ("served, bucket or drop", True): 4,
    }


def test_a_tail_writes_the_head_s_gradient_in_groups():
    assert topk.group_rows([1024] * 32) == [8192] * 4
    assert sum(topk.group_rows(topk.chunk_rows(2560))) == 32768
    assert len(topk.group_rows(topk.chunk_rows(2560))) == 4
