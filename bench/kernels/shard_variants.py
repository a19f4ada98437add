"""The launches of the kernels for one rank's columns, recorded without running them."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.kernels.compiled import COMPILED_SHAPE, Launch, recorded
from paint_kernels import LossSettings
from paint_kernels import _triton_shards as launchers
from paint_kernels._torch_divergences import DIVERGENCES
from paint_kernels._types import ShardStats

NUM_ROWS, VOCAB_SIZE = COMPILED_SHAPE
FULL, HALF = torch.float32, torch.float16
KERNELS = tuple(name for name in vars(launchers.kernels) if name.endswith("_kernel"))


def statistics() -> ShardStats:
    values = torch.zeros(3, NUM_ROWS)
    largest = torch.zeros(NUM_ROWS, dtype=torch.int64)
    return ShardStats(values[0], values[1].double(), values[2], largest)


def logits(dtype: torch.dtype = FULL) -> Tensor:
    return torch.zeros(COMPILED_SHAPE, dtype=dtype)


def settings(divergence: str, clip: float | None) -> LossSettings:
    return LossSettings(divergence=divergence, pointwise_clip=clip, temperature=1.1)


def sums(divergence: str, clip: float | None) -> None:
    given = logits(), logits(), statistics(), statistics()
    launchers.local_sums(*given, settings(divergence, clip))


def gradient(divergence: str, clip: float | None, dtype: torch.dtype) -> None:
    given = logits(), logits(), statistics(), statistics(), settings(divergence, clip)
    vectors = torch.zeros(NUM_ROWS), torch.zeros(NUM_ROWS)
    launchers.fill_gradient(*given, *vectors, logits(dtype), 256.0)


def logprobs(dtype: torch.dtype) -> None:
    rows = torch.zeros(NUM_ROWS, dtype=torch.int64)
    own = torch.zeros(NUM_ROWS)
    launchers.fill_logprobs_gradient(logits(), statistics(), rows, own, 1.1, logits(dtype), 256.0)


def calls() -> Iterator[tuple[str, Callable[[], None]]]:
    for divergence in DIVERGENCES:
        yield f"{divergence}, sums", lambda name=divergence: sums(name, 0.06)
        yield f"{divergence}, fp16 gradient", lambda name=divergence: gradient(name, 0.06, HALF)
    yield "forward_kl, no clip, sums", lambda: sums("forward_kl", None)
    yield "forward_kl, no clip, fp32 gradient", lambda: gradient("forward_kl", None, FULL)
    yield "fp16 gradient", lambda: logprobs(HALF)


def shard_launches() -> Iterator[tuple[str, Launch]]:
    """Yields the name of every variant and what the launcher passes to its kernel."""
    for name, call in calls():
        yield name, recorded(launchers, call)
