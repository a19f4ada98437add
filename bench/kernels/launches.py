"""What the launchers of `paint_kernels` pass to their kernels, recorded without running these."""

import math
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

from torch import Tensor
from triton.compiler import ASTSource
from triton.runtime.jit import mangle_type


class Launch(NamedTuple):
    """A kernel and the arguments that the launcher passed to it."""

    kernel: Any  # a triton.JITFunction, which triton's stubs declare as a plain function
    arguments: tuple[Any, ...]
    settings: dict[str, Any]
    """keyword arguments, and num_warps"""
    grid: tuple[int, ...] = (1,)
    passes: tuple[str, ...] = ()
    """the names of the kernel's passes over a row, in the order of its loops, or one name for a
    whole program; none if they are not counted"""
    num_entries: int = 0
    """of the launch: logits, or entries of rows that are multiplied"""
    num_tokens: int = 1
    iterations: int | None = None
    """of the one loop of a program, or 0 for no loop; None for passes over a row"""

    def entries_per_thread(self, warp_size: int, num_warps: int) -> float:
        return self.num_entries / math.prod(self.grid) / (warp_size * num_warps)

    def source(self) -> ASTSource:
        """Returns the source with the types of a launch; pointers and integers that 16 divides are
        specialised as such."""
        settings = {name: self.settings[name] for name in self.settings if name != "num_warps"}
        names = self.kernel.arg_names
        values = dict(zip(names, self.arguments, strict=False)) | settings
        assert values.keys() == set(names), values.keys() ^ set(names)
        signature, constants, attributes = {}, {}, {}
        for index, (name, parameter) in enumerate(zip(names, self.kernel.params, strict=True)):
            value = values[name]
            if parameter.is_constexpr:
                signature[name], constants[name] = "constexpr", value
                continue
            signature[name] = mangle_type(value)
            if isinstance(value, float):
                continue
            if (value.data_ptr() if isinstance(value, Tensor) else value) % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, constants, attributes)


class Recorder:
    """Stands for a kernel: `Recorder(...)[grid](...)` adds the arguments to `launches`."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def record(*arguments: Any, **settings: Any) -> None:
            self.launches.append(Launch(self.kernel, arguments, settings, grid))

        return record


def recorded(launchers: ModuleType, call: Callable[[], object]) -> Launch:
    """Returns what a function of `launchers` passes to its kernel, without running that."""
    launches: list[Launch] = []
    recorders = {
        name: Recorder(value, launches) if name.endswith("_kernel") else value
        for name, value in vars(launchers.kernels).items()
    }
    with patch.object(launchers, "kernels", SimpleNamespace(**recorders)):
        call()
    (launch,) = launches
    return launch
