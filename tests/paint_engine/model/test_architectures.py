"""Training on other architectures: the padded pass, and which models may be packed."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from paint_engine.model.attention import adopt_attention, choose_attention
from paint_engine.model.forward import hidden_states
from paint_engine.model.packing import pack_sequences
from paint_engine.types import TrainExample

Build = Callable[..., PreTrainedModel]
ATTENTION = ("Qwen3Moe", "Mistral", "Gemma2", "Gemma3", "Phi3", "Cohere2", "GPT2")
RECURRENT = (
    "Qwen3_5Text",
    "Qwen3Next",
    "FalconH1",
    "Bamba",
    "Jamba",
    "Zamba2",
    "GraniteMoeHybrid",
    "Lfm2",
    "NemotronH",
    "RecurrentGemma",
    "Mamba",
    "Mamba2",
)


@pytest.mark.parametrize("name", [*ATTENTION, *RECURRENT])
def test_a_padded_row_is_its_sequence_alone(
    name: str,
    small_model: Build,
    ragged: list[TrainExample],
    states_alone: Callable[[nn.Module, Sequence[TrainExample]], Tensor],
    gradients: Callable[[nn.Module, Tensor], Tensor],
    relative_error: Callable[[Tensor, Tensor], float],
) -> None:
    model = small_model(name).train()
    packed = pack_sequences(
        [e.rollout.prompt_ids for e in ragged], [e.rollout.completion_ids for e in ragged]
    )
    states = hidden_states(model, packed, attention="padded")
    expected = states_alone(model, ragged)
    assert relative_error(states, expected) < 3e-6
    assert relative_error(gradients(model, states), gradients(model, expected)) < 3e-5


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers_are_not_packed(name: str, small_model: Build) -> None:
    model = small_model(name)
    assert choose_attention(model, "auto", torch.device("cpu"), torch.float32) == "padded"
    for attention in ("packed", "varlen"):
        with pytest.raises(ValueError, match=r"mix packed .*; use --model\.attention padded"):
            adopt_attention(model, attention)


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_is_packed(
    name: str,
    small_model: Build,
    ragged: list[TrainExample],
    states_alone: Callable[[nn.Module, Sequence[TrainExample]], Tensor],
    relative_error: Callable[[Tensor, Tensor], float],
) -> None:
    model = small_model(name)
    assert choose_attention(model, "packed", torch.device("cpu"), torch.float32) == "packed"
    packed = pack_sequences(
        [e.rollout.prompt_ids for e in ragged], [e.rollout.completion_ids for e in ragged]
    )
    with torch.no_grad():
        states = hidden_states(model, packed, attention="packed")
        assert relative_error(states, states_alone(model, ragged)) < 3e-6


def test_a_model_that_does_not_read_positions_is_not_packed(small_model: Build) -> None:
    with pytest.raises(ValueError, match="MptForCausalLM does not tell packed sequences apart"):
        adopt_attention(small_model("Mpt"), "packed")


def test_attention_with_a_softcap_gets_no_kernel_without(small_model: Build) -> None:
    with pytest.raises(ValueError, match="Gemma2ForCausalLM is not PyTorch's scaled dot product"):
        adopt_attention(small_model("Gemma2"), "varlen")
