"""Every kernel compiles for five architectures without spills or float64, and moves few bytes."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from bench import kernels_report
from bench.kernels.compiled import ARCHITECTURES, compile_launch, problems
from bench.kernels.head_variants import KERNELS as HEAD_KERNELS
from bench.kernels.launches import Launch
from bench.kernels.shard_variants import KERNELS as SHARD_KERNELS
from bench.kernels.topk_variants import KERNELS as TOP_K_KERNELS
from bench.kernels.traffic import KERNELS, VARIANTS, every_variant

ROOT = Path(__file__).parents[3]
FORWARD_KL = "forward_kl, fp32 logits, fp16 gradient"
WITHOUT_SUMS = (
    *("softmax_kernel", "logprobs_gradient_kernel"),
    *("shard_gradient_kernel", "shard_logprobs_gradient_kernel"),
    *("head_logits_kernel", "cap_gradient_kernel"),
)
ARCHITECTURE = {architecture.name: architecture for architecture in ARCHITECTURES}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The command's own report, from a process without Triton's interpreter."""
    file = tmp_path_factory.mktemp("report") / "report.json"
    done = subprocess.run(
        [sys.executable, "-m", "bench.kernels_report", "--check", "--json", str(file)],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout
    return json.loads(file.read_text())


def moved(report, variant):
    """Bytes loaded and stored per entry, by row. Rounded: what a row has once, such as its
    candidates, is less than half a byte per entry."""
    return {
        line["row"]: (
            round(line["loaded_bytes_per_entry"]),
            round(line["stored_bytes_per_entry"]),
        )
        for line in report["traffic"]
        if line["variant"] == variant
    }


def test_every_kernel_is_sound_on_every_architecture(report):
    compiled = report["compiled"]
    found = {(line["kernel"], line["architecture"]) for line in compiled}
    assert len(KERNELS) >= 3
    every = (*KERNELS, *TOP_K_KERNELS, *SHARD_KERNELS, *HEAD_KERNELS)
    assert found == {(kernel, name) for kernel in every for name in ARCHITECTURE}
    for line in compiled:
        assert line["spill_bytes"] == 0, line
        assert not line["float64"] and line["row_offsets_64bit"], line
        # Threads exchange sums, and entries of a bias that were loaded in half precision.
        exchanges = line["kernel"] not in WITHOUT_SUMS or "bf16 bias" in line["variant"]
        if (line["kernel"], line["variant"]) == ("weighted_rows_kernel", "bf16 head, ragged"):
            # Rows that are not aligned are read one by one: a thread has all rows of its columns.
            exchanges = False
        assert (line["shared_bytes"] > 0) is exchanges, line
        assert line["shared_bytes"] <= line["max_shared_bytes"], line
        assert line["registers"] > 0 and line["resident_blocks"] > 0, line
        if "ragged" not in line["variant"]:
            assert line["widest_load_bytes"] >= 8, line


def test_every_combination_is_named_once_and_contains_the_usual_ones():
    names = [(variant.kernel, variant.name) for variant in every_variant()]
    assert len(names) == len(set(names))
    assert {(variant.kernel, variant.name) for variant in VARIANTS} <= set(names)


def test_a_row_is_read_as_often_as_it_must_be(report):
    """With float32 logits of two models and a float16 gradient: one pass after the statistics, and
    another only where the clipped mass was predicted wrong."""
    assert moved(report, "fp32 logits")["plain"] == (4, 0)
    assert moved(report, FORWARD_KL) == {
        "plain": (8, 2),
        "clipped": (8, 2),
        "clipped and missed": (16, 4),
        "interpolated": (16, 2),
        "clipped and interpolated": (16, 2),
        "clipped and interpolated and missed": (24, 4),
    }
    assert moved(report, f"{FORWARD_KL}, ragged") == moved(report, FORWARD_KL)
    assert moved(report, "forward_kl, fp32 logits, no gradient")["clipped"] == (8, 0)
    assert moved(report, "forward_kl, bf16 logits, bf16 gradient")["plain"] == (4, 2)
    for divergence in ("reverse_kl", "jsd"):
        by_row = moved(report, f"{divergence}, fp32 logits, fp16 gradient")
        assert by_row["plain"] == by_row["clipped"] == (16, 2)
    assert moved(report, "fp32 logits, fp16 gradient")["plain"] == (4, 2)
    # The columns of a rank, twice after the statistics.
    assert moved(report, "jsd, sums")["plain"] == (8, 0)
    assert moved(report, "jsd, fp16 gradient")["plain"] == (8, 2)


def test_a_scale_a_cap_and_temperatures_read_and_write_each_logit_once(report):
    """And, on the way back, each gradient. The bias is read by every row: 2 bytes in bfloat16,
    which a cache serves."""
    assert moved(report, "scale")["plain"] == moved(report, "scale, cap")["plain"] == (4, 4)
    assert moved(report, "bf16 bias, scale, cap, temperatures")["plain"] == (6, 4)
    for name in ("cap, fp16 gradient", "cap, temperatures, fp16 gradient"):
        assert moved(report, name)["plain"] == (6, 2)


def test_a_row_of_the_head_is_read_once_for_each_id(report):
    """2 bytes an entry in bfloat16, 4 in float32, also where a tile has room for more ids. A
    trainable head's gradient is read and written once for the sixteen ids that add to it."""
    for name in ("bf16, k 64", "bf16, k 50", "bf16, k 64, ragged", "bf16 head, with a tail"):
        assert moved(report, name)["plain"] == (2, 0)
    assert moved(report, "fp32, k 64")["plain"] == moved(report, "fp32 head, with a tail")["plain"]
    assert moved(report, "fp32, k 64")["plain"] == (4, 0)
    (line,) = (one for one in report["traffic"] if one["variant"] == "head's gradient, bf16 hidden")
    assert line["entries_per_token"] == 64 * 4096
    assert line["loaded_bytes_per_entry"] == pytest.approx(2 + 4 / 16, abs=0.06)
    assert line["stored_bytes_per_entry"] == pytest.approx(4 / 16, abs=0.06)


def test_counted_bytes_are_those_of_the_compiled_loads_and_stores(report):
    """A row that takes every branch moves the bytes of all compiled loads and stores. (The kernels
    for a top-k and for heads have no passes over rows of logits.)"""
    for line in report["compiled"]:
        if line["kernel"] in (*TOP_K_KERNELS, *HEAD_KERNELS):
            continue
        rows = moved(report, line["variant"]).values()
        most = max(loaded for loaded, _ in rows), max(stored for _, stored in rows)
        in_code = line["tile_load_bytes"], line["tile_store_bytes"]
        if "no clip" in line["variant"]:  # compiled with the second pass, which no row takes
            assert most[0] <= in_code[0] and most[1] <= in_code[1]
        else:
            assert most == in_code


@triton.jit
def centre_kernel(x_ptr, y_ptr, row_stride, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * row_stride + columns)
    if WIDE:
        x = x.to(tl.float64)
    tl.store(y_ptr + row * row_stride + columns, (x - tl.sum(x, axis=0)).to(tl.float32))


@triton.jit
def narrow_offset_kernel(x_ptr, y_ptr, row_stride, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    offset = tl.program_id(0) * row_stride
    if WIDE:  # too late: the product has already wrapped
        offset = offset.to(tl.int64)
    columns = tl.arange(0, BLOCK)
    tl.store(y_ptr + offset + columns, tl.load(x_ptr + offset + columns))


@triton.jit
def loop_kernel(x_ptr, y_ptr, row_stride, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, row_stride, BLOCK):
        x = tl.load(x_ptr + row * row_stride + start + tl.arange(0, BLOCK))
        total += tl.exp2(x)
        if WIDE:
            total = tl.exp2(total) * x + x
    tl.store(y_ptr + row * row_stride + tl.arange(0, BLOCK), total)


@pytest.mark.parametrize("name", ARCHITECTURE)
def test_instructions_of_a_loop_are_counted_per_column(name):
    """Of a load of 16 bytes by each thread: an exponential and a sum, or two of them and more. A
    tile of twice the columns has as many per column."""
    x, found = torch.empty(16), {}
    for wide, block in itertools.product((False, True), (512, 1024)):
        settings = {"row_stride": 4096, "WIDE": wide, "BLOCK": block, "num_warps": 4}
        launch = Launch(loop_kernel, (x, x), settings, passes=("sum",))
        line = compile_launch(launch, "planted", ARCHITECTURE[name])
        found[wide, block] = line.passes["sum"]
    for block in (512, 1024):
        little, much = found[False, block], found[True, block]
        assert (little.special, much.special) == (1, 2)
        assert 2 < little.instructions < 12
        assert 1 <= much.instructions - little.instructions < 10
        assert little.instructions <= found[False, 512].instructions


@pytest.mark.parametrize("name", ARCHITECTURE)
def test_all_instructions_of_a_program_are_counted_per_entry(name):
    """More iterations add the instructions of the loop, which may be unrolled, and no others."""
    x, counts = torch.empty(16), []
    settings = {"row_stride": 4096, "WIDE": False, "BLOCK": 512, "num_warps": 4}
    launch = Launch(loop_kernel, (x, x), settings, (2,), ("sum",))
    (per_column, _) = compile_launch(launch, "planted", ARCHITECTURE[name]).passes["sum"]
    for iterations in (1, 8, 15):
        whole = launch._replace(iterations=iterations, num_entries=2 * 512)
        counts.append(compile_launch(whole, "planted", ARCHITECTURE[name]).passes["sum"])
    one, eight, fifteen = counts
    added = eight.special - one.special
    assert added in (7, 14, 28, 56) and fifteen.special - eight.special == added
    assert one.special >= added / 7
    assert one.instructions > added / 7 * per_column
    expected = pytest.approx(added * per_column, rel=1e-2)
    assert eight.instructions - one.instructions == expected
    assert fifteen.instructions - eight.instructions == expected


def compiled(kernel, architecture, *, wide=False, block=256, num_warps=4):
    x = torch.empty(16)
    settings = {"row_stride": 256, "WIDE": wide, "BLOCK": block, "num_warps": num_warps}
    return compile_launch(Launch(kernel, (x, x), settings), "planted", architecture)


@pytest.mark.parametrize("name", ARCHITECTURE)
def test_a_sound_kernel_has_no_problem(name):
    assert problems(compiled(centre_kernel, ARCHITECTURE[name])) == []


@pytest.mark.parametrize(("name", "block"), [("sm_90", 2**14), ("gfx942", 2**15)])
def test_a_spill_is_found(name, block):
    """512 values per thread, which has 255 registers on NVIDIA's processors and 512 on AMD's."""
    (found,) = problems(compiled(centre_kernel, ARCHITECTURE[name], block=block, num_warps=1))
    assert found.startswith(f"centre_kernel, planted, {name}: ")
    assert found.endswith("bytes of registers spilled")


@pytest.mark.parametrize("name", ["sm_80", "gfx942"])
def test_float64_is_found(name):
    (found,) = problems(compiled(centre_kernel, ARCHITECTURE[name], wide=True))
    assert found == f"centre_kernel, planted, {name}: float64 arithmetic"


@pytest.mark.parametrize("wide", [False, True])
def test_a_row_offset_in_32_bits_is_found(wide):
    (found,) = problems(compiled(narrow_offset_kernel, ARCHITECTURE["sm_100"], wide=wide))
    assert found == "narrow_offset_kernel, planted, sm_100: no 64-bit row offset"


def test_too_much_shared_memory_is_found():
    little = ARCHITECTURE["sm_90"]._replace(max_shared_bytes=4)
    (found,) = problems(compiled(centre_kernel, little))
    assert "bytes of shared memory, above 4" in found


@pytest.mark.parametrize("wide", [False, True])
def test_a_problem_is_printed_and_fails_the_command(monkeypatch, capsys, wide):
    planted = compiled(centre_kernel, ARCHITECTURE["sm_90"], wide=wide)
    monkeypatch.setattr(kernels_report, "compile_all", lambda _: [planted])
    monkeypatch.setattr(kernels_report, "count_traffic", lambda: [])
    assert kernels_report.main(["--check"]) == wide
    assert ("centre_kernel, planted, sm_90: float64" in capsys.readouterr().out) is wide
