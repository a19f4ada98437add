"""The built-in sampler on other architectures: recurrent layers, sliding windows, experts, and
caches that it cannot use."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from paint_engine.model.forward import hidden_states
from paint_engine.model.packing import pack_sequences
from paint_engine.monitor import NotFinite
from paint_engine.rollout import builtin
from paint_engine.rollout.builtin import BuiltinEngine, generate
from paint_engine.rollout.engine import Completion, SamplingParams

# So many stops that rows finish at different lengths and the batch is compacted.
PARAMS = SamplingParams(1.0, 1.0, -1, 20, tuple(range(0, 340, 17)), 340)
PROMPTS = [tuple(range(7, 7 + length)) for length in (3, 11, 5, 5, 14, 1)]
SEEDS = list(range(len(PROMPTS)))

Build = Callable[..., PreTrainedModel]
ARCHITECTURES = (
    "Qwen2",
    "Qwen3Moe",
    "Qwen3_5Text",
    "Qwen3Next",
    "Mistral",
    "Gemma2",
    "Gemma3Text",
    "Gemma3",
    "Phi3",
    "Cohere2",
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
    "GPT2",
)


def _trained_logprobs(
    model: PreTrainedModel, completions: list[Completion]
) -> list[tuple[float, ...]]:
    """Log-probabilities of the completions in the padded pass of training."""
    packed = pack_sequences(PROMPTS, [c.token_ids for c in completions])
    head = model.get_output_embeddings()
    assert head is not None
    with torch.no_grad():
        logits = head(hidden_states(model, packed, attention="padded"))
    tokens = torch.tensor([token for c in completions for token in c.token_ids])
    logprobs = logits.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    lengths = [len(completion.token_ids) for completion in completions]
    return [tuple(part.tolist()) for part in logprobs.split(lengths)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_completion_is_that_of_its_prompt_alone(name: str, small_model: Build) -> None:
    model = small_model(name)
    together = generate(model, PROMPTS, SEEDS, PARAMS, max_sequences=len(PROMPTS))
    assert len({len(c.token_ids) for c in together}) > 2
    for prompt, seed, completion in zip(PROMPTS, SEEDS, together, strict=True):
        (alone,) = generate(model, [prompt], [seed], PARAMS, max_sequences=1)
        assert completion.token_ids == alone.token_ids
        assert completion.logprobs == pytest.approx(alone.logprobs, abs=1e-5)
    for completion, logprobs in zip(together, _trained_logprobs(model, together), strict=True):
        assert completion.logprobs == pytest.approx(logprobs, abs=1e-5)


@pytest.mark.parametrize(("name", "independent"), [("RecurrentGemma", False), ("Bamba", True)])
def test_rows_share_a_batch_only_where_the_model_keeps_them_apart(
    name: str, independent: bool, small_model: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sizes = small_model(name), []

    def on_batch(indices: list[int], completions: list[Completion]) -> None:
        sizes.append(len(indices))

    chosen = generate(model, PROMPTS, SEEDS, PARAMS, max_sequences=8, on_batch=on_batch)
    assert sizes == ([6] if independent else [1] * 6)
    monkeypatch.setattr(model, builtin._INDEPENDENT, True)
    together = generate(model, PROMPTS, SEEDS, PARAMS, max_sequences=8)
    # The tests above would see rows that depend on each other.
    assert ([c.token_ids for c in chosen] == [c.token_ids for c in together]) == independent


@pytest.mark.parametrize("name", ["Qwen3", "Qwen3_5Text", "Qwen3Moe", "Mamba2"])
def test_rounding_is_not_taken_for_dependent_rows(name: str, small_model: Build) -> None:
    for num_layers in (4, 8):
        model = small_model(name, num_hidden_layers=num_layers)
        torch.nn.Module.to(model, torch.bfloat16)
        generate(model, PROMPTS[:1], SEEDS[:1], PARAMS, max_sequences=1)
        assert getattr(model, builtin._INDEPENDENT)


def test_a_cache_of_another_kind_is_refused_before_training(small_model: Build) -> None:
    model = small_model("Rwkv")
    with pytest.raises(ValueError, match=r"RwkvForCausalLM.*DynamicCache.*--rollout\.engine vllm"):
        BuiltinEngine(model, lambda: pytest.fail("no base is asked for"), 8)


def test_states_that_are_not_finite_are_refused(small_model: Build) -> None:
    model = small_model("Qwen3")
    model.get_parameter("model.norm.weight").data[3] = float("nan")
    with pytest.raises(NotFinite, match="Qwen3ForCausalLM whose hidden states are not finite"):
        generate(model, PROMPTS, SEEDS, PARAMS, max_sequences=4)


def test_a_cache_that_the_model_does_not_read_is_refused(
    small_model: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A forward pass that swallows an argument it does not know.
    monkeypatch.setattr(builtin, "_cache_argument", lambda model: "past_key_value_cache")
    model = small_model("Mamba")
    with pytest.raises(ValueError, match=r"MambaForCausalLM.*with a cache differ.*by 24%"):
        generate(model, PROMPTS, SEEDS, PARAMS, max_sequences=4)
