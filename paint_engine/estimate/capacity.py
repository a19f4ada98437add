"""Checks whether a run fits into a GPU, and finds the setting to change if it does not."""

from collections.abc import Iterator, Sequence

import torch

from paint_engine.config.schema import Config
from paint_engine.config.sections import ParallelSection
from paint_engine.estimate.memory import (
    GIB,
    Lengths,
    MemoryEstimate,
    estimate_memory,
    evaluation_share,
)
from paint_engine.estimate.model_shape import ModelShape

_TOKEN_STEP = 256
_MAX_VALUES = 256
"""values tried of one setting; each takes an estimate of the memory"""
_LEAST_UTILIZATION = 0.1
"""the smallest share of a GPU for vLLM; less holds no useful cache"""


def device_memory_bytes(section: ParallelSection, device: torch.device) -> int | None:
    """Returns the memory of one GPU: the configured value, else this machine's. Returns None on a
    CPU."""
    if section.device_memory_gb is not None:
        return round(section.device_memory_gb * GIB)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return None


def _changed(config: Config, settings: dict[str, object]) -> Config:
    for key, value in settings.items():
        name, _, field = key.partition(".")
        section = getattr(config, name).model_copy(update={field: value})
        config = config.model_copy(update={name: section})
    return config


def _alternatives(config: Config, lengths: Lengths) -> Iterator[list[tuple[str, object]]]:
    """Yields, for each setting that saves memory, its values from the mildest to the strongest."""
    longest, tokens = lengths.student_prompt + lengths.completion, "train.max_tokens_per_microbatch"
    most = config.train.max_tokens_per_microbatch
    least = -(-longest // _TOKEN_STEP) * _TOKEN_STEP
    start = (most - 1) // _TOKEN_STEP * _TOKEN_STEP
    stride = -(-max(start - least, 1) // (_MAX_VALUES * _TOKEN_STEP)) * _TOKEN_STEP
    yield [(tokens, value) for value in (*range(start, least, -stride), least) if value <= start]
    if not config.parallel.activation_checkpointing:
        yield [("parallel.activation_checkpointing", True)]
    if config.parallel.shard != "full":
        yield [("parallel.shard", "full")]
    if config.parallel.replicas > 1:
        yield [("parallel.replicas", 1)]
    for name, share in (
        ("eval", evaluation_share(config)),
        ("rollout", config.rollout.gpu_memory_utilization),
    ):
        percent = round(100 * (share or 0))
        shares = range(percent // 5 * 5, round(100 * _LEAST_UTILIZATION) - 1, -5)
        yield [(f"{name}.gpu_memory_utilization", p / 100) for p in shares if p < percent]
    for section in (config.rollout, config.eval):
        name = "rollout" if section is config.rollout else "eval"
        powers = range(1, section.max_sequences.bit_length())
        yield [(f"{name}.max_sequences", section.max_sequences >> power) for power in powers]


def _candidates(config: Config, lengths: Lengths) -> Iterator[dict[str, object]]:
    """Yields configuration changes to try: each value of each setting alone, then the strongest
    values of the first setting, the first two, the first three and so on, together."""
    alternatives = [values for values in _alternatives(config, lengths) if values]
    for values in alternatives:
        yield from ({key: value} for key, value in values)
    together: dict[str, object] = {}
    for values in alternatives:
        key, strongest = values[-1]
        together = together | {key: strongest}
        yield together


def check_fits(
    shape: ModelShape,
    *,
    config: Config,
    lengths: Lengths,
    num_ranks: int,
    device_memory_bytes: int | None,
    teachers: Sequence[ModelShape] = (),
) -> MemoryEstimate:
    """Returns the memory estimate for rollouts up to `lengths`.

    device_memory_bytes: memory of one GPU; None on a CPU, where nothing is refused.
    teachers: the shapes of those that are other models.

    Raises ValueError if the run needs more than the GPU has. The message gives the amount, the
    phase, and the first setting that makes the run fit by the same estimate.
    """

    def estimate(changed: Config) -> MemoryEstimate:
        return estimate_memory(
            shape,
            config=changed,
            lengths=lengths,
            num_ranks=num_ranks,
            device_memory_bytes=device_memory_bytes,
            teachers=teachers,
        )

    needed = estimate(config)
    if device_memory_bytes is None or needed.total_bytes <= device_memory_bytes:
        return needed
    remedy = "no setting or combination of settings makes it fit; use more GPUs, larger GPUs, or a "
    remedy += "smaller model"
    for settings in _candidates(config, lengths):
        changed = estimate(_changed(config, settings))
        if changed.total_bytes <= device_memory_bytes:
            options = " ".join(f"--{key} {str(value).lower()}" for key, value in settings.items())
            remedy = f"set {options} (then {changed.total_bytes / GIB:.1f} GiB)"
            break
    raise ValueError(
        f"this run needs {needed.total_bytes / GIB:.1f} GiB of each GPU at its peak "
        f"({needed.peak_phase}), but a GPU has {device_memory_bytes / GIB:.1f} GiB; {remedy}"
    )
