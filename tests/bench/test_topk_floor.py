"""The counted work of losses on a teacher's top-k."""

import pytest

from bench import topk_floor


@pytest.fixture(scope="module")
def rows():
    return {
        (row["model"], row["device"], row["case"], row["trainable"]): row
        for row in topk_floor.count_all()
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
