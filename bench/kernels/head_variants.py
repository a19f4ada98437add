"""The launches of the kernels for heads that do more than a product, recorded without running
them."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from bench.kernels.launches import Launch, recorded
from paint_kernels import _triton_heads as launchers

KERNELS = tuple(name for name in vars(launchers.kernels) if name.endswith("_kernel"))
SOFTCAP = 30.0

Shape = tuple[int, int]


def logits(shape: Shape, *, bias: bool, cap: bool, temperatures: bool) -> None:
    launchers.logits_from_product(
        torch.zeros(shape),
        torch.zeros(shape[1], dtype=torch.bfloat16) if bias else None,
        0.5,
        SOFTCAP if cap else None,
        torch.ones(shape[0]) if temperatures else None,
    )


def gradient(shape: Shape, dtype: torch.dtype, *, temperatures: bool) -> None:
    gradients, own = torch.zeros(shape, dtype=dtype), torch.ones(shape[0])
    launchers.gradient_through_cap(
        gradients, torch.zeros(shape), SOFTCAP, own if temperatures else None
    )


def calls(shape: Shape) -> dict[str, Callable[[], None]]:
    ragged = shape[0], shape[1] - 1
    everything = {"bias": True, "cap": True, "temperatures": True}
    cap = dict.fromkeys(everything, False) | {"cap": True}
    scale = cap | {"cap": False}
    in_half = partial(gradient, dtype=torch.float16)
    return {
        "scale": partial(logits, shape, **scale),
        "scale, cap": partial(logits, shape, **cap),
        "scale, cap, ragged": partial(logits, ragged, **cap),
        "bf16 bias, scale, cap, temperatures": partial(logits, shape, **everything),
        "cap, fp16 gradient": partial(in_half, shape, temperatures=False),
        "cap, fp16 gradient, ragged": partial(in_half, ragged, temperatures=False),
        "cap, temperatures, fp16 gradient": partial(in_half, shape, temperatures=True),
        "cap, fp32 gradient": partial(gradient, shape, torch.float32, temperatures=False),
    }


def head_launches(shape: Shape) -> Iterator[tuple[str, Launch]]:
    """Yields the name of every variant and what the launcher passes to its kernel, for (R, V)
    logits. Programs have no loop: all of their instructions count."""
    for name, call in calls(shape).items():
        launch = recorded(launchers, call)
        yield (
            name,
            launch._replace(
                passes=("elementwise",),
                num_entries=shape[0] * launch.settings["num_columns"],
                num_tokens=shape[0],
                iterations=0,
            ),
        )
