"""Compiles every Triton kernel for an NVIDIA H100 (sm_90) without one; prints what went wrong.

test_triton_backend.py runs this file in a process of its own, where no interpreter is set.
"""

import re
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from paint_kernels import _triton_backend
from paint_kernels import _triton_kernels as kernels

TYPES = {
    "row_stride": "i32",
    "num_columns": "i32",
    "largest_ptr": "*i32",
    "interpolated_ptr": "*i8",
    "token_ids_ptr": "*i64",
}
CONSTANTS = {
    "INVERSE_TEMPERATURE": 1 / 1.1,
    "CLIP": 0.06,
    "HAS_CLIP": True,
    "WEIGHT": 0.03,
    "BLOCK": _triton_backend.MAX_BLOCK,
}
KERNELS = (
    kernels.stats_kernel,
    kernels.interpolate_kernel,
    kernels.loss_kernel,
    kernels.gradient_kernel,
    kernels.logprobs_gradient_kernel,
)


def problems(kernel: triton.JITFunction) -> list[str]:
    signature = {
        name: "constexpr" if name in CONSTANTS else TYPES.get(name, "*fp32")
        for name in kernel.arg_names
    }
    constants = {name: CONSTANTS[name] for name in kernel.arg_names if name in CONSTANTS}
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": _triton_backend.NUM_WARPS},
    )
    ptx = compiled.asm["ptx"]
    found = []
    if ".f64" in ptx:
        found.append("float64 arithmetic")
    if "mul.wide" not in ptx and "mul.lo.s64" not in ptx:
        found.append("no 64-bit row offset")
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source:
        source.write(ptx)
        source.flush()
        report = subprocess.run(
            [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", source.name, "-o", "/dev/null"],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    spilled = re.findall(r"(\d+) bytes spill", report)
    assert spilled, report
    if any(int(count) for count in spilled):
        found.append("registers spilled")
    registers = re.findall(r"Used (\d+) registers", report)
    print(kernel.__name__, "registers:", *registers)
    return found


if __name__ == "__main__":
    wrong = {kernel.__name__: found for kernel in KERNELS if (found := problems(kernel))}
    print(wrong or "all kernels compile")
    sys.exit(bool(wrong))
