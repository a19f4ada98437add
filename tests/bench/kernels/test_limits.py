"""What bounds a row kernel, and the counts that must not grow."""

import copy

import pytest

from bench import kernels_report
from bench.kernels.head_variants import KERNELS as HEAD_KERNELS
from bench.kernels.head_variants import head_launches
from bench.kernels.limits import (
    DEVICES,
    Counts,
    committed,
    counts_by_row,
    growth,
    passes_taken,
)
from bench.kernels.shard_variants import KERNELS as SHARD_KERNELS
from bench.kernels.shard_variants import shard_launches
from bench.kernels.topk_variants import KERNELS as TOP_K_KERNELS
from bench.kernels.topk_variants import topk_launches
from bench.kernels.traffic import VARIANTS

WITHOUT_EXPONENTIALS = ("gathered_logits_kernel", "weighted_rows_kernel", "cap_gradient_kernel")
HEAD = "head_logits_kernel"
"""has exponentials with a cap"""


def test_every_usual_variant_has_counts_on_every_architecture():
    lines = {(line["kernel"], line["variant"]) for line in committed()["compiled"]}
    shape = 4, 1024
    others = (*topk_launches(), *shard_launches(shape), *head_launches(shape))
    expected = {(variant.kernel, variant.name) for variant in VARIANTS}
    assert lines == expected | {(launch.kernel.__name__, name) for name, launch in others}
    for architecture in ("sm_80", "sm_90", "sm_100", "gfx942", "gfx950"):
        found = counts_by_row(committed(), architecture)
        assert {key[:2] for key in found} == lines
        for (kernel, *_), counts in found.items():
            assert min(counts.instructions, counts.bytes) > 0
            assert (counts.special == 0) is (kernel in WITHOUT_EXPONENTIALS) or kernel == HEAD


def test_the_passes_that_a_row_takes():
    passes = ("interpolated statistics", "loss", "gradient again")
    assert passes_taken(passes, "clipped", "forward_kl") == ["loss"]
    assert passes_taken(passes, "clipped and missed", "forward_kl") == ["loss", "gradient again"]
    assert passes_taken(("loss", "gradient"), "plain", "jsd") == ["loss", "gradient"]
    found = counts_by_row(committed(), "sm_90")
    variant = "loss_kernel", "forward_kl, fp32 logits, fp16 gradient"
    plain, interpolated, missed = (
        found[*variant, row] for row in ("plain", "interpolated", "clipped and missed")
    )
    assert plain.instructions < interpolated.instructions
    assert plain.instructions < missed.instructions


def test_times_by_each_limit():
    """Of 32 instructions a multiprocessor with 4 schedulers does 4 logits per cycle, of 4
    exponentials as many; of 3 bytes a GPU with 3e12 bytes per second 1e12."""
    device = DEVICES[0]._replace(multiprocessors=1, cycles_per_s=1.0, bytes_per_s=3e12)
    times = Counts(32.0, 4.0, 3.0).seconds(device)
    assert times["instructions"] == times["special functions"] == pytest.approx(1 / 4)
    assert times["memory"] == pytest.approx(1e-12)


def test_a_count_that_grew_or_has_no_bound_is_found():
    bound, report = committed(), copy.deepcopy(committed())
    assert growth(report, bound, every=True) == []
    line = report["compiled"][0]
    (name,) = line["passes"]
    line["passes"][name][0] *= 1.1
    report["traffic"][0]["loaded_bytes_per_entry"] += 1
    more, moved = growth(report, bound, every=True)
    assert f"{line['architecture']}: instructions per entry, pass {name}" in more
    assert "bytes per entry" in moved and "above the committed" in moved
    for kernel in (*TOP_K_KERNELS, *SHARD_KERNELS, *HEAD_KERNELS):
        report = copy.deepcopy(committed())
        of_kernel = [line for line in report["compiled"] if line["kernel"] == kernel]
        for line in of_kernel:
            (name,) = line["passes"]
            line["passes"][name][0] *= 1.1
        assert len(growth(report, bound, every=True)) == len(of_kernel) >= 5
    report = copy.deepcopy(committed())
    report["traffic"][0]["row"] = "another"
    (missing,) = growth(report, bound, every=True)
    assert "has no bound" in missing
    assert growth(report, bound, every=False) == []


def test_instructions_of_another_triton_are_not_compared(capsys):
    report = copy.deepcopy(committed())
    report["versions"]["triton"] = "0.1"
    report["compiled"][0]["passes"] = {"statistics": [1e6, 1]}
    assert kernels_report.grown(report, every=True) == []
    assert "not compared: Triton is 0.1" in capsys.readouterr().out
    report["traffic"][0]["stored_bytes_per_entry"] += 1
    assert len(kernels_report.grown(report, every=True)) == 1
