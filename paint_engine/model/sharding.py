"""FSDP2: weights split over the ranks, gathered and put together again."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from paint_engine.distributed import World
from paint_engine.model.forward import _BACKBONE, _backbone_states, causal_lm, compute_dtype


def checkpoint_activations(model: nn.Module) -> None:
    """Recomputes each decoder layer in the backward pass, in place of keeping what it computed."""
    inner = causal_lm(model)
    # Renamed in transformers 5.20; both take the settings of torch.utils.checkpoint first.
    enable = getattr(inner, "activation_checkpointing_enable", None)
    (enable or inner.gradient_checkpointing_enable)({"use_reentrant": False})


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The blocks that sharding treats as units, in order."""
    inner = causal_lm(model)
    names = set(inner._no_split_modules or ())
    return [module for module in inner.modules() if type(module).__name__ in names]


def shard_model(model: nn.Module, world: World) -> None:
    """Splits the weights over all ranks (FSDP2), decoder layer by decoder layer, the rest as one.

    Gradients are added up over the ranks and not averaged, for the losses are divided by the whole
    step's rollouts or tokens. Where float32 weights are trained in bfloat16 arithmetic, they are
    gathered in bfloat16 and their gradients summed in float32.
    """
    inner = causal_lm(model)
    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy()
    if not isinstance(model, PeftModel) and inner.dtype != compute_dtype(model):
        policy = MixedPrecisionPolicy(compute_dtype(model), torch.float32)
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    fully_shard(inner, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
    setattr(inner, _BACKBONE, MethodType(_backbone_states, inner))
    register_fsdp_forward_method(inner, _BACKBONE)
    for module in _sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        # gloo has no operator that scales while it adds, which the factor would ask for.
        module.set_force_sum_reduction_for_comms(True)


def _sharded_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def sync_gradients(model: nn.Module, *, last: bool) -> None:
    """Whether the backward pass that comes adds up the ranks' gradients of a sharded model.

    Adapters' gradients are small: they are added up once, after the step's last micro-batch. Those
    of a whole model are not, and each micro-batch's are split over the ranks at once.
    """
    inner = causal_lm(model)
    if isinstance(inner, FSDPModule) and isinstance(model, PeftModel):
        inner.set_requires_gradient_sync(last)


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Whole weights on every rank. Passes inside need no other rank, so each may run its own
    number of them."""
    sharded = _sharded_modules(model)
    root = causal_lm(model)
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.set_reshard_after_forward(module is not root, recurse=False)
            module.reshard()
