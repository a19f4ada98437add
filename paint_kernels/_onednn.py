"""float32 products of a CPU in oneDNN. PyTorch's own are MKL's on x86.

At the 103 rows of a chunk, on an AMD EPYC, oneDNN's take 0.8 of MKL's time (docs/decisions.md). It
reads a transposed head where it lies: no copy was seen at hidden sizes of 256 to 4096. The operator
is the one that torch.compile emits. It is private, so another form of it is not called.
"""

from __future__ import annotations

import os
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
    operator = getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "default", None)
    return operator is not None and str(operator._schema) == _KNOWN


def _is_exact() -> bool:
    """Returns whether oneDNN's own setting leaves float32 products what they are. MKL's have none,
    and `full_precision` sets PyTorch's."""
    names = ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE")
    return all(os.environ.get(name, "").upper() in ("", "STRICT") for name in names)


_IS_USED = torch.backends.mkldnn.is_available() and _is_known() and _is_exact()


def runs_in_onednn(x: Tensor) -> bool:
    """Returns whether products of `x` run in oneDNN: float32 on a CPU, unless the user has switched
    it off (`torch.backends.mkldnn.enabled`) or has made it inexact (ONEDNN_DEFAULT_FPMATH_MODE)."""
    # It takes no tensors without elements.
    is_taken = x.is_cpu and x.dtype == torch.float32 and x.numel() > 0
    return is_taken and _IS_USED and bool(torch.backends.mkldnn.enabled)


def onednn_product(x: Float[Tensor, "M K"], weight: Float[Tensor, "N K"]) -> Float[Tensor, "M N"]:
    """Computes x @ weight.T. Call it where `runs_in_onednn`, and under `full_precision`."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
