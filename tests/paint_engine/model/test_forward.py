"""The context length that configurations give, and the layers of the text decoder."""

from collections.abc import Callable

import pytest
from transformers import PreTrainedModel

from paint_engine.model.forward import max_context
from paint_engine.model.sharding import decoder_layers

Build = Callable[..., PreTrainedModel]


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("Qwen3", {}, 512),
        # In the text part of a composite configuration.
        ("Gemma3", {}, 512),
        ("GPT2", {"n_positions": 96}, 96),
        ("Mpt", {"max_seq_len": 80}, 80),
        # Nothing looks back without a limit.
        ("Mamba", {}, 2**31 - 1),
        ("RecurrentGemma", {}, 2**31 - 1),
    ],
)
def test_the_context_is_that_of_the_text(
    name: str, settings: dict[str, int], expected: int, small_model: Build
) -> None:
    assert max_context(small_model(name, **settings)) == expected


def test_longrope_keeps_its_angles_within_the_original_context(small_model: Build) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    model = small_model("Phi3", rope_parameters=rope, original_max_position_embeddings=64)
    assert max_context(model) == 64


def test_a_configuration_without_a_context_is_refused(small_model: Build) -> None:
    model = small_model("Mpt", max_seq_len=0)
    with pytest.raises(ValueError, match=r"MptForCausalLM .* max_position_embeddings None; add"):
        max_context(model)


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        # No layer of the vision tower.
        ("Gemma3", ["Gemma3DecoderLayer"] * 2),
        ("Jamba", ["JambaMambaDecoderLayer", "JambaAttentionDecoderLayer"]),
        # Not the mixers inside, which transformers names beside the blocks.
        ("Mamba", ["MambaBlock"] * 2),
        ("Qwen3_5Text", ["Qwen3_5DecoderLayer"] * 4),
        ("GPT2", ["GPT2Block"] * 2),
    ],
)
def test_decoder_layers_are_those_of_the_text(
    name: str, classes: list[str], small_model: Build
) -> None:
    assert [type(layer).__name__ for layer in decoder_layers(small_model(name))] == classes


def test_a_decoder_without_its_list_of_layers_is_refused(small_model: Build) -> None:
    model = small_model("Qwen3")
    model.config.num_hidden_layers = 5
    with pytest.raises(ValueError, match="Qwen3ForCausalLM has no list of 5 layers"):
        decoder_layers(model)
