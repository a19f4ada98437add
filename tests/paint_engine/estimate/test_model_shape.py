"""The sizes of many architectures, against the models' own parameters and caches."""

from collections.abc import Callable

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from paint_engine.config.sections import LoraSection
from paint_engine.estimate.arithmetic import sampling_flops
from paint_engine.estimate.model_shape import shape_of
from paint_engine.model.lora import add_lora

Build = Callable[..., PreTrainedModel]
ARCHITECTURES = (
    *("Qwen2", "Qwen3", "Qwen3Moe", "Qwen3_5Text", "Qwen3Next", "Llama", "Mistral", "Gemma2"),
    *("Gemma3", "Phi3", "Granite", "Cohere2", "FalconH1", "Bamba", "Jamba", "Zamba2"),
    *("GraniteMoeHybrid", "Lfm2", "NemotronH", "Mamba", "Mamba2", "GPT2"),
)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameters_are_those_of_the_model(name: str, small_model: Build) -> None:
    total = small_model(name).num_parameters()
    for lora in (True, False):
        section = LoraSection(enabled=lora, rank=3)
        with torch.device("meta"):
            model = add_lora(small_model(name), section, seed=0)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        shape = shape_of(model)
        assert shape.base_parameters == total
        assert shape.trained_parameters == trained
        assert shape.adapter_parameters == trained * lora
        decoder = small_model(name).get_decoder()
        assert shape.num_layers == decoder.config.num_hidden_layers
        assert 0 < shape.active_parameters <= shape.layer_parameters < total


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_cache_is_that_of_the_model(name: str, small_model: Build) -> None:
    model, num_tokens = small_model(name), 11
    shape, cache = shape_of(model), DynamicCache(config=model.config)
    argument = "cache_params" if name in ("Mamba", "Mamba2") else "past_key_values"
    ids = torch.arange(num_tokens)[None]
    with torch.no_grad():
        model.base_model(input_ids=ids, use_cache=True, **{argument: cache})
    keys, states = 0, 0
    for layer in cache.layers:
        if isinstance(layer, CacheLayerMixin) and layer.keys is not None:
            assert layer.values is not None and layer.values.shape == layer.keys.shape
            keys += layer.keys.numel()
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            held = (*layer.conv_states.values(), *layer.recurrent_states.values())
            states += sum(tensor.numel() for tensor in held if tensor is not None)
    # A window's cache lacks the token that comes next.
    cached = sum(min(num_tokens, window - 1 if window else num_tokens) for window in shape.windows)
    assert keys == cached * shape.keys
    assert states == shape.state_elements


def test_experts_that_a_token_does_not_pass_are_not_counted_as_work(small_model: Build) -> None:
    model = small_model("Qwen3Moe")
    shape = shape_of(model)
    # Two of four experts, each of three matrices of 16 x 32, in both layers.
    assert shape.layer_parameters - shape.active_parameters == 2 * 2 * 3 * 16 * 32
    assert shape.intermediate == 2 * 16
    products = 2 * 10 * (shape.active_parameters + 340 * 32)
    assert sampling_flops(shape, 0, 10) == pytest.approx(products + 2 * 2 * 32 * 10**2)
