"""Counts the instructions that a compiled kernel executes per logit.

A kernel's passes over a row are its loops: the code from a label to the last branch back to it. The
instructions of a loop are counted in the disassembled cubin (nvdisasm, which Triton brings along)
or in the assembly for AMD, and divided by the number of entries that a thread handles in one
iteration. That number follows from the bytes that the loop loads, so an unrolled loop counts
correctly. What a row executes once (reductions, candidates) is not in a loop and is left out: with
152,000 columns it is a hundredth.

Programs with a short loop or none, of the kernels for a top-k, count whole: each instruction once,
and those of the loop as often as it runs. The compilers do not unroll these loops; if one did, the
count would double, and the report fail.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from triton import knobs

SASS_LABEL = re.compile(r"(\.L_\w+):")
SASS_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ +)?(\S+)(.*?);")
AMD_BLOCK = re.compile(r"(?:\.L(BB\w+):|; %bb\.)")
AMD_INSTRUCTION = re.compile(r"\t([a-z]\w+)")
AMD_SPECIAL = ("v_exp_", "v_log_", "v_rcp_", "v_rsq_", "v_sqrt_")


class Instruction(NamedTuple):
    name: str

    @property
    def is_special(self) -> bool:
        """Whether a special-function unit runs it: exponentials, logarithms, reciprocals."""
        return self.name.startswith(("MUFU", *AMD_SPECIAL))

    @property
    def loaded_bytes(self) -> int:
        """Bytes that a thread loads from global memory."""
        if self.name.startswith("LDG"):
            bits = re.search(r"\.[US]?(8|16|64|128)(?:\.|$)", self.name)
            return int(bits[1]) // 8 if bits else 4
        if found := re.match(
            r"(?:global|buffer|flat)_load_(?:dword(?:x(\d))?|(u?short|b16))", self.name
        ):
            return 2 if found[2] else 4 * int(found[1] or 1)
        return 0


class Pass(NamedTuple):
    """One loop over the columns of a row, or a whole program."""

    instructions: float
    """per entry"""
    special: float
    """of them in a special-function unit"""


def instructions_of(assembly: str, *, amd: bool) -> list[Instruction]:
    """Returns all instructions up to the last end of the program; padding follows it."""
    pattern, end = (AMD_INSTRUCTION, "s_endpgm") if amd else (SASS_INSTRUCTION, "EXIT")
    found = [pattern.match(line) for line in assembly.splitlines()]
    code = [Instruction(one[1]) for one in found if one]
    ends = [index for index, instruction in enumerate(code) if instruction.name == end]
    return code[: ends[-1] + 1]


def program_pass(assembly: str, iterations: int, entries_per_thread: float, *, amd: bool) -> Pass:
    """Returns the count of a whole program, whose one loop, if it has one, runs `iterations`
    times."""
    loops = amd_loops(assembly) if amd else sass_loops(assembly)
    assert len(loops) == (iterations > 0), (len(loops), iterations)
    code = instructions_of(assembly, amd=amd)
    again = [line for loop in loops for line in loop] * max(0, iterations - 1)
    special = sum(line.is_special for line in (*code, *again))
    counts = len(code) + len(again), special
    return Pass(*(round(count / entries_per_thread, 2) for count in counts))


def disassembled(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def sass_loops(sass: str) -> list[list[Instruction]]:
    """Returns the instructions of each loop, in the order of the code. None contains another."""
    labels: dict[str, int] = {}
    code: list[Instruction] = []
    spans: list[tuple[int, int]] = []
    for line in sass.splitlines():
        if label := SASS_LABEL.match(line):
            labels[label[1]] = len(code)
        elif found := SASS_INSTRUCTION.match(line):
            code.append(Instruction(found[1]))
            target = re.search(r"\.L\w+", found[2])
            # The code ends in a branch to itself, so that nothing runs on past it.
            if target and target[0] in labels and labels[target[0]] < len(code) - 1:
                spans.append((labels[target[0]], len(code)))
    return [code[first:stop] for first, stop in sorted(spans)]


def amd_loops(assembly: str) -> list[list[Instruction]]:
    """Returns the same of assembly for AMD, where a comment at each block names its loop."""
    loops: dict[str, list[Instruction]] = {}
    header = label = ""
    for line in assembly.splitlines():
        if block := AMD_BLOCK.match(line):
            header, label = "", block[1] or ""
        if found := re.search(r"in Loop: Header=(\w+)", line):
            header = found[1]
        elif "This Inner Loop Header" in line:
            header = label
        elif header and (found := AMD_INSTRUCTION.match(line)):
            loops.setdefault(header, []).append(Instruction(found[1]))
    return list(loops.values())


def passes_of(
    assembly: str, names: tuple[str, ...], loaded_bytes: list[int], *, amd: bool
) -> dict[str, Pass]:
    """Returns the named passes of a kernel, whose loops load so many bytes per column."""
    if not names:
        return {}
    loops = amd_loops(assembly) if amd else sass_loops(assembly)
    assert len(loops) == len(names), (len(loops), names)
    found = {}
    for name, loop, per_column in zip(names, loops, loaded_bytes, strict=True):
        columns, left = divmod(sum(line.loaded_bytes for line in loop), per_column)
        assert columns > 0 and left == 0, (name, columns, left)
        special = sum(line.is_special for line in loop)
        found[name] = Pass(round(len(loop) / columns, 2), round(special / columns, 2))
    return found
