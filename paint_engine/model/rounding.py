"""Tells rounding from a real difference between two ways of computing the same hidden states."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

# Two ways that agree may differ by this many times what rounding was seen to change.
_FACTOR = 10


def relative_error(states: Float[Tensor, "... H"], expected: Float[Tensor, "... H"]) -> float:
    """Returns the largest relative error of a state, in the Euclidean norm."""
    difference = (states.float() - expected.float()).norm(dim=-1)
    return float((difference / expected.float().norm(dim=-1)).max())


def is_rounding(error: float, seen: float, dtype: torch.dtype) -> bool:
    """Whether a relative error is no more than rounding in arithmetic of `dtype` explains.

    seen: relative error of a change that is known to alter nothing but the rounding. Depth and
    width of a model are thereby taken into account. NaN is no rounding.
    """
    return error <= _FACTOR * max(seen, torch.finfo(dtype).eps)


def shares_half_the_digits(error: float, dtype: torch.dtype) -> bool:
    """Whether a relative error leaves half of the digits of `dtype`: of two algorithms for one
    result, which round differently. float32: 0.14%, bfloat16: 35%. NaN leaves none."""
    return error <= 4 * math.sqrt(torch.finfo(dtype).eps)
