"""What a step computes, and what the GPUs do with it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from bench.step.cases import Lengths, fixed_rollout
from paint_engine.config.schema import Config
from paint_engine.estimate.model_shape import ModelShape
from paint_engine.types import TrainExample

FLOAT_BYTES = 4
"""adapters and their gradients are float32"""


@dataclass(frozen=True, eq=False)
class Workload:
    """A step's rollouts, in the order of the batch, and what is computed for them.

    padded: whether a micro-batch has one row per rollout, all as long as the longest.
    number_bytes: of the frozen weights, and of one number in the sampler's cache.
    """

    config: Config
    shape: ModelShape
    rollouts: tuple[Lengths, ...]
    padded: bool = False
    number_bytes: int = 2

    def __post_init__(self) -> None:
        assert self.config.lora.enabled, "only the traffic of adapters is counted"

    @cached_property
    def examples(self) -> list[TrainExample]:
        """The rollouts as the engine plans micro-batches of them."""
        sizes = [(one.student_prompt, one.teacher_prompt, one.completion) for one in self.rollouts]
        return [fixed_rollout(*((0,) * size for size in three)) for three in sizes]

    @property
    def builtin(self) -> bool:
        """Whether the built-in sampler draws the rollouts."""
        return self.config.rollout.engine == "builtin"

    @property
    def num_tokens(self) -> int:
        """Number of completion tokens."""
        return sum(one.completion for one in self.rollouts)

    @property
    def adapter_bytes(self) -> int:
        return FLOAT_BYTES * self.shape.adapter_parameters

    @property
    def layers_bytes(self) -> int:
        """What FSDP gathers of all layers for one pass."""
        return self.number_bytes * self.shape.layer_parameters + self.adapter_bytes

    @property
    def root_bytes(self) -> int:
        """What FSDP gathers outside the layers: embeddings and head."""
        return self.number_bytes * self.shape.root_parameters


@dataclass(frozen=True)
class Layout:
    """What the GPUs do. Layout(train_gpus=6, shards=6, rollout_gpus=2, ahead=1)

    shards: ranks that share one copy of the weights; 1 = each has its own (`replicate`).
    rollout_gpus: GPUs that sample and do not train; 0 = those that train sample first.
    tensor_parallel: GPUs per engine.
    ahead: 1 = the next batch is sampled while this one trains.
    """

    train_gpus: int
    shards: int = 1
    rollout_gpus: int = 0
    tensor_parallel: int = 1
    ahead: int = 0

    def __post_init__(self) -> None:
        assert self.train_gpus % self.shards == 0, self
        assert self.sampling_gpus % self.tensor_parallel == 0, self

    @property
    def num_gpus(self) -> int:
        return self.train_gpus + self.rollout_gpus

    @property
    def sampling_gpus(self) -> int:
        return self.rollout_gpus or self.train_gpus

    @property
    def num_engines(self) -> int:
        return self.sampling_gpus // self.tensor_parallel


def waiting_s(works: Sequence[float], cores: int | None) -> float:
    """Returns the seconds until all ranks have done their work: those of the longest, or what all
    of it takes on the cores that they share.

    cores: None if each rank has a processor of its own.
    """
    return max(works) if cores is None else max(max(works), sum(works) / cores)
