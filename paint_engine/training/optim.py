"""The optimizer and the schedule of its learning rate."""

import math

import torch
from torch import nn

from paint_engine.config.sections import OptimSection


def learning_rate(section: OptimSection, step: int, num_steps: int) -> float:
    """Returns the learning rate of a step (from 0): linear warm-up, then the schedule, which ends
    at zero unless it is constant."""
    if step < section.warmup_steps:
        return section.learning_rate * (step + 1) / section.warmup_steps
    done = (step - section.warmup_steps) / max(1, num_steps - section.warmup_steps)
    if section.schedule == "linear":
        return section.learning_rate * (1 - done)
    if section.schedule == "cosine":
        return section.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    return section.learning_rate


def build_optimizer(model: nn.Module, section: OptimSection) -> torch.optim.Optimizer:
    """Builds AdamW over all trainable parameters."""
    return torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=section.learning_rate,
        betas=(section.beta1, section.beta2),
        eps=section.eps,
        weight_decay=section.weight_decay,
    )
