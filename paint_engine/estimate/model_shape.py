"""The sizes of a model that determine memory and arithmetic. They need no weights."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin

from paint_engine.model import causal_lm, lm_head_weight
from paint_engine.model.sharding import decoder_layers

# The linear layers of Qwen3 and Llama whose inputs `memory` counts by their names. The input of
# "o_proj" is the result of the attention, which is kept in any case.
_NAMED = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
# Width of each expert, and of the experts that every token passes, under their names in
# configurations.
_EXPERT_WIDTHS = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts")
_SHARED_WIDTHS = ("shared_expert_intermediate_size", "shared_intermediate_size")


@dataclass(frozen=True)
class ModelShape:
    """Widths and counts of a model's text decoder, in elements. Widths are of a mean layer.

    `queries`, `keys` and `num_heads` are of a layer with attention, of which there are
    `num_attention`; `windows` has the number of tokens that each of these caches, None for all.
    `recurrent` is the width of what other mixing of tokens (linear attention, Mamba, convolutions)
    computes of each token; `state_elements` counts what all layers keep of a whole text for it.
    `intermediate` counts the experts that a token passes, `active_parameters` the parameters in the
    layers that it passes.
    `adapted`: names of a layer's modules that have adapters; empty if all weights are trained.
    `layer_parameters` and `adapter_parameters` count all layers. `root_parameters` counts the
    parameters outside the layers: embeddings, last norm, a vision tower, and the head unless it is
    tied to the embeddings.
    """

    num_layers: int
    num_attention: int
    windows: tuple[int | None, ...]
    hidden: int
    intermediate: int
    queries: int
    keys: int
    num_heads: int
    recurrent: int
    state_elements: int
    num_head_rows: int
    norms_heads: bool
    tied: bool
    adapted: frozenset[str]
    adapter_rank: int
    adapters_per_layer: int
    adapter_inputs: int
    other_adapter_inputs: int
    layer_parameters: int
    active_parameters: int
    root_parameters: int
    adapter_parameters: int
    trained_parameters: int
    largest_trained: int

    @property
    def base_parameters(self) -> int:
        """Number of parameters without adapters."""
        return self.layer_parameters + self.root_parameters

    @property
    def head_parameters(self) -> int:
        """Number of parameters of the output head, tied or not."""
        return self.num_head_rows * self.hidden


def _first(config: Any, names: Sequence[str], default: int) -> int:
    """Returns the first of these settings that is a number, or the mean of one per layer."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, list | tuple) and value:
            return round(sum(value) / len(value))
        if isinstance(value, int):
            return value
    return default


def _expert_weights(layer: nn.Module) -> Iterator[Tensor]:
    """Yields the weights of a layer that hold all experts: (experts, rows, columns)."""
    for parameter in layer.parameters():
        if parameter.ndim == 3 and parameter.shape[1] > 1 and parameter.shape[2] > 1:
            yield parameter


def _convolutions(layer: nn.Module) -> Iterator[nn.Conv1d]:
    return (module for module in layer.modules() if isinstance(module, nn.Conv1d))


def _experts(config: Any, layers: Sequence[nn.Module]) -> tuple[int, int]:
    """Returns the width of the MLP that a token passes in a mean layer, and the number of the
    layers' parameters that it does not pass."""
    dense = _first(config, ("intermediate_size",), 4 * config.hidden_size)
    per_token = _first(config, _EXPERTS_PER_TOKEN, 0)
    passed = per_token * _first(config, _EXPERT_WIDTHS, dense)
    passed += _first(config, _SHARED_WIDTHS, 0)
    width, idle = 0, 0
    for layer in layers:
        weights = list(_expert_weights(layer)) if per_token else []
        width += passed if weights else dense
        idle += sum(w.numel() // len(w) * max(0, len(w) - per_token) for w in weights)
    return round(width / len(layers)), idle


def _states(layers: Sequence[nn.Module]) -> int:
    """Returns the number of elements of all states of recurrent layers and convolutions, of one
    text."""
    number = 0
    for layer in layers:
        number += sum(conv.weight.shape[0] * conv.kernel_size[0] for conv in _convolutions(layer))
        for mixer in layer.modules():
            decay = getattr(mixer, "A_log", None)
            if not isinstance(decay, Tensor):
                continue
            sizes: Mapping[str, Any] = vars(mixer)
            # The state of a head is a matrix: Mamba 2's, or that of gated delta rules.
            head = sizes.get("head_dim", 0) * sizes.get("ssm_state_size", 0)
            head = head or sizes.get("head_k_dim", 0) * sizes.get("head_v_dim", 0)
            number += decay.numel() * (head if decay.ndim == 1 else 1)
    return number


def _recurrent_width(config: Any, layers: Sequence[nn.Module]) -> int:
    """Returns the width that mixing without attention has in a mean layer: what the linear layers
    beside a convolution read the hidden states into, and the convolution's channels."""
    width = 0
    for layer in layers:
        for mixer in layer.modules():
            children = dict(mixer.named_children())
            convolutions = [c for c in children.values() if isinstance(c, nn.Conv1d)]
            if convolutions:
                width += sum(conv.weight.shape[0] for conv in convolutions)
                width += sum(
                    child.out_features
                    for child in (getattr(c, "base_layer", c) for c in children.values())
                    if isinstance(child, nn.Linear) and child.in_features == config.hidden_size
                )
    return round(width / len(layers))


def _adapters(layers: Sequence[nn.Module]) -> dict[str, Any]:
    """Returns the fields of `ModelShape` that describe adapters."""
    # "mlp.down_proj.lora_A.default.weight", of shape (rank, inputs).
    found = [
        (name.partition(".lora_A.")[0].rpartition(".")[2], parameter)
        for layer in layers
        for name, parameter in layer.named_parameters()
        if ".lora_A." in name
    ]
    other = sum(p.shape[1] for name, p in found if name not in _NAMED)
    return {
        "adapted": frozenset(name for name, _ in found),
        "adapter_rank": max((p.shape[0] for _, p in found), default=0),
        "adapters_per_layer": round(len(found) / len(layers)),
        "adapter_inputs": round(sum(p.shape[1] for _, p in found) / len(layers)),
        "other_adapter_inputs": round(other / len(layers)),
    }


def shape_of(model: nn.Module) -> ModelShape:
    """Returns the sizes of a causal language model, with or without adapters, before it is sharded.
    The model may be on the meta device."""
    inner, layers = causal_lm(model), decoder_layers(model)
    config = inner.config.get_text_config()
    num_heads = config.num_attention_heads if hasattr(config, "num_attention_heads") else 0
    num_keys = _first(config, ("num_key_value_heads",), num_heads)
    head_dim = _first(config, ("head_dim",), config.hidden_size // max(1, num_heads))
    if hasattr(config, "qk_nope_head_dim"):
        # DeepSeek's latent attention: a part of each head is rotated.
        head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
    # The sampler's own cache has one entry for each layer.
    caches = [c for c in DynamicCache(config=config).layers if isinstance(c, CacheLayerMixin)]
    is_peft = isinstance(model, PeftModel)
    num_adapter = sum(p.numel() for p in model.parameters() if p.requires_grad) if is_peft else 0
    # Layers may share weights: each is counted once.
    in_layers = {id(p): p.numel() for layer in layers for p in layer.parameters()}
    num_in_layers = sum(in_layers.values()) - num_adapter
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    intermediate, idle = _experts(config, layers)
    return ModelShape(
        num_layers=len(layers),
        num_attention=len(caches),
        windows=tuple(getattr(cache, "sliding_window", None) for cache in caches),
        hidden=config.hidden_size,
        intermediate=intermediate,
        queries=num_heads * head_dim,
        keys=num_keys * head_dim,
        num_heads=num_heads,
        recurrent=_recurrent_width(config, layers),
        state_elements=_states(layers),
        num_head_rows=lm_head_weight(model).shape[0],
        norms_heads=any(n.endswith("q_norm") for layer in layers for n, _ in layer.named_modules()),
        tied=inner.get_input_embeddings().weight is lm_head_weight(model),
        layer_parameters=num_in_layers,
        active_parameters=num_in_layers - idle,
        root_parameters=sum(p.numel() for p in model.parameters()) - num_in_layers - num_adapter,
        adapter_parameters=num_adapter,
        trained_parameters=sum(trained),
        largest_trained=max(trained, default=0),
        **_adapters(layers),
    )
