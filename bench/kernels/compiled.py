"""Compiles the Triton kernels ahead of time, without a GPU, and reads what the compiler reports.

Constants, launch settings and alignments are those that paint_kernels._triton_backend passes to
the kernels at Qwen3's vocabulary size.
"""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget

from bench.kernels.instructions import Pass, disassembled, passes_of, program_pass
from bench.kernels.launches import Launch
from bench.kernels.traffic import Row, Variant, call_launcher, replaced_kernels
from bench.measure import ROOT

COMPILED_SHAPE = (4, 151936)
"""(R, V): four rows, so that every (R,) tensor is aligned to 16 bytes, as in a chunk"""
KIB = 1024


class Architecture(NamedTuple):
    name: str
    target: GPUTarget
    max_shared_bytes: int
    """per block"""
    max_warps_per_scheduler: int
    max_blocks: int
    """resident blocks per multiprocessor"""


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; for AMD the
# limits of LLVM's AMDGPU target.
ARCHITECTURES = (
    Architecture("sm_80", GPUTarget("cuda", 80, 32), 163 * KIB, 16, 32),
    Architecture("sm_90", GPUTarget("cuda", 90, 32), 227 * KIB, 16, 32),
    Architecture("sm_100", GPUTarget("cuda", 100, 32), 227 * KIB, 16, 32),
    Architecture("gfx942", GPUTarget("hip", "gfx942", 64), 64 * KIB, 8, 16),
    Architecture("gfx950", GPUTarget("hip", "gfx950", 64), 160 * KIB, 8, 16),
)
SCHEDULERS = 4
"""per multiprocessor, on all of these architectures"""
REGISTERS_PER_LANE = 512
"""32-bit registers per lane that a scheduler's warps share: 16,384 for 32 lanes, 32,768 for 64
(AMD)"""
REGISTER_GRANULE = 8
RESIDENCY = (
    f"blocks: min({SCHEDULERS} * min({REGISTERS_PER_LANE} // registers rounded up to "
    f"{REGISTER_GRANULE}, warps a scheduler holds) // warps, blocks a multiprocessor holds)"
)


def launch_of(variant: Variant) -> Launch:
    """Records what the launcher passes to the variant's kernel, without running it."""
    launches: dict[str, Launch] = {}

    def recorder(kernel: Any) -> dict[Any, Any]:
        def record(*arguments: Any, **settings: Any) -> None:
            launches[kernel.__name__] = Launch(kernel, arguments, settings)

        return {(COMPILED_SHAPE[0], 1): record}

    with replaced_kernels(recorder):
        call_launcher(variant, variant.shape(COMPILED_SHAPE), Row(False, False))
    return launches[variant.kernel]._replace(passes=pass_names(variant))


class Compiled(NamedTuple):
    """The compiler's report on one kernel and architecture."""

    kernel: str
    variant: str
    architecture: str
    num_warps: int
    registers: int
    """32-bit registers per thread; vector registers on AMD"""
    spill_bytes: int
    """NVIDIA: bytes stored and loaded by the code; AMD: per thread, in memory or other registers"""
    shared_bytes: int
    max_shared_bytes: int
    resident_blocks: int
    widest_load_bytes: int
    widest_store_bytes: int
    tile_load_bytes: int
    """per column, over the loads of all passes, after equal loads were merged"""
    tile_store_bytes: int
    passes: dict[str, Pass]
    """see bench.kernels.instructions"""
    float64: bool
    row_offsets_64bit: bool


def pass_names(variant: Variant) -> tuple[str, ...]:
    """Returns the names of the kernel's passes over a row, in the order of its loops."""
    if variant.kernel != "loss_kernel":
        return ("statistics",) if variant.kernel == "stats_kernel" else ("gradient",)
    names = ["interpolated statistics"] * variant.interpolates + ["loss"]
    predicts = variant.divergence == "forward_kl"
    if variant.gradient is not None and (variant.clip is not None or not predicts):
        names.append("gradient again" if predicts else "gradient")
    return tuple(names)


def compile_launch(launch: Launch, variant: str, architecture: Architecture) -> Compiled:
    """Compiles with an empty cache, so that ptxas runs and prints its report."""
    num_warps = max(1, launch.settings["num_warps"] * 32 // architecture.target.warp_size)
    # Fused multiply-add is Triton 3.9's default; unset, Triton warns that 3.10 turns it off.
    options = {"num_warps": num_warps, "enable_fp_fusion": True}
    log = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as cache,
        knobs.cache.scope(),
        knobs.nvidia.scope(),
        contextlib.redirect_stdout(log),
    ):
        knobs.cache.dir = cache
        knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(launch.source(), target=architecture.target, options=options)
    ttir = compiled.asm["ttir"]
    on_nvidia = architecture.target.backend == "cuda"
    assembly = compiled.asm["ptx" if on_nvidia else "amdgcn"]
    code = disassembled(compiled.asm["cubin"]) if on_nvidia else assembly
    used = ptxas_usage(log.getvalue()) if on_nvidia else amd_usage(assembly)
    widest = widest_on_nvidia(assembly) if on_nvidia else widest_on_amd(assembly)
    return Compiled(
        kernel=launch.kernel.__name__,
        variant=variant,
        architecture=architecture.name,
        num_warps=num_warps,
        registers=used[0],
        spill_bytes=used[1],
        shared_bytes=compiled.metadata.shared,
        max_shared_bytes=architecture.max_shared_bytes,
        resident_blocks=resident_blocks(used[0], num_warps, architecture),
        widest_load_bytes=widest["load"],
        widest_store_bytes=widest["store"],
        tile_load_bytes=sum(bytes_of_passes(ttir, "load")),
        tile_store_bytes=sum(bytes_of_passes(ttir, "store")),
        passes=counted_passes(launch, code, ttir, architecture, num_warps),
        float64=(".f64" if on_nvidia else "_f64") in assembly,
        row_offsets_64bit=row_offsets_are_64bit(ttir),
    )


def counted_passes(
    launch: Launch, code: str, ttir: str, architecture: Architecture, num_warps: int
) -> dict[str, Pass]:
    on_amd, warp_size = architecture.target.backend != "cuda", architecture.target.warp_size
    if launch.iterations is None:
        return passes_of(code, launch.passes, bytes_of_passes(ttir, "load"), amd=on_amd)
    per_thread = launch.entries_per_thread(warp_size, num_warps)
    (name,) = launch.passes
    return {name: program_pass(code, launch.iterations, per_thread, amd=on_amd)}


def ptxas_usage(log: str) -> tuple[int, int]:
    """Registers per thread, and bytes spilled."""
    registers = re.findall(r"Used (\d+) registers", log)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    assert registers and spills, log
    return max(map(int, registers)), sum(map(int, spills))


def amd_usage(assembly: str) -> tuple[int, int]:
    """Registers per thread, and bytes spilled to private memory or other registers."""
    names = "vgpr_count|vgpr_spill_count|sgpr_spill_count|private_segment_fixed_size"
    used = {name: int(n) for name, n in re.findall(rf"\.({names}): +(\d+)", assembly)}
    spilled_registers = used["vgpr_spill_count"] + used["sgpr_spill_count"]
    return used["vgpr_count"], max(used["private_segment_fixed_size"], 4 * spilled_registers)


def widest_on_nvidia(ptx: str) -> dict[str, int]:
    widest = {"load": 0, "store": 0}
    for kind, count, bits in re.findall(
        r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)(?=\s)", ptx
    ):
        access = "load" if kind == "ld" else "store"
        widest[access] = max(widest[access], int(count or 1) * int(bits) // 8)
    return widest


def widest_on_amd(assembly: str) -> dict[str, int]:
    widest = {"load": 0, "store": 0}
    for access, what in re.findall(r"\b(?:global|buffer|flat)_(load|store)_(\w+)", assembly):
        if words := re.fullmatch(r"dword(?:x(\d))?", what):
            size = 4 * int(words[1] or 1)
        else:
            size = 2 if "short" in what else 1
        widest[access] = max(widest[access], size)
    return widest


def bytes_of_passes(ttir: str, access: str) -> list[int]:
    """Returns the bytes per column over all loads, or all stores, of each pass: a loop over the
    tiles of a row."""
    found, end = [], None
    for line in ttir.splitlines():
        if end is None and (loop := re.match(r"( *)(?:%\S+ = )?scf\.for ", line)):
            end = loop[1] + "}"
            found.append(0)
        elif end is not None and line.startswith(end):
            end = None
        elif end and (
            used := re.search(rf"tt\.{access} .*tensor<\d+x!tt\.ptr<[a-z]+(\d+)>>", line)
        ):
            found[-1] += int(used[1]) // 8
    return found


def row_offsets_are_64bit(ttir: str) -> bool:
    """Returns whether row offsets are 64-bit products and no 32-bit offset is added to an
    argument."""
    arguments = "|".join(re.findall(r"%(\w+): !tt\.ptr", ttir))
    narrow_product = re.search(r"arith\.muli .*%\w*stride\w*.* : i32", ttir)
    narrow_offset = re.search(rf"tt\.addptr %(?:{arguments}), .* : !tt\.ptr<\w+>, i32", ttir)
    wide_product = re.search(r"arith\.muli .* : i64", ttir)
    return bool(wide_product) and not narrow_product and not narrow_offset


def resident_blocks(registers: int, num_warps: int, architecture: Architecture) -> int:
    """Blocks that fit on one multiprocessor by registers and threads; see `RESIDENCY`."""
    granules = -(-max(registers, 1) // REGISTER_GRANULE)
    warps = min(
        REGISTERS_PER_LANE // (granules * REGISTER_GRANULE), architecture.max_warps_per_scheduler
    )
    return min(SCHEDULERS * warps // num_warps, architecture.max_blocks)


def problems(compiled: Compiled) -> list[str]:
    found = []
    if compiled.spill_bytes:
        found.append(f"{compiled.spill_bytes} bytes of registers spilled")
    if compiled.float64:
        found.append("float64 arithmetic")
    if compiled.shared_bytes > compiled.max_shared_bytes:
        found.append(
            f"{compiled.shared_bytes} bytes of shared memory, above {compiled.max_shared_bytes}"
        )
    if not compiled.row_offsets_64bit:
        found.append("no 64-bit row offset")
    where = f"{compiled.kernel}, {compiled.variant}, {compiled.architecture}"
    return [f"{where}: {what}" for what in found]


def count_traffic() -> list[dict[str, Any]]:
    """Returns the bytes moved by variant and row, counted by another process with Triton's
    interpreter."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.kernels.traffic"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def compile_all(launches: Iterable[tuple[str, Launch]]) -> list[Compiled]:
    """Compiles launches, each with the name of its variant, for every architecture."""
    return [
        compile_launch(launch, name, architecture)
        for name, launch in launches
        for architecture in ARCHITECTURES
    ]
