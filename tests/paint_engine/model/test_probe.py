"""Our logits are the model's own, or the model is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Cohere2Config,
    FalconH1Config,
    Gemma2Config,
    GPTJConfig,
    GraniteConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)
from transformers.models.auto import AutoModelForCausalLM

from paint_engine.model.forward import hidden_states, lm_head_weight
from paint_engine.model.packing import pack_sequences
from paint_engine.model.probe import (
    HeadFunction,
    check_forward,
    head_function,
    logit_scale,
    set_logit_scale,
)

SHAPE: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
MAMBA: dict[str, Any] = {
    "mamba_d_ssm": 32,
    "mamba_n_heads": 2,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}


def build(config: PreTrainedConfig, device: str = "cpu") -> PreTrainedModel:
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config).eval()


SCALED = {
    "qwen3": (Qwen3Config(**SHAPE), 1.0),
    "granite": (GraniteConfig(**SHAPE, logits_scaling=8.0), 1 / 8),
    "cohere2": (Cohere2Config(**SHAPE, logit_scale=0.0625), 0.0625),
    "falcon_h1": (FalconH1Config(**SHAPE, **MAMBA, lm_head_multiplier=0.013), 0.013),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", SCALED)
def test_the_scale_is_found_without_its_name(name: str, device: str) -> None:
    config, scale = SCALED[name]
    model = build(config, device)
    head, backbone = model.get_output_embeddings(), model.base_model
    assert logit_scale(model, name) == pytest.approx(scale, rel=1e-6)
    # The model is as it was.
    assert model.get_output_embeddings() is head and model.base_model is backbone


@pytest.mark.parametrize("name", SCALED)
def test_hidden_states_times_the_head_are_the_model_s_logits(name: str) -> None:
    config, _ = SCALED[name]
    model = build(config)
    set_logit_scale(model, name)
    check_forward(model, "padded", name)
    ids = list(range(3, 15))
    states = hidden_states(model, pack_sequences([ids[:1]], [ids[1:]]), attention="padded")
    expected = model(torch.tensor([ids]), use_cache=False).logits[0, :-1]
    found = states @ lm_head_weight(model).T
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_cap_is_refused_even_where_no_logit_reaches_it() -> None:
    for cap in (30.0, 200.0):
        model = build(Gemma2Config(**SHAPE, final_logit_softcapping=cap), "meta")
        with pytest.raises(ValueError, match=r"the student: its logits are not .*a cap"):
            logit_scale(model, "the student")
    plain = build(Gemma2Config(**SHAPE, final_logit_softcapping=None), "meta")
    assert logit_scale(plain, "the student") == 1.0


def test_a_bias_is_refused() -> None:
    config = GPTJConfig(vocab_size=48, n_embd=32, n_layer=1, n_head=2, rotary_dim=8)
    model = build(config)
    assert model.get_output_embeddings().bias is not None
    with pytest.raises(ValueError, match="probably by a bias"):
        logit_scale(model, "gptj")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_scale_cap_and_bias_are_found(device: str) -> None:
    config, scale = SCALED["cohere2"]
    found = head_function(build(config, device), "cohere2")
    assert found.softcap is None and found.scale == pytest.approx(scale, rel=1e-6)
    for cap in (30.0, 200.0, None):
        model = build(Gemma2Config(**SHAPE, final_logit_softcapping=cap), device)
        assert head_function(model, "gemma2") == HeadFunction(1.0, cap)
    gptj = GPTJConfig(vocab_size=48, n_embd=32, n_layer=1, n_head=2, rotary_dim=8)
    assert head_function(build(gptj, device), "gptj") == HeadFunction(1.0, None)


def test_a_cap_that_is_not_applied_is_refused() -> None:
    model = build(LlamaConfig(**SHAPE))
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match=r"a scale and final_logit_softcapping 30\.0"):
        head_function(model, "llama")


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda own: lambda *a, **k: {}["logits"], "from its backbone's output and its head"),
        (lambda own: lambda *a, **k: _shifted(own(*a, **k)), "its logits are not"),
    ],
)
def test_an_own_forward_that_does_more_is_refused(
    forward: Callable[[Any], Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(LlamaConfig(**SHAPE))
    monkeypatch.setattr(type(model), "forward", forward(type(model).forward))
    for function in (logit_scale, head_function):
        with pytest.raises(ValueError, match=message):
            function(model, "llama")


def _shifted(output: Any) -> Any:
    output.logits = output.logits + 0.01
    return output


def test_a_head_that_is_no_linear_layer_is_refused() -> None:
    model = build(LlamaConfig(**SHAPE))
    model.set_output_embeddings(nn.Sequential(model.get_output_embeddings()))
    with pytest.raises(ValueError, match="a head of type Sequential; needs a linear layer"):
        logit_scale(model, "llama")


def test_a_pass_that_differs_from_the_model_s_own_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build(Qwen3Config(**SHAPE))
    check_forward(model, "padded", "qwen3")

    def wrong(*args: Any, **kwargs: Any) -> Tensor:
        return 1.001 * hidden_states(*args, **kwargs)

    monkeypatch.setattr("paint_engine.model.probe.hidden_states", wrong)
    with pytest.raises(ValueError, match=r"qwen3: with padded attention, .* by 1\.0e-03 of"):
        check_forward(model, "padded", "qwen3")
