"""The output head as the one matrix that `paint_loss` reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

if TYPE_CHECKING:
    from jaxtyping import Float

# Names in the configurations of transformers, with the value that leaves the logits as they are.
_LOGIT_CHANGES = {
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "output_multiplier": 1.0,
    "lm_head_multiplier": 1.0,
    "final_logit_softcapping": None,
}


def check_plain_head(model: Any, role: str) -> None:
    """Raises ValueError unless the model's logits are hidden states @ head.weight.T.

    model: a causal language model of transformers, or a PeftModel around one.
    role: what the message calls it, such as "student".
    """
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    changes = [
        f"{name} = {value}"
        for name, plain in _LOGIT_CHANGES.items()
        if (value := getattr(config, name, plain)) not in (plain, None)
    ]
    if not isinstance(head, nn.Linear):
        changes.append(f"a head of type {type(head).__name__}")
    elif head.bias is not None:
        changes.append("a head with a bias")
    if changes:
        raise ValueError(
            f"the {role} has {', '.join(changes)}: paint_loss needs logits that are a plain "
            "product of hidden states and head, as in Qwen3 and Llama. Use such a model, and leave "
            "the head out of the adapter's target_modules."
        )


def whole_head(weight: Float[Tensor, "V H"]) -> Float[Tensor, "V H"]:
    """The head's whole weight on each rank, gathered where FSDP2 shards it.

    The gradient is averaged over the ranks and sharded again. Call it after the model's forward.
    """
    if not isinstance(weight, DTensor):
        return weight
    # Without grad_placements, full_tensor takes every rank's gradient for the same one and keeps a
    # slice of it: each shard would learn from its own rank's batch alone, without an error.
    return weight.full_tensor(grad_placements=[Partial("avg")] * weight.device_mesh.ndim)
