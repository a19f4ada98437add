"""The variants of every Triton kernel that are launched, and the bytes that each moves.

    TRITON_INTERPRET=1 python -m bench.kernels.traffic    # the counts, as JSON

The kernels run in Triton's interpreter, and the unmasked lanes of their loads and stores are
counted. These are the bytes that the instructions request, including those served by a cache.
"""

import contextlib
import itertools
import json
from collections import deque
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from bench.kernels.head_variants import head_launches
from bench.kernels.launches import Launch
from bench.kernels.shard_variants import shard_launches
from bench.kernels.topk_variants import topk_launches
from bench.losses import QWEN3_VOCAB_SIZE
from paint_kernels import LossSettings
from paint_kernels import _triton_backend as backend
from paint_kernels import _triton_kernels as kernels
from paint_kernels._torch_divergences import DIVERGENCES

KERNELS = tuple(name for name in vars(kernels) if name.endswith("_kernel"))
COUNTED_SHAPE = (1, 32768)
"""(R, V): one row of sixteen tiles"""


class Variant(NamedTuple):
    """One specialisation of a kernel."""

    kernel: str
    logits: torch.dtype = torch.float32
    gradient: torch.dtype | None = torch.float16
    divergence: str = "forward_kl"
    clip: float | None = 0.06
    interpolates: bool = True
    ragged: bool = False
    """an odd number of columns, so that no row after the first is aligned"""

    @property
    def name(self) -> str:
        short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
        parts = [f"{short[self.logits]} logits"]
        if self.kernel == "loss_kernel":
            parts.insert(0, self.divergence)
            parts += [] if self.clip is not None else ["no clip"]
            parts += [] if self.interpolates else ["no interpolation"]
        if self.kernel != "stats_kernel":
            parts.append(f"{short[self.gradient]} gradient" if self.gradient else "no gradient")
        return ", ".join(parts + ["ragged"] * self.ragged)

    @property
    def settings(self) -> LossSettings:
        return LossSettings(
            temperature=1.1,
            divergence=self.divergence,
            jsd_weight=0.5,
            pointwise_clip=self.clip,
            top_fraction=0.03,
            interpolation_weight=0.03,
            teacher_top_k=None,
            entropy_floor=1e-6,
            backend="triton",
        )

    def shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        return shape[0], shape[1] - self.ragged


STATS = Variant("stats_kernel", gradient=None)
LOSS = Variant("loss_kernel")
LOGPROBS = Variant("logprobs_gradient_kernel")
VARIANTS = (
    STATS,
    STATS._replace(logits=torch.bfloat16),
    STATS._replace(ragged=True),
    LOSS,
    LOSS._replace(clip=None),
    LOSS._replace(interpolates=False),
    LOSS._replace(gradient=None),
    LOSS._replace(logits=torch.bfloat16, gradient=torch.bfloat16),
    LOSS._replace(ragged=True),
    LOSS._replace(divergence="reverse_kl"),
    LOSS._replace(divergence="jsd"),
    LOGPROBS,
    LOGPROBS._replace(ragged=True),
)
"""the variants that most runs use"""


def every_variant() -> list[Variant]:
    """Returns all combinations of dtypes, settings and alignment that the launcher supports."""
    full, half = torch.float32, torch.bfloat16
    pairs = [(full, None), (full, torch.float16), (full, full), (half, None), (half, half)]
    found = [
        STATS._replace(logits=logits, ragged=ragged)
        for logits, ragged in itertools.product((full, half), (False, True))
    ]
    for (logits, gradient), ragged in itertools.product(pairs, (False, True)):
        dtypes = {"logits": logits, "gradient": gradient, "ragged": ragged}
        found += [
            LOSS._replace(**dtypes, divergence=divergence, clip=clip, interpolates=interpolates)
            for divergence, clip, interpolates in itertools.product(
                DIVERGENCES, (LOSS.clip, None), (True, False)
            )
        ]
        found += [LOGPROBS._replace(**dtypes)] if gradient else []
    return found


class Row(NamedTuple):
    """The branches that a row of logits takes in the loss kernel."""

    clipped: bool
    interpolated: bool
    missed: bool = False
    """a clipped entry that is not among the candidates, so that the row is read once more"""

    @property
    def name(self) -> str:
        marks = [name for name, mark in self._asdict().items() if mark]
        return " and ".join(marks) or "plain"


def rows_of(variant: Variant) -> list[Row]:
    if variant.kernel != "loss_kernel":
        return [Row(False, False)]
    predicts = variant.divergence == "forward_kl" and variant.gradient is not None
    clips = [(False, False), (True, False), (True, True)][: 1 if variant.clip is None else 3]
    return [
        Row(clipped, interpolated, missed)
        for clipped, missed in clips
        for interpolated in (False, True)[: 1 + variant.interpolates]
        if predicts or not missed
    ]


def call_launcher(variant: Variant, shape: tuple[int, int], row: Row) -> Tensor | None:
    """Calls the launcher with random rows of one kind; returns the loss's clipped mass, if any."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(shape, generator=generator)
    teacher = student + 0.01 * torch.randn(shape, generator=generator)
    if row.clipped:  # f is large where the KL's first argument has mass that the other lacks
        first = teacher if variant.divergence == "forward_kl" else student
        first[:, 7] += 20.0
        if row.missed:  # of the same group, whose largest entry alone is a candidate
            first[:, 7 + backend.GROUPS] += 19.0
    student, teacher = student.to(variant.logits), teacher.to(variant.logits)
    gradient = None if variant.gradient is None else torch.empty(shape, dtype=variant.gradient)
    temperature = variant.settings.temperature
    scale = 256.0 if variant.gradient == torch.float16 else 1.0
    if variant.kernel == "stats_kernel":
        backend.stats_of_roles(student, temperature)
        return None
    if variant.kernel == "logprobs_gradient_kernel":
        token_ids = torch.zeros(len(student), dtype=torch.int64)
        backend.row_logprobs(student, token_ids, temperature, gradient, gradient_scale=scale)
        return None
    marks = torch.full((len(student),), row.interpolated) if variant.interpolates else None
    values = backend.row_loss(
        student, teacher, marks, variant.settings, gradient, gradient_scale=scale
    )
    return values.clipped_mass


@contextlib.contextmanager
def replaced_kernels(replace: Any) -> Iterator[None]:
    """Makes the launcher use `replace(kernel)` instead of each kernel."""
    found = SimpleNamespace(**{name: replace(getattr(kernels, name)) for name in KERNELS})
    with patch.object(backend, "kernels", found):
        yield


class Traffic:
    """Counts the bytes that a kernel loads and stores."""

    def __init__(self) -> None:
        self.loaded_bytes, self.stored_bytes = 0, 0
        # The compiler merges loads of the same addresses within a loop body. The kernels load two
        # tiles there, so a load equal to one of the last two, with no store since, is merged.
        self.recent: deque[np.ndarray] = deque(maxlen=2)

    def load(self, pointers: Any, mask: Any) -> None:
        addresses = pointers.data[mask.data]
        if not any(np.array_equal(addresses, seen) for seen in self.recent):
            self.loaded_bytes += addresses.size * element_bytes(pointers)
            self.recent.append(addresses)

    def store(self, pointers: Any, mask: Any) -> None:
        self.stored_bytes += pointers.data[mask.data].size * element_bytes(pointers)
        self.recent.clear()


def element_bytes(pointers: Any) -> int:
    return pointers.get_element_ty().primitive_bitwidth // 8


@contextlib.contextmanager
def counted_accesses(traffic: Traffic) -> Iterator[None]:
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counted_load(self: Any, ptrs: Any, mask: Any, *arguments: Any, **options: Any) -> Any:
        traffic.load(ptrs, mask)
        return load(self, ptrs, mask, *arguments, **options)

    def counted_store(self: Any, ptrs: Any, value: Any, mask: Any, *arguments: Any) -> Any:
        traffic.store(ptrs, mask)
        return store(self, ptrs, value, mask, *arguments)

    with (
        # -inf - -inf is silent on a GPU, too; the kernels replace it.
        np.errstate(invalid="ignore", over="ignore"),
        patch.object(InterpreterBuilder, "create_masked_load", counted_load),
        patch.object(InterpreterBuilder, "create_masked_store", counted_store),
    ):
        yield


def traffic_of(variant: Variant, row: Row) -> Traffic:
    """Returns the traffic of the variant's kernel for one row."""
    found: dict[str, Traffic] = {}

    def counting(kernel: Any) -> dict[Any, Any]:
        def run(*arguments: Any, **settings: Any) -> None:
            found[kernel.__name__] = Traffic()
            with counted_accesses(found[kernel.__name__]):
                kernel[(1,)](*arguments, **settings)

        return {(1, 1): run}

    with replaced_kernels(counting):
        clipped_mass = call_launcher(variant, variant.shape(COUNTED_SHAPE), row)
    assert clipped_mass is None or (clipped_mass > 0).item() is row.clipped
    return found[variant.kernel]


def traffic_of_launch(launch: Launch) -> Traffic:
    traffic = Traffic()
    with counted_accesses(traffic):
        launch.kernel[launch.grid](*launch.arguments, **launch.settings)
    return traffic


def figures(
    kernel: str,
    variant: str,
    row: str,
    traffic: Traffic,
    num_entries: int,
    per_token: int = QWEN3_VOCAB_SIZE,
) -> dict[str, Any]:
    return {
        "kernel": kernel,
        "variant": variant,
        "row": row,
        "entries_per_token": per_token,
        "loaded_bytes_per_entry": round(traffic.loaded_bytes / num_entries, 1),
        "stored_bytes_per_entry": round(traffic.stored_bytes / num_entries, 1),
    }


def main() -> None:
    counts = []
    for variant in VARIANTS:
        for row in rows_of(variant):
            num_columns = variant.shape(COUNTED_SHAPE)[1]
            traffic = traffic_of(variant, row)
            counts.append(figures(variant.kernel, variant.name, row.name, traffic, num_columns))
    plain = Row(False, False).name
    for name, launch in (*shard_launches(COUNTED_SHAPE), *head_launches(COUNTED_SHAPE)):
        traffic = traffic_of_launch(launch)
        counts.append(figures(launch.kernel.__name__, name, plain, traffic, launch.num_entries))
    for name, launch in topk_launches():
        traffic, per_token = traffic_of_launch(launch), launch.num_entries // launch.num_tokens
        given = launch.kernel.__name__, name, plain, traffic, launch.num_entries, per_token
        counts.append(figures(*given))
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
