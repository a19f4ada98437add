"""Predicts the hours of a run's training and of its evaluations on a named GPU.

A training step takes its operations at a share of the GPU's peak rate. A wave of answers that are
decoded together takes the longer of two times: that of its operations, and that of reading all
weights once a token and every answer's cache. Every completion is as long as its limit, so the
hours of sampling are an upper bound. Nothing here was measured on a GPU.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

import torch

from paint_engine.config.schema import Config
from paint_engine.config.sections import EvalSection, ParallelSection
from paint_engine.data import ProblemSet
from paint_engine.estimate.arithmetic import sampling_flops
from paint_engine.estimate.memory import GIB, cache_row_bytes, evaluation_share, setting_of
from paint_engine.estimate.model_shape import ModelShape
from paint_engine.recipes import recipe_of

FLOPS_SHARE = 0.4
"""share of the peak rate that training and prefill reach; assumed"""
BANDWIDTH_SHARE = 0.7
"""share of the memory's rate that decoding reaches; assumed"""
_HOUR_S = 3600.0


@dataclass(frozen=True)
class Gpu:
    """Rates by the vendor's data sheet: Gpu(989e12, 3.35e12, 80)

    flops_per_s: dense bfloat16 products. bytes_per_s: of the memory. memory_gib: its size.
    """

    flops_per_s: float
    bytes_per_s: float
    memory_gib: float


GPUS: Mapping[str, Gpu] = {
    "a100-40gb": Gpu(312e12, 1.555e12, 40),
    "a100-80gb": Gpu(312e12, 2.039e12, 80),
    "h100": Gpu(989e12, 3.35e12, 80),
    "h200": Gpu(989e12, 4.8e12, 141),
    "l40s": Gpu(362e12, 0.864e12, 48),
    "rtx-4090": Gpu(165e12, 1.008e12, 24),
}
"""by their names in `parallel.gpu`; SXM versions of the A100, H100 and H200"""
_DRIVER_NAMES = {
    "A100-SXM4-40GB": "a100-40gb",
    "A100-SXM4-80GB": "a100-80gb",
    "H100 80GB HBM3": "h100",
    "H200": "h200",
    "L40S": "l40s",
    "RTX 4090": "rtx-4090",
}
"""parts of the names that the driver gives"""


def gpu_name(section: ParallelSection, device: torch.device) -> str | None:
    """Returns the name of the GPU in `GPUS`: the configured one, else this machine's; None where
    neither is known."""
    if section.gpu is not None or device.type != "cuda":
        return section.gpu
    driver = torch.cuda.get_device_name(device)
    return next((name for part, name in _DRIVER_NAMES.items() if driver.endswith(part)), None)


@dataclass(frozen=True)
class Engine:
    """What decodes on one rank, or on the ranks that share an engine.

    num_engines: of the whole run. num_gpus: of each. max_sequences: its limit on answers at once.
    cache_bytes: its memory for caches, over its GPUs; None = it is not bounded by a share.
    """

    num_engines: int
    num_gpus: int
    max_sequences: int
    cache_bytes: float | None

    def num_at_once(self, row_bytes: int) -> int:
        """Number of answers that are decoded at once, each with a cache of `row_bytes`; at least
        1."""
        if self.cache_bytes is None:
            return self.max_sequences
        return max(1, min(self.max_sequences, int(self.cache_bytes // row_bytes)))


def decode_seconds(
    shape: ModelShape, gpu: Gpu, engine: Engine, *, num_answers: int, prompt: float, completion: int
) -> float:
    """Returns the seconds in which the engines decode so many completions of full length, in waves
    as large as the caches allow, with bfloat16 weights and caches."""
    row_bytes = cache_row_bytes(shape, round(prompt) + completion, 2)
    left = -(-num_answers // engine.num_engines)
    size = engine.num_at_once(row_bytes)
    weights_bytes = 2 * (shape.base_parameters + shape.adapter_parameters)
    seconds = 0.0
    while left > 0:
        # All full waves at once.
        rows = min(size, left)
        num_waves = left // rows
        half_bytes = cache_row_bytes(shape, round(prompt) + completion // 2, 2)
        read_bytes = completion * (weights_bytes + rows * half_bytes)
        flops = rows * sampling_flops(shape, prompt, completion)
        wave = max(
            read_bytes / (BANDWIDTH_SHARE * gpu.bytes_per_s * engine.num_gpus),
            flops / (FLOPS_SHARE * gpu.flops_per_s * engine.num_gpus),
        )
        seconds += num_waves * wave
        left -= num_waves * rows
    return seconds


def engine_of(
    config: Config, shape: ModelShape, gpu: Gpu, num_ranks: int, *, evaluates: bool = False
) -> Engine:
    """Returns the engine that samples rollouts, or answers of evaluations."""
    rollout = config.rollout
    setting = setting_of(config, num_ranks, on_gpu=True)
    if not setting.colocated_vllm:
        limit = config.eval.max_sequences if evaluates else rollout.max_sequences
        return Engine(num_ranks, 1, limit, None)
    num_gpus, limit = rollout.tensor_parallel_size, rollout.max_sequences
    memory_bytes = (config.parallel.device_memory_gb or gpu.memory_gib) * GIB * num_gpus
    share, own = rollout.gpu_memory_utilization, evaluation_share(config)
    if evaluates and own is not None:
        share, limit = own, config.eval.max_concurrent or limit
    weights_bytes = 2 * (shape.base_parameters + shape.adapter_parameters)
    cache_bytes = max(0.0, share * memory_bytes - weights_bytes)
    return Engine(max(1, num_ranks // num_gpus), num_gpus, limit, cache_bytes)


@dataclass(frozen=True)
class Evaluations:
    """Evaluations of one protocol: so many of so many answers each, of at most `max_new_tokens`.

    prompt: tokens of the prompts, a mean.
    """

    number: int
    num_answers: int
    max_new_tokens: int
    prompt: float

    @property
    def num_tokens(self) -> int:
        """The most tokens that all of them sample."""
        return self.number * self.num_answers * self.max_new_tokens


def evaluations_of(
    section: EvalSection, num_steps: int, sets: Mapping[str, ProblemSet]
) -> list[Evaluations]:
    """Returns the evaluations during training and, with a protocol of its own, those after it:
    of the base, the last step and, if it is another one, the best."""
    if not sets:
        return []
    prompts = [len(prompt) for held_out in sets.values() for prompt in held_out.prompts]

    def of(number: int, protocol: EvalSection) -> Evaluations:
        num_answers = len(prompts) * protocol.num_samples
        return Evaluations(number, num_answers, protocol.max_new_tokens, mean(prompts))

    steps = [step for step in range(1, num_steps + 1) if section.is_evaluated(step, num_steps)]
    found = [of(section.at_start + len(steps), section)]
    if section.final is not None:
        found.append(of(section.at_start + 1 + (len(steps) > 1), section.final))
    return found


def hours_lines(
    config: Config,
    shape: ModelShape,
    evaluations: Sequence[Evaluations],
    *,
    step_flops: float,
    prompt: float,
    device: torch.device,
    num_ranks: int,
) -> list[str]:
    """Returns the report's lines on the tokens and the hours of training and of evaluations.

    step_flops: operations of a step without its sampling. prompt: tokens of the student's prompts,
        a mean.
    """
    num_steps, completion = config.train.num_steps, config.rollout.max_new_tokens
    num_rollouts = num_steps * config.train.batch_size
    lines = [f"# training: {num_steps:,} steps, at most {num_rollouts * completion:,} tokens"]
    kinds = ("evaluations", "evaluations after training, by the full protocol")
    for kind, one in zip(kinds, evaluations, strict=False):
        lines.append(
            f"# {kind}: {one.number:,} of {one.num_answers:,} answers, at most "
            f"{one.num_tokens:,} tokens"
        )
    name = gpu_name(config.parallel, device)
    if name is None:
        return [*lines, f"# no hours: name a GPU with --parallel.gpu ({', '.join(GPUS)})"]
    found = predicted_seconds(
        *(config, shape, evaluations),
        step_flops=step_flops,
        prompt=prompt,
        gpu=GPUS[name],
        num_ranks=num_ranks,
    )
    served = config.rollout.url is not None
    return [*lines, *_prediction(found, name, num_ranks, served=served)]


@dataclass(frozen=True)
class Seconds:
    """Predicted seconds of a run's steps, and of its evaluations by protocol."""

    training: float
    evaluations: tuple[float, ...]


def predicted_seconds(
    config: Config,
    shape: ModelShape,
    evaluations: Sequence[Evaluations],
    *,
    step_flops: float,
    prompt: float,
    gpu: Gpu,
    num_ranks: int,
) -> Seconds:
    """Returns the seconds on so many GPUs, without what a server samples. Arguments as of
    `hours_lines`."""
    recipe, completion = recipe_of(config), config.rollout.max_new_tokens
    step_s = step_flops / (FLOPS_SHARE * gpu.flops_per_s * num_ranks)
    if config.rollout.url is not None:
        return Seconds(config.train.num_steps * step_s, (0.0,) * len(evaluations))
    if recipe.samples:
        engine, size = engine_of(config, shape, gpu, num_ranks), config.train.batch_size
        step_s += decode_seconds(
            shape, gpu, engine, num_answers=size, prompt=prompt, completion=completion
        )
        if config.teacher.reason_first:
            step_s += decode_seconds(
                *(shape, gpu, engine),
                num_answers=size,
                prompt=prompt,
                completion=config.teacher.reason_max_new_tokens,
            )
    engine = engine_of(config, shape, gpu, num_ranks, evaluates=True)
    sampled = tuple(
        one.number
        * decode_seconds(
            *(shape, gpu, engine),
            num_answers=one.num_answers,
            prompt=one.prompt,
            completion=one.max_new_tokens,
        )
        for one in evaluations
    )
    return Seconds(config.train.num_steps * step_s, sampled)


def _prediction(found: Seconds, name: str, num_ranks: int, *, served: bool) -> list[str]:
    gpu = GPUS[name]
    what = (
        "what the server samples is not counted"
        if served
        else "with every completion as long as its limit"
    )
    parts = [f"training {found.training / _HOUR_S:.2f} h"]
    parts += [
        f"{kind} {seconds / _HOUR_S:.2f} h"
        for kind, seconds in zip(("evaluations", "full protocol"), found.evaluations, strict=False)
    ]
    return [
        f"# prediction for {num_ranks} x {name}, {what}: {', '.join(parts)}",
        f"# (at {FLOPS_SHARE:.0%} of {gpu.flops_per_s / 1e12:,.0f} TFLOP/s and "
        f"{BANDWIDTH_SHARE:.0%} of {gpu.bytes_per_s / 1e12:.2f} TB/s, which are assumptions)",
    ]
