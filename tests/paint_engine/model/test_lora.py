"""Which layers get adapters, on many architectures, and what is refused."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from paint_engine.checkpoint.merge import Survival, merge_adapter
from paint_engine.checkpoint.weights import gather_weights, write_weights
from paint_engine.config.sections import LoraSection
from paint_engine.model.forward import hidden_states
from paint_engine.model.lora import add_lora
from paint_engine.model.packing import pack_sequences
from paint_engine.types import TrainExample

Build = Callable[..., PreTrainedModel]
PAPER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# By hand, from each architecture's definition.
ALL_LINEAR = {
    "Qwen3": set(PAPER),
    "Llama": set(PAPER),
    "Gemma3": set(PAPER),
    "Phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    "Qwen3Moe": {"q_proj", "k_proj", "v_proj", "o_proj"},
    # Without the shared expert, whose names peft takes for those of the experts.
    "Qwen3Next": {
        *("q_proj", "k_proj", "v_proj", "o_proj", "shared_expert_gate"),
        *("in_proj_qkvz", "in_proj_ba", "out_proj"),
    },
    "Qwen3_5Text": {
        *PAPER,
        *("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"),
    },
    "FalconH1": {*PAPER, "in_proj"},
    "Lfm2": {"q_proj", "k_proj", "v_proj", "out_proj", "in_proj", "w1", "w2", "w3"},
    "Jamba": {*PAPER, "in_proj"},
    "Mamba": {"in_proj"},
    "GPT2": {"c_attn", "c_proj", "c_fc"},
}


def _adapted(model: PeftModel) -> list[str]:
    return [n.partition(".lora_A")[0] for n, _ in model.named_parameters() if ".lora_A." in n]


def _add(model: PreTrainedModel, names: Sequence[str] = ("all-linear",)) -> PeftModel:
    adapted = add_lora(model, LoraSection(rank=2, alpha=4, target_modules=tuple(names)), seed=0)
    assert isinstance(adapted, PeftModel)
    return adapted


@pytest.mark.parametrize("name", ALL_LINEAR)
def test_all_linear_layers_of_the_decoder_are_adapted_and_trained(
    name: str, small_model: Build, ragged: list[TrainExample]
) -> None:
    model = _add(small_model(name)).train()
    adapted = _adapted(model)
    assert {layer.rpartition(".")[2] for layer in adapted} == ALL_LINEAR[name]
    assert not any("vision" in layer or "lm_head" in layer for layer in adapted)
    packed = pack_sequences(
        [e.rollout.prompt_ids for e in ragged], [e.rollout.completion_ids for e in ragged]
    )
    hidden_states(model, packed, attention="padded").pow(3).sum().backward()
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(adapted)
    for parameter, gradient in trained.items():
        assert gradient is not None, parameter
        assert (".lora_A." in parameter) or gradient.any(), parameter


@pytest.mark.parametrize("name", ["Qwen3_5Text", "Qwen3Moe", "Gemma3", "Phi3", "FalconH1", "Mamba"])
def test_an_export_is_the_adapted_model(name: str, small_model: Build, tmp_path: Path) -> None:
    model = _add(small_model(name))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    write_weights(model, gather_weights(model), tmp_path)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        merged = merge_adapter(small_model(name), tmp_path, [Survival(torch.float32)])
        loaded = PeftModel.from_pretrained(small_model(name), str(tmp_path))
        expected = model(input_ids=ids, use_cache=False).logits
        base = small_model(name)(input_ids=ids, use_cache=False).logits
        for other in (merged, loaded):
            logits = other(input_ids=ids, use_cache=False).logits
            assert torch.allclose(logits, expected, atol=1e-5)
        assert not torch.allclose(base, expected, atol=1e-2)


def test_one_layer_can_be_named_in_full(small_model: Build) -> None:
    model = _add(small_model("Qwen3"), ["layers.1.self_attn.q_proj", "up_proj"])
    assert sorted(_adapted(model)) == [
        "base_model.model.model.layers.0.mlp.up_proj",
        "base_model.model.model.layers.1.mlp.up_proj",
        "base_model.model.model.layers.1.self_attn.q_proj",
    ]


@pytest.mark.parametrize(
    ("name", "targets", "said"),
    [
        (
            "Qwen3",
            ["q_proj", "nothing_like_it", "rojection"],
            ["got nothing_like_it, rojection, which", "gate_proj, k_proj", "all-linear"],
        ),
        ("Qwen3", ["mlp"], ["got mlp, which"]),
        ("Phi3", PAPER, ["got q_proj, k_proj, v_proj, gate_proj, up_proj, which", "qkv_proj"]),
        (
            "Qwen3Moe",
            PAPER,
            [
                "got gate_proj, up_proj, down_proj",
                "down_proj, gate_proj, up_proj stand for weights that are one tensor",
            ],
        ),
        ("Qwen3Moe", ["q_proj", "experts.gate_up_proj"], ["gate_up_proj stand for weights"]),
        ("Qwen3Next", ["q_proj", "shared_expert.up_proj"], [" up_proj stand for weights"]),
        ("FalconH1", ["q_proj", "out_proj"], ["got out_proj", "Mamba layers read out_proj past"]),
        # Only the vision tower has these.
        ("Gemma3", ["q_proj", "fc1"], ["got fc1, which"]),
        ("Gemma3", ["lm_head"], ["got lm_head, which holds the output head"]),
        ("Gemma3", ["embed_tokens"], ["got embed_tokens, which holds the output head"]),
    ],
)
def test_names_without_a_linear_layer_are_refused(
    name: str, targets: Sequence[str], said: Sequence[str], small_model: Build
) -> None:
    with pytest.raises(ValueError, match=r"^--lora\.target_modules: ") as refused:
        _add(small_model(name), targets)
    for text in said:
        assert text in str(refused.value)


def test_all_weights_are_those_that_text_passes(small_model: Build) -> None:
    model = small_model("Gemma3")
    assert add_lora(model, LoraSection(enabled=False), seed=0) is model
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(name.startswith("model.language_model.") for name in trained)
    assert trained == {n for n, _ in model.named_parameters() if "language_model" in n}
