"""The output head as the one matrix that `paint_loss` reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

if TYPE_CHECKING:
    from jaxtyping import Float


def check_plain_head(model: Any, role: str) -> None:
    """Raises ValueError unless the model's logits are hidden states @ head.weight.T.

    model: a causal language model of transformers, or a PeftModel around one.
    role: what the message calls it, such as "student".
    """
    # Imported here: `paint_loss` on packed rows needs none of the engine's libraries.
    from paint_engine.model.forward import causal_lm
    from paint_engine.model.probe import logit_scale

    scale = logit_scale(causal_lm(model), f"the {role}")
    if scale != 1.0:
        raise ValueError(
            f"the {role} multiplies its logits by {scale:g}; paint_loss needs logits that are a "
            "plain product of hidden states and head, as in Qwen3 and Llama; use such a model"
        )


def whole_head(weight: Float[Tensor, "V H"]) -> Float[Tensor, "V H"]:
    """Returns the head's whole weight on each rank, gathered if FSDP2 shards it.

    The gradient is averaged over the ranks and sharded again. Call it after the model's forward.
    """
    if not isinstance(weight, DTensor):
        return weight
    # Without grad_placements, full_tensor treats the ranks' gradients as equal and keeps a slice
    # of each: a shard would learn only from its own rank's batch, without an error.
    return weight.full_tensor(grad_placements=[Partial("avg")] * weight.device_mesh.ndim)
