"""What a processor computes and moves in a second, and what links move between processors.

`gpu_machine` has published and assumed rates; `bench.cluster.calibration` measures a CPU's. The
prediction (`bench.cluster.step`) is the same for both.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from bench.kernels.limits import DEVICES, Device
from paint_engine.estimate.hours import GPUS as PUBLISHED
from paint_engine.estimate.memory import GIB


class Rate(NamedTuple):
    """A part's time: a constant per call, and floating-point operations over a rate."""

    flops_per_s: float
    fixed_s: float = 0.0

    def seconds(self, flops: float, calls: float = 1) -> float:
        return calls * self.fixed_s + flops / self.flops_per_s


class Link(NamedTuple):
    """What one processor sends and receives, each way."""

    bytes_per_s: float
    latency_s: float


@dataclass(frozen=True, eq=False)
class Machine:
    """Processors of one kind, and their links.

    parts: rates of "prefill", "teacher", "student", "loss" and "backward".
    token: operations of one decoding step of a batch, and what such a step takes beside them.
    read_bytes_per_s: from the processor's memory.
    cores: number of processors that all ranks share; None if each rank has its own.
    inside, outside: between processors of one node, and of several.
    overlaps: whether collectives run beside the passes.
    host_bytes_per_s: of writing the adapter for the sampler, and of reading it.
    other_s: a step's work beside the parts; `rollout_s`: that of each rollout, with its reward.
    exchanges_s: exchanges of objects between several ranks, if they are not in `other_s`.
    """

    name: str
    parts: Mapping[str, Rate]
    token: Rate
    read_bytes_per_s: float
    inside: Link
    outside: Link
    per_node: int
    optimizer: Rate
    host_bytes_per_s: float
    other_s: float
    rollout_s: float
    exchanges_s: float = 0.0
    cores: int | None = None
    overlaps: bool = True

    def gather_s(self, size: float, group: int, calls: int = 1, *, per_node: int = 0) -> float:
        """Returns the seconds of an all-gather, or of a reduce-scatter, of `size` bytes in whole.

        group: number of ranks that each have one part. calls: number of collectives that divide the
        bytes. per_node: members of the group in one node; 0 = as many as fit.
        """
        if group == 1:
            return 0.0
        local = min(group, per_node or self.per_node)
        nodes = math.ceil(group / local)
        inside = size * (group - 1) / group / self.inside.bytes_per_s
        # What the other nodes hold comes over the network once, by all of the node's adapters.
        across = size * (nodes - 1) / nodes / (local * self.outside.bytes_per_s)
        link = self.inside if nodes == 1 else self.outside
        return max(inside, across) + calls * link.latency_s

    def reduce_s(self, size: float, group: int, calls: int = 1, *, per_node: int = 0) -> float:
        """Returns the seconds of an all-reduce: a reduce-scatter and an all-gather."""
        both = self.gather_s(size, group, per_node=per_node, calls=0) * 2
        return both + calls * self.gather_s(0, group, per_node=per_node)


SHARE, BYTES = "", "B"
"""units of a constant without one, and of a memory's size"""


class Constant(NamedTuple):
    """A number of the prediction, and where it is from; assumed = nobody has measured it here."""

    value: float
    unit: str
    source: str
    assumed: bool = False

    @property
    def is_assumed_time(self) -> bool:
        """Whether it is assumed, and no memory's size."""
        return self.assumed and self.unit != BYTES


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU: published figures, and the rates of `bench.floor`."""

    device: Device
    peak_flops_per_s: float
    peak_bytes_per_s: float
    memory_bytes: int


GPUS = {
    name: Gpu(device, PUBLISHED[name].flops_per_s, PUBLISHED[name].bytes_per_s, size * GIB)
    for name, device, size in zip(("h100", "h200"), DEVICES, (79, 139), strict=True)
}
_DATASHEET = "NVIDIA's data sheet, SXM"
SHARED = {
    "NVLink": Constant(450e9, "B/s each way", _DATASHEET),
    "GPUs in a node": Constant(8, SHARE, "HGX boards"),
    "network of a GPU": Constant(50e9, "B/s each way", "one adapter of 400 Gbit/s per GPU"),
    "passes, of the peak": Constant(
        0.40, SHARE, "38% to 43% in training on H100s (Llama 3, arXiv 2407.21783, Table 4)", True
    ),
    "links, of their peak": Constant(0.8, SHARE, "collectives of large tensors", True),
    "latency in a node": Constant(10e-6, "s", "a small all-reduce over NVLink", True),
    "latency over nodes": Constant(30e-6, "s", "a small collective over the network", True),
    "a decoding step beside the GPU's work": Constant(
        2e-3, "s", "scheduling, sampling, the adapters' small kernels", True
    ),
    "adapter's files": Constant(2e9, "B/s", "writing to shared memory; reading alike", True),
    "reward of a rollout": Constant(5e-3, "s", "with its prompts and anchors, in its rank", True),
    "a step beside its parts": Constant(50e-3, "s", "exchanges of objects, metrics", True),
    "vLLM beside weights and cache": Constant(2e9, BYTES, "activations, CUDA graphs", True),
}


def constants(gpu: Gpu) -> dict[str, Constant]:
    """Returns every constant of a prediction for this GPU, by its name."""
    device = gpu.device
    return {
        "matrix products, peak": Constant(gpu.peak_flops_per_s, "FLOP/s, bf16 dense", _DATASHEET),
        "matrix products, large": Constant(
            device.flops_per_s, "FLOP/s", "TRL, issue 7244; in the loss and in decoding"
        ),
        "memory, peak": Constant(gpu.peak_bytes_per_s, "B/s", _DATASHEET),
        "memory, attained": Constant(
            device.bytes_per_s, "B/s", "`bench.kernels.limits`: a large copy", True
        ),
        "memory of a GPU": Constant(
            gpu.memory_bytes, BYTES, "total memory that PyTorch reports, in whole GiB"
        ),
        **SHARED,
    }


def gpu_machine(gpu: Gpu, loss: Rate, changes: Mapping[str, float] | None = None) -> Machine:
    """Returns the machine of a kind of GPU.

    loss: the rate of the loss, as `bench.floor` counts it.
    changes: other values of constants, by name.
    """
    values = {name: one.value for name, one in constants(gpu).items()}
    values |= changes or {}
    passes = Rate(values["passes, of the peak"] * values["matrix products, peak"])
    products = values["matrix products, large"]
    attained = values["links, of their peak"]
    return Machine(
        name=gpu.device.name,
        parts=dict.fromkeys(("prefill", "teacher", "student", "backward"), passes) | {"loss": loss},
        token=Rate(products, values["a decoding step beside the GPU's work"]),
        read_bytes_per_s=values["memory, attained"],
        inside=Link(attained * values["NVLink"], values["latency in a node"]),
        outside=Link(attained * values["network of a GPU"], values["latency over nodes"]),
        per_node=round(values["GPUs in a node"]),
        # AdamW's bytes: weight, gradient and both moments are read, all but the gradient written.
        optimizer=Rate(values["memory, attained"] / (7 * 4)),
        host_bytes_per_s=values["adapter's files"],
        other_s=values["a step beside its parts"],
        rollout_s=values["reward of a rollout"],
    )
