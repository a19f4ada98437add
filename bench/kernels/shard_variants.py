"""The launches of the kernels for one rank's columns, recorded without running them."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.kernels.launches import Launch, recorded
from paint_kernels import LossSettings
from paint_kernels import _triton_shards as launchers
from paint_kernels._torch_divergences import DIVERGENCES
from paint_kernels._types import ShardStats

FULL, HALF = torch.float32, torch.float16
KERNELS = tuple(name for name in vars(launchers.kernels) if name.endswith("_kernel"))

Shape = tuple[int, int]


def statistics(shape: Shape) -> ShardStats:
    values = torch.zeros(3, shape[0])
    largest = torch.zeros(shape[0], dtype=torch.int64)
    return ShardStats(values[0], values[1].double(), values[2], largest)


def settings(divergence: str, clip: float | None) -> LossSettings:
    return LossSettings(divergence=divergence, pointwise_clip=clip, temperature=1.1)


def pair(shape: Shape) -> tuple[Tensor, Tensor, ShardStats, ShardStats]:
    return torch.zeros(shape), torch.zeros(shape), statistics(shape), statistics(shape)


def sums(shape: Shape, divergence: str, clip: float | None) -> None:
    launchers.local_sums(*pair(shape), settings(divergence, clip))


def gradient(shape: Shape, divergence: str, clip: float | None, dtype: torch.dtype) -> None:
    slope_sum, own = torch.zeros(2, shape[0])
    out = torch.zeros(shape, dtype=dtype)
    launchers.fill_gradient(
        *pair(shape), settings(divergence, clip), slope_sum, own, out, gradient_scale=256.0
    )


def logprobs(shape: Shape, dtype: torch.dtype) -> None:
    rows = torch.zeros(shape[0], dtype=torch.int64)
    out, own = torch.zeros(shape, dtype=dtype), torch.zeros(shape[0])
    given = torch.zeros(shape), statistics(shape), rows, own
    launchers.fill_logprobs_gradient(*given, 1.1, out, 256.0)


def calls(shape: Shape) -> Iterator[tuple[str, Callable[[], None]]]:
    ragged = shape[0], shape[1] - 1
    for name in DIVERGENCES:
        yield f"{name}, sums", lambda name=name: sums(shape, name, 0.06)
        yield f"{name}, fp16 gradient", lambda name=name: gradient(shape, name, 0.06, HALF)
    yield "forward_kl, no clip, sums", lambda: sums(shape, "forward_kl", None)
    no_clip = "forward_kl, no clip, fp32 gradient"
    yield no_clip, lambda: gradient(shape, "forward_kl", None, FULL)
    yield "forward_kl, sums, ragged", lambda: sums(ragged, "forward_kl", 0.06)
    in_half = "forward_kl, fp16 gradient, ragged"
    yield in_half, lambda: gradient(ragged, "forward_kl", 0.06, HALF)
    yield "fp16 gradient", lambda: logprobs(shape, HALF)
    yield "fp16 gradient, ragged", lambda: logprobs(ragged, HALF)


def shard_launches(shape: Shape) -> Iterator[tuple[str, Launch]]:
    """Yields the name of every variant and what the launcher passes to its kernel, for (R, V)
    logits."""
    for name, call in calls(shape):
        launch = recorded(launchers, call)
        yield (
            name,
            launch._replace(
                passes=("sums" if "sums" in name else "gradient",),
                num_entries=shape[0] * launch.settings["num_columns"],
                num_tokens=shape[0],
            ),
        )
