"""The counted work of `paint_loss`, and what it is not to exceed."""

import json

import pytest
import torch

from bench.floor import earlier, loss, work
from bench.floor.__main__ import count_losses, count_top_k
from bench.kernels.limits import DEVICES
from bench.losses import EQUAL, MIXTURES, QWEN3_HIDDEN
from bench.plots import result_of
from paint_kernels import _plan

CASES = [
    (device, model, divergence, trainable)
    for device in DEVICES
    for model in QWEN3_HIDDEN
    for divergence in loss.DIVERGENCES
    for trainable in (False, True)
]


@pytest.mark.parametrize(("device", "model", "divergence", "trainable"), CASES)
def test_any_lengths_and_clipped_rows_within_5_percent(device, model, divergence, trainable):
    """Of equal lengths, per token, and of no clipped row."""

    def seconds(case, share):
        options = {"trainable": trainable, "clipped_share": share}
        return loss.count(model, device, case, divergence, **options)["predicted_s"]

    for case in MIXTURES:
        assert seconds(case, 0.6) <= 1.05 * seconds(EQUAL, 0.6)
        assert seconds(case, 0.6) <= 1.05 * seconds(case, 0.0)


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
@pytest.mark.parametrize("model", QWEN3_HIDDEN)
@pytest.mark.parametrize("case", MIXTURES)
def test_the_head_s_gradient_within_5_percent_of_four_products(device, model, case):
    row = loss.count(model, device, case, "forward_kl", trainable=True, clipped_share=0.6)
    assert row["head_gradient_s"] <= 0.05 * row["gemms_s"]


def test_smaller_groups_would_exceed_that(monkeypatch):
    monkeypatch.setattr(_plan, "HEAD_GROUP_ROWS", 7168)
    row = loss.count("8b", DEVICES[0], MIXTURES[1], "forward_kl", trainable=True, clipped_share=0.6)
    assert row["num_head_products"] == 6
    assert row["head_gradient_s"] > 0.05 * row["gemms_s"]


def test_bytes_of_the_head_s_gradient():
    """Written; read and written; read and written once more; read, and written as bfloat16."""
    assert work.head_gradient_bytes(1) == 4 + 8 + 6
    assert work.head_gradient_bytes(3) == 4 + 8 + 8 + 8 + 6
    assert work.head_gradient_bytes(3, from_zeros=True) == 4 + 8 + 8 + 8 + 8 + 6


def test_groups_and_rows_that_are_computed_again():
    assert loss.head_products([1024] * 32, [984]) == [8192] * 4 + [984]
    assert loss.head_products([1664] * 19 + [1152], []) == [8320] * 3 + [7808]


@pytest.mark.parametrize("trainable", [False, True])
def test_row_kernels_take_the_largest_of_the_limits(trainable):
    for device in DEVICES:
        for divergence in loss.DIVERGENCES:
            options = {"trainable": trainable, "clipped_share": 0.6}
            row = loss.count("8b", device, EQUAL, divergence, **options)
            limits = row["rows_by_limit_s"]
            assert max(limits.values()) <= row["rows_s"] * (1 + 1e-12)
            assert row["rows_s"] < sum(limits.values())


def test_whole_rollouts_in_a_chunk():
    bounds = torch.tensor([300, 300, 300, 2500, 100, 900, 200]).cumsum(0)
    chunks, cut = earlier.whole_rollouts(torch.cat([torch.tensor([0]), bounds]), 1024)
    assert (chunks, cut) == ([900, 834, 834, 832, 1000, 200], [2500])


def test_what_it_was_before():
    """At the lengths that filled the chunks it was as fast, but for clipped rows and the head."""
    device, equal, odd = DEVICES[0], EQUAL, "all 1,100"
    options = {"trainable": False, "clipped_share": 0.02}
    now = loss.count("8b", device, equal, "forward_kl", **options)
    before = earlier.count("8b", device, equal, "forward_kl", **options)
    assert before["predicted_s"] == pytest.approx(now["predicted_s"], rel=0.02)
    before = earlier.count("8b", device, odd, "forward_kl", **options)
    assert before["ratio_to_floor"] > 1.4


def test_the_committed_result_is_of_the_code_and_the_counts():
    """`python -m bench.floor --output bench/results/floor.json` makes it again."""
    committed = result_of("floor")
    assert committed["rows"] == json.loads(json.dumps(count_losses()))
    assert committed["top_k"] == json.loads(json.dumps(count_top_k()))
