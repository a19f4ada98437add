"""The counted work of losses on a teacher's top-k."""

import copy

import pytest

from bench.floor import topk
from bench.floor.__main__ import count_top_k
from bench.kernels.limits import DEVICES, committed


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


@pytest.mark.parametrize(
    ("kernel", "part"),
    [
        ("gathered_logits_kernel", lambda: topk.chosen_part(4096)),
        ("weighted_rows_kernel", lambda: topk.support_part(4096, trainable=True, with_tail=True)),
        ("softmax_kernel", lambda: topk.tail_part(4096, DEVICES[0], trainable=False)),
    ],
)
def test_instructions_are_those_of_the_compiled_kernels(kernel, part, monkeypatch):
    def rows():
        return [counts.instructions for counts, _ in part().work.rows]

    before, report = rows(), copy.deepcopy(committed())
    for line in report["compiled"]:
        if line["kernel"] == kernel:
            line["passes"] = {name: (9.0, 1.0) for name in line["passes"]}
    monkeypatch.setattr(topk, "committed", lambda: report)
    expected = [*before[:-1], 9.0]
    if kernel == "weighted_rows_kernel":
        # Of the head's gradient 16 entries of one iteration, and the loop for the rest of them.
        iterations = topk.NUM_TOKENS * topk.NUM_IDS / topk.QWEN3_VOCAB_SIZE / 16 + 0.5
        expected = [9.0, 9.0 * 16 + 98 * (iterations - 1)]
    assert rows() == pytest.approx(expected)
