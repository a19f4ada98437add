"""Compiles every Triton kernel without a GPU and reports registers, spills and bytes moved.

    python -m bench.kernels_report                     # tables; exit status 1 if there is a problem
    python -m bench.kernels_report --check             # problems only
    python -m bench.kernels_report --json report.json  # the same figures for a program
    python -m bench.kernels_report --all --check       # every combination of settings: minutes

Constants, launch settings and alignments are those that paint_kernels._triton_backend passes to the
kernels at Qwen3's vocabulary size. A problem is a spilled register, float64 arithmetic, shared
memory above the architecture's limit, or a 32-bit row offset. bench.kernels.traffic counts the
bytes moved.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench.kernels.compiled import (
    ARCHITECTURES,
    RESIDENCY,
    Compiled,
    compile_all,
    count_traffic,
    launch_of,
    problems,
)
from bench.kernels.topk_variants import topk_launches
from bench.kernels.traffic import VARIANTS, every_variant
from bench.measure import commit, versions


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
    header = ["kernel", "variant", "row", "loaded", "stored"]
    rows = [[str(value) for value in line.values()] for line in traffic]
    return f"{columns(header, rows)}\nbytes per logit element, counted in Triton's interpreter"


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
    chosen = parser.parse_args(arguments)
    variants = every_variant() if chosen.all else VARIANTS
    launches = [*((variant.name, launch_of(variant)) for variant in variants), *topk_launches()]
    compiled, traffic = compile_all(launches), count_traffic()
    if chosen.json is not None:
        report = {
            "name": "kernels_report",
            "command": "python -m bench.kernels_report" + " --all" * chosen.all,
            "commit": commit(),
            "versions": versions(),
            "compiled": [line._asdict() for line in compiled],
            "traffic": traffic,
        }
        chosen.json.write_text(json.dumps(report, indent=1) + "\n")
    if not chosen.check:
        print(compiled_table(compiled), traffic_table(traffic), sep="\n\n", end="\n\n")
    found = [problem for line in compiled for problem in problems(line)]
    names = ", ".join(architecture.name for architecture in ARCHITECTURES)
    fine = f"{len(launches)} variants on {names}: nothing spilled, no float64, 64-bit row offsets"
    print("\n".join(found) or fine)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
