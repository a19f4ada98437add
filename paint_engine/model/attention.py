"""Attention over packed sequences: chooses the implementation and prepares the model for it.

transformers looks up the attention function of every layer in its registry. Models that train on
packed sequences get ours. It runs a packed kernel in calls with `packing`, and transformers' SDPA,
including masks, in all other calls, so the sampler's cache and padding are unchanged.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from paint_engine.model.packing import pack_sequences, sequences_to
from paint_engine.model.rounding import is_rounding, relative_error
from paint_engine.types import PackedSequences

IMPLEMENTATION = "paint_packed"
# FlashAttention, both in torch and in its own package, needs tensor cores of this generation
# (Ampere).
_MIN_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Packing:
    """The bounds of the sequences of one packed row, as the kernels need them.

    Two sequences of 4 and 2 tokens: cu_seqlens 0 4 6 (int32, on the model's device), max_length 4
    (a Python number, so reading it does not wait for the device).
    """

    kernel: str
    cu_seqlens: Int[Tensor, " B+1"]
    max_length: int


def _usable(device: torch.device, dtype: torch.dtype) -> bool:
    return (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(device) >= _MIN_CAPABILITY
    )


def pick_attention(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Resolves "auto" to "varlen" on a GPU in half precision and to "padded" elsewhere. Returns any
    other `name` unchanged.

    dtype: dtype of the computation, not of the trained weights.

    Raises ValueError for an implementation that this device, dtype or installation cannot run.
    """
    if name == "auto":
        return "varlen" if _usable(device, dtype) else "padded"
    if name not in _KERNELS:
        return name
    asked = f"model.attention is {name!r}, which needs"
    if device.type != "cuda":
        raise ValueError(
            f"{asked} a GPU, but the device is {device.type}; use --model.attention auto or padded"
        )
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"{asked} bfloat16, but the model computes in {str(dtype).removeprefix('torch.')}; use "
            "--model.dtype bfloat16, or --model.attention padded"
        )
    if not _usable(device, dtype):
        raise ValueError(
            f"{asked} a GPU of compute capability 8.0 (Ampere) or newer, but this is "
            f"{torch.cuda.get_device_name(device)}; use --model.attention auto or padded"
        )
    if name == "flash_attention_2" and find_spec("flash_attn") is None:
        raise ValueError(
            f"{asked} the package flash-attn, which is not installed; install it (pip install "
            "'.[flash]' in the clone), or use --model.attention varlen, which needs no package"
        )
    return name


def choose_attention(
    model: PreTrainedModel, name: str, device: torch.device, dtype: torch.dtype
) -> str:
    """Resolves `name` and prepares the model for the result, which it returns. "auto" is "padded"
    for a model whose sequences cannot be packed.

    Raises ValueError as `pick_attention` and `adopt_attention` do.
    """
    attention = pick_attention(name, device, dtype)
    try:
        adopt_attention(model, attention)
    except ValueError:
        if name != "auto":
            raise
        return "padded"
    return attention


def check_layers(model: PreTrainedModel, attention: str) -> None:
    """Raises ValueError if layers of the model would mix sequences that are packed, and `attention`
    packs them whatever the model. The model may be on the meta device."""
    if attention in ("auto", "padded"):
        return
    # A recurrent layer, for example, would carry its state from one sequence into the next.
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    others = layers - {"full_attention", "sliding_attention"}
    others |= {"convolution" for m in model.get_decoder().modules() if isinstance(m, nn.Conv1d)}
    if others:
        raise ValueError(
            f"model.attention is {attention!r}, but the model has layers of type "
            f"{', '.join(sorted(others))}, which mix packed sequences; use --model.attention padded"
        )


def adopt_attention(model: PreTrainedModel, attention: str) -> None:
    """Prepares a model that was loaded with SDPA for `attention`, a result of `pick_attention`. A
    model on the meta device is prepared, and not tried.

    Raises ValueError for a model that cannot keep the sequences of one row separate.
    """
    if attention == "padded":
        return
    config = model.config.get_text_config()
    remedy = "use --model.attention padded"
    check_layers(model, attention)
    if attention == "packed":
        # On the meta device there is nothing to compare.
        if model.device.type != "meta" and _mixes_packed(model):
            raise ValueError(
                f"model.attention is {attention!r}, but {type(model).__name__} does not tell "
                f"packed sequences apart by their positions; {remedy}"
            )
        return
    if getattr(config, "attention_dropout", 0.0):
        raise ValueError(
            f"model.attention is {attention!r}, whose kernel has no dropout, but the model's "
            f"attention_dropout is {config.attention_dropout}; set it to 0 in its config.json, or "
            f"{remedy}"
        )
    if not model._supports_sdpa:
        # Some attention has a softcap or sinks, which the kernels would leave out.
        raise ValueError(
            f"model.attention is {attention!r}, but the attention of {type(model).__name__} is not "
            f"PyTorch's scaled dot product; {remedy}"
        )
    AttentionInterface.register(IMPLEMENTATION, packed_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    model.set_attn_implementation(IMPLEMENTATION)
    if model.config._attn_implementation != IMPLEMENTATION:
        raise ValueError(
            f"model.attention is {attention!r}, but {type(model).__name__} does not take its "
            f"attention from transformers' AttentionInterface; {remedy}"
        )


def packed_arguments(sequences: PackedSequences, attention: str) -> dict[str, Any]:
    """Returns the arguments of a model's forward for all sequences in one row:
    `backbone(**arguments)`.

    With "packed", transformers finds the bounds in the positions, which it does only without a mask
    and without a cache, and builds a dense (M, M) mask from them. The kernels get the bounds
    themselves and a mask without elements. transformers then builds no mask, and a model that does
    not pass `packing` on to its layers fails instead of attending across sequences.
    """
    arguments: dict[str, Any] = {
        "input_ids": sequences.token_ids[None],
        "position_ids": sequences.position_ids[None],
        "use_cache": False,
    }
    if attention == "packed":
        return arguments
    device = sequences.token_ids.device
    packing = Packing(
        attention,
        sequences.cu_seqlens.to(device, non_blocking=True),
        int(sequences.cu_seqlens.diff().max()),
    )
    no_mask = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=device)
    return arguments | {"attention_mask": no_mask, "packing": packing}


@torch.no_grad()
def _mixes_packed(model: PreTrainedModel) -> bool:
    """Whether tokens attend across the bounds of packed sequences, asked with a few tokens. A model
    may take its mask from elsewhere than the positions."""
    first, second, device = [1, 2, 3], [4, 5, 6, 7, 8], model.device
    packed = pack_sequences([first[:1], second[:1]], [first[1:], second[1:]])
    packed = sequences_to(packed, device)
    states = model.base_model(**packed_arguments(packed, "packed")).last_hidden_state
    ids = torch.tensor([second], device=device)
    alone = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    twice = model.base_model(input_ids=ids.expand(2, -1), use_cache=False).last_hidden_state
    error = relative_error(states[:, len(first) :], alone)
    return not is_rounding(error, relative_error(twice[:1], alone), model.dtype)


@cache
def _gqa_flag(kernel: Callable[..., object]) -> dict[str, Any]:
    """Returns the flag that lets keys have fewer heads than queries. Newer torch requires it; torch
    2.11 runs the same kernel without the flag and does not accept it."""
    return {"enable_gqa": True} if "enable_gqa" in signature(kernel).parameters else {}


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float, window: int
) -> Tensor:
    bounds, longest = packing.cu_seqlens, packing.max_length
    sizes = (bounds, bounds, longest, longest)
    flag = _gqa_flag(varlen_attn)
    # No tokens to the right: causal.
    out = varlen_attn(query, key, value, *sizes, scale=scale, window_size=(window, 0), **flag)
    assert isinstance(out, Tensor)
    return out


def _flash_attention_2(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float, window: int
) -> Tensor:
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    bounds, longest = packing.cu_seqlens, packing.max_length
    sizes = (bounds, bounds, longest, longest)
    return flash_attn_varlen_func(
        query, key, value, *sizes, softmax_scale=scale, causal=True, window_size=(window, 0)
    )


_KERNELS = {"varlen": _varlen, "flash_attention_2": _flash_attention_2}


def packed_attention(
    module: nn.Module,
    query: Float[Tensor, "1 Hq M D"],
    key: Float[Tensor, "1 Hkv M D"],
    value: Float[Tensor, "1 Hkv M D"],
    attention_mask: Tensor | None,
    *,
    scaling: float,
    packing: Packing | None = None,
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Computes causal attention of one layer within each sequence of `packing`: (1, M, Hq, D).

    Without `packing` this is transformers' SDPA, for any batch and any mask.

    sliding_window: number of tokens that each token attends to, including itself; None for all
    before it.
    """
    if packing is None:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            sliding_window=sliding_window,
            **kwargs,
        )
    # The packed kernels support none of these arguments; `adopt_attention` refuses such models.
    assert not kwargs.get("dropout"), kwargs
    assert all(kwargs.get(name) is None for name in ("position_bias", "softcap", "s_aux")), kwargs
    assert len(query) == 1 and query.shape[2] == key.shape[2], (query.shape, key.shape)
    # Under autocast a norm with float32 weights makes queries and keys float32; values keep their
    # dtype.
    query, key = query.to(value.dtype), key.to(value.dtype)
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    window = -1 if sliding_window is None else sliding_window - 1
    out = _KERNELS[packing.kernel](query, key, value, packing, scaling, window)
    return out[None], None
