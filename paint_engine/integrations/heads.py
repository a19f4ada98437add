"""The output head as `paint_loss` takes it: one matrix, a bias, a scale, a cap."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

if TYPE_CHECKING:
    from jaxtyping import Float


def head_settings(model: Any, role: str) -> dict[str, Any]:
    """Returns the scale and the cap of the model's logits, as keyword arguments of `paint_loss`.

    Its own forward is asked, with a small head in place of its own. The head's bias is not in the
    result: a sharded one is gathered for each loss.

    model: a causal language model of transformers, or a PeftModel around one.
    role: "student", or "teacher", whose arguments have other names.

    Raises ValueError if the logits are not the function of hidden states and head that `paint_loss`
    computes.
    """
    # Imported here: `paint_loss` on packed rows needs none of the engine's libraries.
    from paint_engine.model.forward import causal_lm
    from paint_engine.model.probe import head_function

    function = head_function(causal_lm(model), f"the {role}")
    prefix = "teacher_" if role == "teacher" else ""
    # None would be the student's, or refused beside a teacher's own head.
    softcap = math.inf if function.softcap is None else function.softcap
    return {f"{prefix}logit_scale": function.scale, f"{prefix}logit_softcap": softcap}


def whole_head(weight: Float[Tensor, "V ..."]) -> Float[Tensor, "V ..."]:
    """Returns the head's whole weight, or its bias, on each rank, gathered if FSDP2 shards it.

    The gradient is averaged over the ranks and sharded again. Call it after the model's forward.
    """
    if not isinstance(weight, DTensor):
        return weight
    # Without grad_placements, full_tensor treats the ranks' gradients as equal and keeps a slice
    # of each: a shard would learn only from its own rank's batch, without an error.
    return weight.full_tensor(grad_placements=[Partial("avg")] * weight.device_mesh.ndim)
