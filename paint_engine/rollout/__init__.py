"""Sampling: the engine protocol, the built-in sampler and vLLM (in the process, in its own process,
or as a server), and the weights handed to vLLM."""

from paint_engine.rollout.choose import make_engines, server_notes, vllm_is_installed
from paint_engine.rollout.engine import (
    Completion,
    EngineDied,
    RolloutEngine,
    SamplingParams,
    sampling_params,
    stop_notes,
)
from paint_engine.rollout.sampler import Sampled, Sampler, check_completion, to_rollout

__all__ = [
    "Completion",
    "EngineDied",
    "RolloutEngine",
    "Sampled",
    "Sampler",
    "SamplingParams",
    "check_completion",
    "make_engines",
    "sampling_params",
    "server_notes",
    "stop_notes",
    "to_rollout",
    "vllm_is_installed",
]
