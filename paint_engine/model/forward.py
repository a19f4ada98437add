"""Forward passes: final hidden states at the positions that predict completion tokens."""

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
from paint_kernels import follow_load

# Attributes set on a causal language model: the dtype of its matrix products, the factor on its
# logits, and the bound `_backbone_states` that FSDP wraps.
_COMPUTE_DTYPE = "paint_compute_dtype"
LOGIT_SCALE = "paint_logit_scale"
_BACKBONE = "paint_backbone_states"

# The context length under the names that architectures give it.
_CONTEXT_KEYS = ("max_position_embeddings", "max_seq_len", "seq_length")
_UNLIMITED = 2**31 - 1
# transformers' names of layers that look back through a window or a state.
_UNLIMITED_LAYERS = frozenset({"linear_attention", "conv", "sliding_attention", "mamba"})


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """Returns the causal language model inside the PEFT wrapper, with its adapters in place."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(inner, PreTrainedModel)
    return inner


def lm_head_weight(model: nn.Module) -> Float[Tensor, "V H"]:
    """Returns the (V, H) output projection, which is the input embeddings if they are tied."""
    head = causal_lm(model).get_output_embeddings()
    assert isinstance(head, nn.Linear), type(head)
    return head.weight


def max_context(model: nn.Module) -> int:
    """Returns the model's maximum number of positions, in tokens, from the text part of its
    configuration.

    A model that looks back through windows and recurrent states alone has no maximum; it gets
    2^31 - 1. LongRoPE, as in Phi-3, rotates by other angles once a sequence is longer than the
    original context, also in a row that is shorter: up to there, one token's states do not depend
    on the other rows, and cached states stay valid.

    Raises ValueError for a configuration that names no maximum.
    """
    inner = causal_lm(model)
    config = inner.config.get_text_config()
    longest = next(filter(None, (getattr(config, key, None) for key in _CONTEXT_KEYS)), None)
    layers = getattr(config, "layer_types", None) or ["full_attention"]
    if longest is None and _UNLIMITED_LAYERS.issuperset(layers):
        return _UNLIMITED
    if not isinstance(longest, int) or longest < 1:
        raise ValueError(
            f"the configuration of {type(inner).__name__} has no context length: got "
            f"max_position_embeddings {longest}; add it, in tokens, to the model's config.json"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    # One set of parameters, or one for each type of layer.
    for parameters in (rope, *rope.values()):
        if isinstance(parameters, dict) and parameters.get("rope_type") == "longrope":
            longest = min(longest, parameters.get("original_max_position_embeddings", longest))
    return longest


def compute_dtype(model: nn.Module) -> torch.dtype:
    """Returns the dtype of matrix products. Trained weights are float32 in any case."""
    return getattr(causal_lm(model), _COMPUTE_DTYPE, causal_lm(model).dtype)


def autocast(model: nn.Module) -> torch.autocast:
    """Returns the autocast context that runs float32 weights in the model's compute dtype."""
    inner, dtype = causal_lm(model), compute_dtype(model)
    narrow = dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(inner.device.type, dtype, enabled=narrow)


def _backbone_states(self: PreTrainedModel, **inputs: Any) -> Float[Tensor, "B T H"]:
    with autocast(self):
        states = self.base_model(**inputs).last_hidden_state
    scale = getattr(self, LOGIT_SCALE, 1.0)
    return states if scale == 1.0 else scale * states


def backbone_states(model: nn.Module, **inputs: Any) -> Float[Tensor, "B T H"]:
    """Returns the (B, T, H) final hidden states, after the last norm and without the head. The
    factor of a model that scales its logits is in them, so they times the head are the logits.

    Every pass uses this function. A sharded model is entered at its root, where FSDP gathers the
    weights outside the layers (embeddings, last norm, head) and keeps them until the backward pass.
    The head is therefore gathered once per loss.
    """
    inner = causal_lm(model)
    if inner.device.type == "cpu":
        follow_load()
    if isinstance(inner, FSDPModule):
        return getattr(inner, _BACKBONE)(**inputs)
    return _backbone_states(inner, **inputs)


def hidden_states(
    model: nn.Module, sequences: PackedSequences, *, attention: str
) -> Float[Tensor, "N H"]:
    """Returns the (N, H) final hidden states, after the last norm, at the loss positions.

    attention: "padded" runs the sequences as padded rows. The other results of `choose_attention`
    run them as one row in which positions restart.
    """
    if attention != "padded":
        states = backbone_states(model, **packed_arguments(sequences, attention))
        return states[0, sequences.loss_positions]
    padded = pad_sequences(sequences)
    # The padding is on the right, so under causal attention no real token attends to it and no mask
    # is needed. Positions continue through the padding; a restart would be read as packing.
    states = backbone_states(model, input_ids=padded.token_ids, use_cache=False)
    return states.flatten(0, 1)[padded.loss_positions]
