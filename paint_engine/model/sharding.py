"""Shards a model over the ranks with FSDP2."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from paint_engine.config.schema import Config
from paint_engine.distributed import World, gather_objects
from paint_engine.model.forward import _BACKBONE, _backbone_states, causal_lm, compute_dtype


def is_sharded(config: Config, world: World) -> bool:
    """Returns whether a run shards its weights over these ranks."""
    return world.size > 1 and config.parallel.shard == "full"


def check_replicas(config: Config, num_ranks: int) -> None:
    """Raises ValueError unless the ranks can be divided into as many equal groups as
    `parallel.replicas` says."""
    replicas = config.parallel.replicas
    if num_ranks % replicas:
        divisors = [str(n) for n in range(1, num_ranks + 1) if num_ranks % n == 0]
        raise ValueError(
            f"parallel.replicas: got {replicas} with {num_ranks} "
            f"{'process' if num_ranks == 1 else 'processes'}; needs a divisor of that number "
            f"({', '.join(divisors)}), such as the number of nodes; change --parallel.replicas, or "
            "start another number of processes with torchrun"
        )


def checkpoint_activations(model: nn.Module) -> None:
    """Enables recomputation of each decoder layer in the backward pass, to save memory."""
    inner = causal_lm(model)
    # Renamed in transformers 5.20; both take the settings of torch.utils.checkpoint first.
    enable = getattr(inner, "activation_checkpointing_enable", None)
    (enable or inner.gradient_checkpointing_enable)({"use_reentrant": False})


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Returns the text decoder's layers in order. FSDP shards each of them as a unit.

    Raises ValueError for a model without a list of as many layers as its configuration says.
    """
    inner = causal_lm(model)
    number = inner.config.get_text_config().num_hidden_layers
    for module in inner.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            return list(module)
    raise ValueError(
        f"the decoder of {type(inner).__name__} has no list of {number} layers, as many as "
        "num_hidden_layers in its config.json says; sharding and the estimate of memory need it; "
        "use another model"
    )


def shard_model(model: nn.Module, world: World, *, replicas: int = 1) -> None:
    """Shards the weights over all ranks: each decoder layer as a unit, then the rest. A collective
    call.

    replicas: groups of consecutive ranks, each of which shares one copy of the weights. Gradients
        are reduced within a group, then over the groups. It divides the number of ranks.

    The main rank's weights and buffers become those of all ranks. The other ranks' own are not
    read, and may be on the meta device. They are handed out one by one, and the main rank frees
    each, so that no rank holds the whole model beside its shards.

    Gradients are summed over the ranks and not averaged, because losses are divided by the rollouts
    or tokens of the whole step. Float32 weights that are trained with bfloat16 arithmetic are
    gathered in bfloat16, and their gradients are summed in float32.
    """
    inner = causal_lm(model)
    mesh = _mesh(world, replicas)
    policy = MixedPrecisionPolicy()
    if not isinstance(model, PeftModel) and inner.dtype != compute_dtype(model):
        policy = MixedPrecisionPolicy(compute_dtype(model), torch.float32)
    taken = _take_tensors(inner, world)
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    fully_shard(inner, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
    inner.to_empty(device=world.device)
    _hand_out(inner, taken, world)
    setattr(inner, _BACKBONE, MethodType(_backbone_states, inner))
    register_fsdp_forward_method(inner, _BACKBONE)
    for module in _sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        # The factor would otherwise use an operator that scales and adds, which gloo lacks.
        module.set_force_sum_reduction_for_comms(True)


def _mesh(world: World, replicas: int) -> DeviceMesh:
    assert world.size % replicas == 0, (world.size, replicas)
    kind = world.device.type
    if replicas == 1:
        return init_device_mesh(kind, (world.size,))
    shape = (replicas, world.size // replicas)
    return init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields parameters and buffers by name; tied ones once."""
    yield from module.named_parameters()
    yield from module.named_buffers()


@torch.no_grad()
def _take_tensors(module: nn.Module, world: World) -> dict[str, Tensor]:
    """Moves a module to the meta device, and returns what it held on the main rank; nothing on the
    others. Tied weights stay tied."""
    taken, described = {}, []
    for name, tensor in _tensors(module):
        described.append((name, tensor.shape, tensor.dtype, tensor.requires_grad))
        held = torch.empty_like(tensor, device="meta")
        if isinstance(tensor, nn.Parameter):
            held = nn.Parameter(held, tensor.requires_grad)
        torch.utils.swap_tensors(tensor, held)
        taken[name] = held.detach()
    digest = hashlib.sha256(repr(described).encode()).hexdigest()
    assert len(set(gather_objects(digest))) == 1, "the ranks have built different models"
    return taken if world.is_main else {}


@torch.no_grad()
def _hand_out(module: nn.Module, taken: dict[str, Tensor], world: World) -> None:
    """Fills a sharded module on every rank from what `_take_tensors` took, which is emptied."""
    for name, tensor in _tensors(module):
        if isinstance(tensor, DTensor):
            whole = (
                taken.pop(name)
                if world.is_main
                else torch.empty(tensor.shape, dtype=tensor.dtype, device=world.device)
            )
            shards = distribute_tensor(whole, tensor.device_mesh, tensor.placements)
            tensor.to_local().copy_(shards.to_local())
        else:
            if world.is_main:
                tensor.copy_(taken.pop(name))
            dist.broadcast(tensor, 0)


def _sharded_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def sync_gradients(model: nn.Module, *, last: bool) -> None:
    """Sets whether the next backward pass reduces a sharded model's gradients over the ranks.

    The gradients of adapters are small and are reduced once, after the last micro-batch of a step.
    The gradients of a whole model are large and are reduced after every micro-batch, within the
    group of ranks that share the weights. The sum over such groups comes with the last one.
    """
    inner = causal_lm(model)
    if isinstance(inner, FSDPModule) and isinstance(model, PeftModel):
        inner.set_requires_gradient_sync(last)
    elif isinstance(inner, FSDPModule):
        inner.set_requires_all_reduce(last)


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """A context in which every rank holds the whole weights. Passes inside need no communication,
    so each rank may run its own number of them."""
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
