"""Compiles every Triton kernel without a GPU: registers, spills, instructions and bytes per entry.

    python -m bench.kernels_report                     # tables; exit status 1 if there is a problem
    python -m bench.kernels_report --check             # problems only
    python -m bench.kernels_report --json report.json  # the same figures for a program
    python -m bench.kernels_report --all --check       # every combination of settings: minutes
    python -m bench.kernels_report --write             # commit to the instructions and bytes found

Constants, launch settings and alignments are those that paint_kernels passes to the kernels at
Qwen3's vocabulary size. A problem is a spilled register, float64 arithmetic, shared memory above
the architecture's limit, a 32-bit row offset, or more instructions or bytes per entry (of a row of
logits, or of products with rows of the head) than bench/kernels/counts.json has.
bench.kernels.instructions counts the instructions, bench.kernels.traffic the bytes, and
bench.kernels.limits predicts the time of a kernel from both.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench.kernels.compiled import (
    ARCHITECTURES,
    COMPILED_SHAPE,
    RESIDENCY,
    Compiled,
    compile_all,
    count_traffic,
    launch_of,
    problems,
)
from bench.kernels.head_variants import head_launches
from bench.kernels.limits import COUNTS, DEVICES, committed, counts_by_row, growth
from bench.kernels.shard_variants import shard_launches
from bench.kernels.topk_variants import topk_launches
from bench.kernels.traffic import VARIANTS, every_variant
from bench.measure import commit, versions

NUM_TOKENS = 32768
PREDICTED_ARCHITECTURE = "sm_90"
"""of the GPUs whose times are predicted"""

Report = dict[str, Any]


def columns(header: list[str], rows: list[list[str]]) -> str:
    """Returns a plain-text table: the first three columns aligned left, figures right."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def compiled_table(compiled: list[Compiled]) -> str:
    header = ["kernel", "variant", "architecture", "warps", "registers", "spill bytes"]
    header += ["shared bytes", "of", "blocks", "load", "store"]
    rows = [
        [
            *(line.kernel, line.variant, line.architecture),
            *(str(figure) for figure in line[3:6]),
            *(f"{line.shared_bytes:,}", f"{line.max_shared_bytes:,}", str(line.resident_blocks)),
            *(f"{line.widest_load_bytes} B", f"{line.widest_store_bytes} B"),
        ]
        for line in compiled
    ]
    widest = "load, store: bytes of the widest access to memory by one thread"
    return f"{columns(header, rows)}\n{RESIDENCY}\n{widest}"


def traffic_table(traffic: list[dict[str, Any]]) -> str:
    header = ["kernel", "variant", "row", "entries per token", "loaded", "stored"]
    rows = [[str(value) for value in line.values()] for line in traffic]
    return f"{columns(header, rows)}\nbytes per entry, counted in Triton's interpreter"


def passes_table(compiled: list[Compiled]) -> str:
    header = ["kernel", "variant", "pass", *(architecture.name for architecture in ARCHITECTURES)]
    found: dict[tuple[str, str, str], dict[str, float]] = {}
    for line in compiled:
        for name, counts in line.passes.items():
            by_architecture = found.setdefault((line.kernel, line.variant, name), {})
            by_architecture[line.architecture] = counts.instructions
    rows = [
        [*key, *(f"{by_architecture[name]:.1f}" for name in header[3:])]
        for key, by_architecture in found.items()
    ]
    return f"{columns(header, rows)}\ninstructions per entry, counted in the compiled code"


def limits_table(report: Report) -> str:
    """Returns the time of each kernel by each limit, for rows of each kind."""
    limits = ("instructions", "special functions", "memory")
    header = ["kernel", "variant", "row", "instructions", "bytes"]
    header += [f"{device.name} {limit}" for device in DEVICES for limit in limits]
    counts_of, rows = counts_by_row(report, PREDICTED_ARCHITECTURE), []
    for line in report["traffic"]:
        key = line["kernel"], line["variant"], line["row"]
        counts, entries = counts_of[key], NUM_TOKENS * line["entries_per_token"]
        times = [counts.seconds(device)[limit] for device in DEVICES for limit in limits]
        figures = [f"{counts.instructions:.1f}", f"{counts.bytes:.1f}"]
        rows.append([*key, *figures, *(f"{1e3 * entries * time:.1f} ms" for time in times)])
    meaning = (
        f"per entry, and the predicted time of {NUM_TOKENS:,} tokens by each limit: the largest "
        "counts; statistics run for both models; no row of the head is in a cache"
    )
    return f"{columns(header, rows)}\n{meaning}"


def counts_only(report: Report) -> Report:
    """Returns what is committed of a report."""
    keys = ("kernel", "variant", "architecture", "passes")
    compiled = [{key: line[key] for key in keys} for line in report["compiled"]]
    return {"versions": report["versions"], "compiled": compiled, "traffic": report["traffic"]}


def grown(report: Report, *, every: bool) -> list[str]:
    """Returns the counts above the committed ones. Another version of Triton schedules
    differently."""
    bound = committed()
    ours, theirs = report["versions"]["triton"], bound["versions"]["triton"]
    if ours != theirs:
        print(f"instructions are not compared: Triton is {ours}, {COUNTS.name} is of {theirs}")
        bound, report, every = {**bound, "compiled": []}, {**report, "compiled": []}, False
    return growth(report, bound, every=every)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 1 if a kernel has a problem."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels_report", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--check", action="store_true", help="print problems only, no tables")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the figures to this file"
    )
    parser.add_argument("--all", action="store_true", help="compile every combination of settings")
    parser.add_argument(
        "--write", action="store_true", help=f"write the bounds to bench/kernels/{COUNTS.name}"
    )
    chosen = parser.parse_args(arguments)
    variants = every_variant() if chosen.all else VARIANTS
    launches = [(variant.name, launch_of(variant)) for variant in variants]
    launches += [*topk_launches(), *shard_launches(COMPILED_SHAPE), *head_launches(COMPILED_SHAPE)]
    compiled, traffic = compile_all(launches), count_traffic()
    report = {
        "name": "kernels_report",
        "command": "python -m bench.kernels_report" + " --all" * chosen.all,
        "commit": commit(),
        "versions": versions(),
        "compiled": [line._asdict() for line in compiled],
        "traffic": traffic,
    }
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(report, indent=1) + "\n")
    if chosen.write:
        COUNTS.write_text(json.dumps(counts_only(report), indent=1) + "\n")
    if not chosen.check:
        tables = [compiled_table(compiled), traffic_table(traffic), passes_table(compiled)]
        if traffic and not chosen.all:
            tables.append(limits_table(report))
        print("\n\n".join(tables), end="\n\n")
    found = [problem for line in compiled for problem in problems(line)]
    found += grown(report, every=not chosen.all)
    names = ", ".join(architecture.name for architecture in ARCHITECTURES)
    fine = (
        f"{len(launches)} variants on {names}: nothing spilled, no float64, 64-bit row offsets, "
        f"no more instructions or bytes than in {COUNTS.name}"
    )
    print("\n".join(found) or fine)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
