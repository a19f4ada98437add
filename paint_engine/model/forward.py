"""The causal language model behind its wrappers, and its hidden states at completion positions."""

from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from paint_engine.model.attention import packed_arguments
from paint_engine.model.packing import pad_sequences
from paint_engine.types import PackedSequences

# Set on a causal language model: the dtype that its products run in, and the bound form of
# `_backbone_states` that FSDP wraps.
_COMPUTE_DTYPE = "paint_compute_dtype"
_BACKBONE = "paint_backbone_states"


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The causal language model inside, with its adapters in place."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(inner, PreTrainedModel)
    return inner


def lm_head_weight(model: nn.Module) -> Float[Tensor, "V H"]:
    """The output projection; the input embeddings where the two are tied."""
    head = causal_lm(model).get_output_embeddings()
    assert isinstance(head, nn.Linear), type(head)
    return head.weight


def max_context(model: nn.Module) -> int:
    """The number of positions that the model was built for, in tokens."""
    return causal_lm(model).config.max_position_embeddings


def compute_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that matrix products run in; trained weights are float32 whatever it is."""
    return getattr(causal_lm(model), _COMPUTE_DTYPE, causal_lm(model).dtype)


def autocast(model: nn.Module) -> torch.autocast:
    """Rounds float32 weights to the model's dtype of arithmetic, where that is a narrower one."""
    inner, dtype = causal_lm(model), compute_dtype(model)
    narrow = dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(inner.device.type, dtype, enabled=narrow)


def _backbone_states(self: PreTrainedModel, **inputs: Any) -> Float[Tensor, "B T H"]:
    with autocast(self):
        return self.base_model(**inputs).last_hidden_state


def backbone_states(model: nn.Module, **inputs: Any) -> Float[Tensor, "B T H"]:
    """The final hidden states (after the last norm) of the model without its head.

    Every pass goes through here: sharded, it enters at the root, where FSDP gathers the weights
    that belong to no layer (embeddings, last norm, head) and keeps them until the backward pass, so
    that the head is gathered once for a loss.
    """
    inner = causal_lm(model)
    if isinstance(inner, FSDPModule):
        return getattr(inner, _BACKBONE)(**inputs)
    return _backbone_states(inner, **inputs)


def hidden_states(
    model: nn.Module, sequences: PackedSequences, *, attention: str
) -> Float[Tensor, "N H"]:
    """Final hidden states (after the last norm) at the loss positions.

    attention: "padded" runs the sequences as rows of a rectangle, any other of pick_attention's
    answers as one row whose positions restart.
    """
    if attention != "padded":
        states = backbone_states(model, **packed_arguments(sequences, attention))
        return states[0, sequences.loss_positions]
    padded = pad_sequences(sequences)
    # Causal attention with the padding on the right: no real token sees it, so no mask is needed,
    # and positions count up through the padding (a restart there would read as packing).
    states = backbone_states(model, input_ids=padded.token_ids, use_cache=False)
    return states.flatten(0, 1)[padded.loss_positions]
