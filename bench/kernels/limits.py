"""What bounds the kernels on a GPU: memory, instructions, or special functions.

`counts.json` has the instructions and bytes per entry of every kernel variant, as
`python -m bench.kernels_report --write` counted them: per logit, or in the products of a top-k per
entry of the row that an id takes. The report fails when a count grows, and `bench.floor` predicts
times from the file.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

COUNTS = Path(__file__).with_name("counts.json")
GROWTH = 1.02
"""a count above this multiple of the committed one is a problem; less is the scheduler's freedom"""
THREADS_PER_WARP = 32
SCHEDULERS = 4
"""per multiprocessor, of one instruction of a warp per cycle each"""
SPECIAL_PER_CYCLE = 16
"""threads whose exponential or logarithm a multiprocessor computes in one cycle (CUDA C++
Programming Guide, "Throughput of Native Arithmetic Instructions")"""


class Device(NamedTuple):
    name: str
    flops_per_s: float
    """rate of the three bare products at N = 8192, H = 4096: 42 ms on an H100 (TRL, issue 7244)"""
    bytes_per_s: float
    """rate of a large device-to-device copy, counting bytes read and written"""
    multiprocessors: int = 132
    cycles_per_s: float = 1.7e9
    """below the 1.83 GHz of the published peak rate (989 TFLOP/s), as under full load"""


DEVICES = (Device("H100", 7.28e14, 3.0e12), Device("H200", 7.28e14, 4.3e12))


class Counts(NamedTuple):
    """What a kernel does per entry, over the passes that the row takes."""

    instructions: float
    special: float
    bytes: float

    def seconds(self, device: Device) -> dict[str, float]:
        """Returns the time per entry by each limit, if the others were none."""
        slots = device.multiprocessors * SCHEDULERS * THREADS_PER_WARP * device.cycles_per_s
        special = device.multiprocessors * SPECIAL_PER_CYCLE * device.cycles_per_s
        return {
            "instructions": self.instructions / slots,
            "special functions": self.special / special,
            "memory": self.bytes / device.bytes_per_s,
        }


def passes_taken(passes: Iterable[str], row: str, divergence: str) -> list[str]:
    """Returns those of a kernel's passes that a row of this kind takes."""
    skipped = set()
    if "interpolated" not in row:
        skipped.add("interpolated statistics")
    if divergence == "forward_kl" and "missed" not in row:
        skipped.add("gradient again")
    return [name for name in passes if name not in skipped]


def counts_by_row(report: dict[str, Any], architecture: str) -> dict[tuple[str, str, str], Counts]:
    """Returns the counts by kernel, variant and kind of row, of a report as `counts.json` has
    it."""
    passes = {
        (line["kernel"], line["variant"]): line["passes"]
        for line in report["compiled"]
        if line["architecture"] == architecture
    }
    found = {}
    for line in report["traffic"]:
        kernel, variant, row = line["kernel"], line["variant"], line["row"]
        own = passes[kernel, variant]
        taken = [own[name] for name in passes_taken(own, row, variant.split(",")[0])]
        instructions, special = (sum(counts) for counts in zip(*taken, strict=True))
        moved = line["loaded_bytes_per_entry"] + line["stored_bytes_per_entry"]
        found[kernel, variant, row] = Counts(instructions, special, moved)
    return found


def committed() -> dict[str, Any]:
    return json.loads(COUNTS.read_text())


def counted(report: dict[str, Any]) -> dict[str, float]:
    """Returns every count that must not grow, by a name for messages."""
    found = {}
    for line in report["compiled"]:
        where = f"{line['kernel']}, {line['variant']}, {line['architecture']}"
        for name, (instructions, _) in line["passes"].items():
            found[f"{where}: instructions per entry, pass {name}"] = instructions
    for line in report["traffic"]:
        where = f"{line['kernel']}, {line['variant']}, row {line['row']}"
        moved = line["loaded_bytes_per_entry"] + line["stored_bytes_per_entry"]
        found[f"{where}: bytes per entry"] = moved
    return found


def growth(report: dict[str, Any], bound: dict[str, Any], *, every: bool) -> list[str]:
    """Returns the counts of a report that are above a committed one.

    every: a count without a bound is a problem, too.
    """
    bounds, found = counted(bound), []
    for name, value in counted(report).items():
        if name in bounds and value > GROWTH * bounds[name]:
            found.append(f"{name}: {value:g}, above the committed {bounds[name]:g}")
        elif name not in bounds and every:
            found.append(f"{name}: {value:g}, and {COUNTS.name} has no bound (--write makes it)")
    return found
