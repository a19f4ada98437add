"""float32 products of a CPU in oneDNN, which PyTorch's own products are not: they are MKL's.

At the 103 to 257 rows of a chunk, on an AMD EPYC, oneDNN's take 0.75 of their time. The operator is
the one that torch.compile emits. It is private, so another form of it is not called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

_KNOWN = (
    "mkldnn::_linear_pointwise(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, "
    "str? algorithm) -> Tensor Y"
)


def _is_known() -> bool:
    packet = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return packet is not None and str(packet.default._schema) == _KNOWN


_IS_KNOWN = torch.backends.mkldnn.is_available() and _is_known()


def runs_in_onednn(x: Tensor) -> bool:
    """Returns whether products of `x` run in oneDNN: float32 on a CPU, unless the user has switched
    it off (`torch.backends.mkldnn.enabled`)."""
    # It takes no tensors without elements.
    is_taken = x.is_cpu and x.dtype == torch.float32 and x.numel() > 0
    return is_taken and _IS_KNOWN and bool(torch.backends.mkldnn.enabled)


def onednn_product(x: Float[Tensor, "M K"], weight: Float[Tensor, "N K"]) -> Float[Tensor, "M N"]:
    """Computes x @ weight.T. Call it where `runs_in_onednn`, and under `full_precision`."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
