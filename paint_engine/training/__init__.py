"""Training: building a run, the loop of steps with its evaluations and checkpoints, micro-batches,
the optimizer step, interruption, and the summary."""

from paint_engine.training.build import build_run, plan_run
from paint_engine.training.interrupt import StopRequest
from paint_engine.training.loop import run_training

__all__ = [
    "StopRequest",
    "build_run",
    "plan_run",
    "run_training",
]
