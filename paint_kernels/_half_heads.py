"""Float16 copies of bfloat16 heads, for the product of a float16 gradient with the head.

The copy of a frozen head is kept: at H = 4096 and V = 151,936 it takes 1.2 GB and as many
milliseconds, 8% of the loss of 3000 tokens. One copy is kept per device, as long as the head
exists.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from jaxtyping import Float

LARGEST_HALF = 2.0**14
"""upper bound of scaled float16 copies, a quarter of the largest float16"""
SAMPLED_ROWS = 256
"""of a head, which are compared with the kept copy in every call: 2 MB at H = 4096"""


def power_of_two_below(x: Tensor) -> Tensor:
    """Returns the scalar tensor 2^floor(log2(x)), or 1 for x = 0, without a host sync."""
    _, exponent = torch.frexp(x.float())
    return torch.where(x > 0, torch.ldexp(torch.ones_like(x.float()), exponent - 1), 1.0)


def largest_magnitude(x: Tensor) -> Tensor:
    """Returns max |x| as a scalar tensor, 0 for an empty x. Unlike abs(), copies nothing."""
    if x.numel() == 0:
        return x.new_zeros(())
    low, high = torch.aminmax(x)
    return torch.maximum(-low, high)


def scaled_half(weight: Tensor, scale: Tensor) -> Tensor:
    return torch.mul(weight, scale, out=torch.empty_like(weight, dtype=torch.float16))


@dataclass(frozen=True)
class KeptCopy:
    owner: weakref.ref[Tensor]
    key: tuple[Any, ...]
    half: Float[Tensor, "V H"]
    scale: Float[Tensor, ""]


_kept: dict[torch.device, KeptCopy] = {}


def half_head(weight: Float[Tensor, "V H"]) -> tuple[Float[Tensor, "V H"], Float[Tensor, ""]]:
    """Returns the head in float16, times a power of two, and that power of two.

    The copy of an earlier call is returned if the head is frozen and was not changed since, as
    its address and its version counter tell. The counter does not count changes through `.data`,
    raw pointers or collectives. They are found in a sample of the rows, without waiting for the
    device: the returned scale is then NaN, and so are the gradients. A change of other rows alone
    by such means is not noticed; `forget_half_heads` is the remedy for both.
    """
    # A subclass, such as the tensors without storage that estimate memory, has no address.
    is_plain = type(weight) in (Tensor, nn.Parameter)
    if not is_plain or weight.requires_grad or weight.is_inference() or _is_capturing(weight):
        return _copy(weight)
    owner = weight if weight._base is None else weight._base
    kept, key = _kept.get(weight.device), _key(weight)
    if kept is not None and kept.owner() is owner and kept.key == key:
        step = max(1, len(weight) // SAMPLED_ROWS)
        same = (scaled_half(weight[::step], kept.scale) == kept.half[::step]).all()
        return kept.half, torch.where(same, kept.scale, float("nan"))
    _kept.pop(weight.device, None)  # before the new copy is made: two would not fit
    half, scale = _copy(weight)
    device = weight.device

    def release(owner: weakref.ref[Tensor]) -> None:
        if device in _kept and _kept[device].owner is owner:
            del _kept[device]

    _kept[device] = KeptCopy(weakref.ref(owner, release), key, half, scale)
    return half, scale


def forget_half_heads() -> None:
    """Releases the kept copies."""
    _kept.clear()


def _copy(weight: Float[Tensor, "V H"]) -> tuple[Float[Tensor, "V H"], Float[Tensor, ""]]:
    scale = LARGEST_HALF / power_of_two_below(largest_magnitude(weight))
    return scaled_half(weight, scale), scale


def _key(weight: Tensor) -> tuple[Any, ...]:
    """What changes with the head, and the stream on which its copy is ready."""
    stream = torch.cuda.current_stream(weight.device).cuda_stream if weight.is_cuda else None
    return weight.data_ptr(), weight._version, weight.shape, weight.stride(), weight.dtype, stream


def _is_capturing(weight: Tensor) -> bool:
    """Whether a CUDA graph is recorded: its memory is the graph's, and it is not run now."""
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()
