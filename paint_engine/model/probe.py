"""Compares the logits that the losses see with those of the model's own forward pass.

The losses compute logits as hidden states @ head.weight.T. A model may do more: scale them, cap
them, add a bias. A constant scale is put into the hidden states; anything else is refused.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from paint_engine.model.forward import (
    LOGIT_SCALE,
    autocast,
    causal_lm,
    compute_dtype,
    hidden_states,
    lm_head_weight,
)
from paint_engine.model.packing import pack_sequences, sequences_to

# Of the largest logit. Between two float32 computations of one number; between two kernels in
# bfloat16, whose 8 bits are rounded in every layer.
_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}
_NUM_ROWS = 64
_NUM_STATES = 16
# Tokens of the sequences that run together.
_LENGTHS = (9, 5)
# Factors on hidden states whose logits are about 1: a bias shows at 0, a cap at 50 or above at 100.
_MAGNITUDES = (0.0, 1.0, 100.0)

_SOFTCAP = "final_logit_softcapping"


class _Output:
    """A backbone's output with these hidden states; whatever else is asked for is None."""

    def __init__(self, states: Float[Tensor, "B T H"]) -> None:
        self.last_hidden_state = states

    def __getitem__(self, index: int) -> Tensor:
        assert index == 0, index
        return self.last_hidden_state

    def __getattr__(self, name: str) -> None:
        return None


class _FixedBackbone(nn.Module):
    """Returns the given hidden states in place of `backbone`, and has its other attributes."""

    def __init__(self, backbone: nn.Module, states: Float[Tensor, "B T H"]) -> None:
        super().__init__()
        # Not a submodule: a model may look for the modules of one type.
        self.__dict__["backbone"] = backbone
        self.states = states

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["backbone"], name)

    def forward(self, *args: Any, **kwargs: Any) -> _Output:
        return _Output(self.states)


@contextmanager
def _replaced(model: PreTrainedModel, backbone: nn.Module, head: nn.Linear) -> Iterator[None]:
    """A context in which the model has another backbone and another head."""
    prefix, old_head = model.base_model_prefix, model.get_output_embeddings()
    old_backbone = getattr(model, prefix)
    assert old_head is not None
    model.set_output_embeddings(head)
    setattr(model, prefix, backbone)
    try:
        yield
    finally:
        setattr(model, prefix, old_backbone)
        model.set_output_embeddings(old_head)


def _own_logits(
    model: PreTrainedModel, head: nn.Linear, states: Float[Tensor, "B T H"]
) -> Float[Tensor, "B T R"]:
    """Returns what the model's forward makes of final hidden states, with R rows for a head."""
    backbone = _FixedBackbone(getattr(model, model.base_model_prefix), states)
    with _replaced(model, backbone, head):
        ids = torch.zeros(states.shape[:2], dtype=torch.long)
        # The class's own: accelerate replaces the instance's by one with autocast.
        return type(model).forward(model, input_ids=ids, use_cache=False).logits.double()


class HeadFunction(NamedTuple):
    """Logits softcap * tanh(scale * (states @ weight.T + bias) / softcap), without a cap
    scale * (states @ weight.T + bias)."""

    scale: float
    softcap: float | None

    def __call__(self, product: Tensor) -> Tensor:
        logits = self.scale * product
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class _Probe(NamedTuple):
    """What a model's forward made of given hidden states, times each of _MAGNITUDES, and a small
    head."""

    plain: Float[Tensor, "T R"]
    """float64: the states, times 1, times the head"""
    bias: Float[Tensor, " R"]
    """float64; 0 where the model's head has none"""
    own: dict[float, Float[Tensor, "T R"]]


def _probe(model: PreTrainedModel, name: str) -> _Probe:
    """Calls the model's own forward with given hidden states and a small head, so it reads no
    weights and works on the meta device."""
    old = model.get_output_embeddings()
    if not isinstance(old, nn.Linear):
        raise ValueError(
            f"{name} has a head of type {type(old).__name__}; needs a linear layer, without "
            "adapters, which the losses read as one matrix; use a causal language model such as "
            "Qwen3 or Llama, and leave the head out of the adapters' target_modules"
        )
    width = old.weight.shape[1]
    generator = torch.Generator().manual_seed(0)
    # Made without values, since initialising would draw from the global generator.
    with torch.device("meta"):
        head = nn.Linear(width, _NUM_ROWS, bias=old.bias is not None, dtype=torch.float32)
    head.to_empty(device="cpu")
    for weight in head.parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator) / width**0.5)
    states = torch.randn(1, _NUM_STATES, width, generator=generator)
    try:
        own = {factor: _own_logits(model, head, factor * states)[0] for factor in _MAGNITUDES}
    except Exception as error:
        # The forward is not ours, and with trust_remote_code anybody's.
        raise ValueError(
            f"{name}: {type(model).__name__} does not compute its logits from its backbone's "
            f"output and its head alone ({type(error).__name__}: {error}); needs a causal "
            "language model such as Qwen3 or Llama"
        ) from error
    plain = states[0].double() @ head.weight.double().T
    bias = plain.new_zeros(_NUM_ROWS) if head.bias is None else head.bias.double()
    return _Probe(plain, bias, own)


def _fitted(probe: _Probe, bias: Float[Tensor, " R"], softcap: float | None) -> HeadFunction:
    """Returns the function whose scale fits the logits at hidden states times 1 best."""
    logits, product = probe.own[1.0], probe.plain + bias
    if softcap is not None:
        logits = softcap * torch.atanh(logits / softcap)
    scale = float((logits * product).sum() / product.square().sum())
    if abs(scale - 1) < _TOLERANCE[torch.float32]:
        return HeadFunction(1.0, softcap)
    # The factor of float32 logits: rounding makes it exact where it is a power of two.
    return HeadFunction(float(torch.tensor(scale, dtype=torch.float32)), softcap)


def _misfit(
    probe: _Probe, bias: Float[Tensor, " R"], function: HeadFunction
) -> tuple[float, float] | None:
    """Returns the first factor on the hidden states at which the model has other logits, and by how
    much; None if it has the same."""
    for factor, logits in probe.own.items():
        expected = function(factor * probe.plain + bias)
        error = float((logits - expected).abs().max() / max(1.0, factor) / probe.plain.abs().max())
        if not error <= _TOLERANCE[torch.float32] * abs(function.scale):
            return factor, error
    return None


@torch.no_grad()
def logit_scale(model: PreTrainedModel, name: str) -> float:
    """Returns the factor s of a model whose logits are s * hidden states @ head.weight.T.

    It calls the model's own forward with given hidden states and a small head, so it reads no
    weights and works on the meta device.

    name: what the message calls the model.

    Raises ValueError if the logits are anything else.
    """
    probe = _probe(model, name)
    none = torch.zeros_like(probe.bias)
    function = _fitted(probe, none, None)
    if misfit := _misfit(probe, none, function):
        factor, error = misfit
        cause = "a bias" if factor == 0 else "a cap, as by final_logit_softcapping"
        raise ValueError(
            f"{name}: its logits are not its hidden states times its head (at hidden states "
            f"times {factor:g} they differ by {error:.1e}, probably by {cause}); needs logits "
            "that are that product or a constant multiple of it, as in Qwen3, Llama or "
            "Granite; use such a model"
        )
    return function.scale


@torch.no_grad()
def head_function(model: PreTrainedModel, name: str) -> HeadFunction:
    """Returns what a model makes of hidden states @ head.weight.T + head.bias, by its own forward.

    The cap is that of `final_logit_softcapping` in its configuration; the scale is found without
    its name. Both are tested as in `logit_scale`.

    name: what the message calls the model.

    Raises ValueError if the logits are anything else.
    """
    probe = _probe(model, name)
    softcap = getattr(model.config.get_text_config(), _SOFTCAP, None)
    function = _fitted(probe, probe.bias, None if softcap is None else float(softcap))
    if misfit := _misfit(probe, probe.bias, function):
        factor, error = misfit
        raise ValueError(
            f"{name}: its logits are not its hidden states times its head, with a bias, a scale "
            f"and {_SOFTCAP} {softcap} (at hidden states times {factor:g} they differ by "
            f"{error:.1e}); needs logits that are made so; use such a model"
        )
    return function


def set_logit_scale(model: PreTrainedModel, name: str) -> None:
    """Puts the factor of `logit_scale` into the hidden states that our passes return."""
    setattr(model, LOGIT_SCALE, logit_scale(model, name))


@torch.no_grad()
def forward_error(model: nn.Module, attention: str) -> float:
    """Returns the largest difference between the logits of our pass and of the model's own forward,
    relative to the largest logit.

    Two sequences of different lengths run together through `hidden_states` and the head, and each
    alone through the model's own forward. It is a collective call for a sharded model.

    attention: that of the losses.
    """
    inner, vocab_size = causal_lm(model), lm_head_weight(model).shape[0]
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in _LENGTHS]
    packed = pack_sequences([row[:1] for row in rows], [row[1:] for row in rows])
    sequences = sequences_to(packed, inner.device)
    states = hidden_states(model, sequences, attention=attention)
    with autocast(model):
        ours = states @ lm_head_weight(model).T
        alone = [torch.tensor([row], device=inner.device) for row in rows]
        own = [inner(input_ids=ids, use_cache=False).logits[0, :-1] for ids in alone]
    if isinstance(inner, FSDPModule):
        # The root's weights stay gathered after a pass; an optimizer needs the shards.
        inner.reshard()
    expected = torch.cat(own).double()
    return float((ours.double() - expected).abs().max() / expected.abs().max())


def check_forward(model: nn.Module, attention: str, name: str) -> None:
    """Raises ValueError unless our pass and the model's own forward give the same logits, as
    `forward_error` compares them.

    name: what the message calls the model.
    """
    error, dtype = forward_error(model, attention), compute_dtype(model)
    if not error <= _TOLERANCE[dtype]:
        raise ValueError(
            f"{name}: with {attention} attention, its logits differ from those of its own forward "
            f"by {error:.1e} of the largest; needs {_TOLERANCE[dtype]:g} or less in {dtype}; use "
            "another --model.attention (padded is the safest), or another model"
        )
