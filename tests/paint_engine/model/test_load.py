"""Loading, adapters and hidden states: packed = padded = alone, student and teacher aligned."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from paint_engine.config.sections import LoraSection, ModelSection
from paint_engine.model.forward import hidden_states, lm_head_weight, max_context
from paint_engine.model.load import load_base, pick_device
from paint_engine.model.lora import add_lora
from paint_engine.model.packing import build_batch, pack_sequences, pad_sequences
from paint_engine.model.tokenizer import load_tokenizer
from paint_engine.types import PackedSequences, TrainExample

CPU = torch.device("cpu")
# Float64 rounding, through two layers: far below what any leak or shift would cause.
TOLERANCE = 1e-12
# One that changes nothing but order passes at 1e-12; a leak moves states by more than this.
VISIBLE = 1e-2


@pytest.mark.parametrize("attention", ["packed", "padded"])
def test_states_and_gradients_equal_those_of_each_sequence_alone(
    attention: str,
    lora_model: PeftModel,
    ragged: list[TrainExample],
    relative_error,
    states_alone,
    gradients,
) -> None:
    expected = states_alone(lora_model, ragged)
    expected_gradients = gradients(lora_model, expected)
    states = hidden_states(lora_model, build_batch(ragged).student, attention=attention)
    assert relative_error(states, expected) < TOLERANCE
    assert relative_error(gradients(lora_model, states), expected_gradients) < TOLERANCE


def test_packed_equals_padded_in_float32(
    model_dir: Path, ragged: list[TrainExample], relative_error
) -> None:
    model = load_base(ModelSection(name_or_path=str(model_dir), dtype="float32"), CPU)
    sequences = build_batch(ragged).teacher
    with torch.no_grad():
        packed, padded = (
            hidden_states(model, sequences, attention=kind) for kind in ("packed", "padded")
        )
    assert packed.dtype == torch.float32
    assert relative_error(packed, padded) < 1e-6


@pytest.mark.parametrize("leak", [{"use_cache": True}, {"attention_mask": "ones"}])
def test_the_comparison_would_catch_sequences_that_see_each_other(
    leak: dict[str, object],
    base: PreTrainedModel,
    ragged: list[TrainExample],
    relative_error: Callable[[Tensor, Tensor], float],
    states_alone,
) -> None:
    sequences = build_batch(ragged).student
    arguments: dict[str, object] = {"use_cache": False} | leak
    if "attention_mask" in leak:
        arguments["attention_mask"] = torch.ones_like(sequences.token_ids)[None]
    with torch.no_grad():
        leaking = base.base_model(
            input_ids=sequences.token_ids[None],
            position_ids=sequences.position_ids[None],
            **arguments,
        ).last_hidden_state[0, sequences.loss_positions]
        assert relative_error(leaking, states_alone(base, ragged)) > VISIBLE


@pytest.mark.parametrize("attention", ["packed", "padded"])
def test_one_rollout_does_not_depend_on_another(
    attention: str, base: PreTrainedModel, examples: Callable[..., list[TrainExample]]
) -> None:
    first, second = examples((4, 6), (5, 7), (5, 9))
    (other,) = examples((6,), (7,), (9,), seed=9)
    with torch.no_grad():
        states = [
            hidden_states(base, build_batch([first, neighbour]).student, attention=attention)[:5]
            for neighbour in (second, other)
        ]
    assert torch.allclose(states[0], states[1], rtol=0, atol=1e-13)


@pytest.mark.parametrize("attention", ["packed", "padded"])
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_row_n_is_the_state_that_predicts_completion_token_n(
    role: str,
    attention: str,
    base: PreTrainedModel,
    ragged: list[TrainExample],
    naive_logits: Callable[[PreTrainedModel, Sequence[int]], Tensor],
) -> None:
    batch = build_batch(ragged)
    sequences: PackedSequences = getattr(batch, role)
    with torch.no_grad():
        states = hidden_states(base, sequences, attention=attention)
        log_p = torch.log_softmax(states @ lm_head_weight(base).T, dim=-1)
        rows = log_p.gather(1, batch.completion_ids[:, None])[:, 0]
        expected = []
        for item in ragged:
            prompt = item.rollout.prompt_ids if role == "student" else item.teacher_view.prompt_ids
            for i, token in enumerate(item.rollout.completion_ids):
                # Only what stands before the token: its own id cannot leak in.
                context = (*prompt, *item.rollout.completion_ids[:i])
                logits = naive_logits(base, context)[-1]
                expected.append(torch.log_softmax(logits, dim=-1)[token])
    assert torch.allclose(rows, torch.stack(expected), rtol=0, atol=1e-10)


@pytest.mark.parametrize("attention", ["packed", "padded"])
def test_no_token_is_masked_by_its_id(
    attention: str,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Callable[..., list[TrainExample]],
    relative_error: Callable[[Tensor, Tensor], float],
    states_alone,
) -> None:
    """Padding's id and the stop tokens', in prompts and amid completions, are tokens like others:
    the padding of a rectangle has the id 0."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    items = []
    for item, token in zip(examples((5, 2, 3), (1, 1, 1), (6, 9, 1)), ids, strict=True):
        (start, *prompt), (first, *rest) = item.rollout.prompt_ids, item.rollout.completion_ids
        rollout = replace(
            item.rollout,
            prompt_ids=(start, *(token for _ in prompt)),
            completion_ids=(first, *(token if i % 2 else ids[0] for i, _ in enumerate(rest))),
        )
        items.append(replace(item, rollout=rollout))
    sequences = build_batch(items).student
    with torch.no_grad():
        states = hidden_states(base, sequences, attention=attention)
        expected = states_alone(base, items)
        assert len(states) == 6 + 9 + 1
        assert relative_error(states, expected) < TOLERANCE
        padded = pad_sequences(sequences)
        by_id = base.base_model(
            input_ids=padded.token_ids,
            attention_mask=(padded.token_ids != ids[0]) & padded.mask,
            use_cache=False,
        ).last_hidden_state.flatten(0, 1)[padded.loss_positions]
    assert relative_error(by_id, expected) > VISIBLE


def test_a_shift_by_one_token_would_be_seen(
    base: PreTrainedModel, ragged: list[TrainExample]
) -> None:
    sequences = build_batch(ragged).student
    shifted = PackedSequences(
        sequences.token_ids,
        sequences.position_ids,
        sequences.cu_seqlens,
        sequences.loss_positions + 1,
    )
    with torch.no_grad():
        right = hidden_states(base, sequences, attention="padded")
        wrong = hidden_states(base, shifted, attention="padded")
    assert ((right - wrong).norm(dim=1) > VISIBLE * right.norm(dim=1)).all()


def test_an_empty_completion_adds_no_row(base: PreTrainedModel) -> None:
    sequences = pack_sequences([(5, 6), (7,), (8, 9)], [(1, 2), (), (3,)])
    with torch.no_grad():
        packed, padded = (
            hidden_states(base, sequences, attention=kind) for kind in ("packed", "padded")
        )
    assert packed.shape == (3, 32)
    assert torch.allclose(packed, padded, rtol=0, atol=1e-12)


def test_adapters_start_as_the_base_and_follow_the_seed(model_dir: Path) -> None:
    section = ModelSection(name_or_path=str(model_dir))
    weights = []
    for seed in (0, 0, 1):
        base = load_base(section, CPU)
        ids = torch.arange(20)[None]
        with torch.no_grad():
            before = base(input_ids=ids).logits
            model = add_lora(base, LoraSection(rank=4, alpha=8), seed)
            assert torch.equal(model(input_ids=ids).logits, before)
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert all("lora_" in name for name in trainable)
        # Two layers, seven linear maps in each, A and B.
        assert len(trainable) == 28
        weights.append(torch.cat([p.flatten() for p in trainable.values()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_adapters_stay_float32_on_a_bfloat16_base(model_dir: Path) -> None:
    section = ModelSection(name_or_path=str(model_dir), dtype="bfloat16")
    model = add_lora(load_base(section, CPU), LoraSection(rank=4, alpha=8), seed=0)
    dtypes = {("lora_" in name, p.dtype) for name, p in model.named_parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}


def test_without_lora_everything_trains(base: PreTrainedModel) -> None:
    model = add_lora(base, LoraSection(enabled=False), seed=0)
    assert model is base
    assert all(p.requires_grad for p in model.parameters())


def test_the_head_is_found_tied_untied_and_under_adapters(
    base: PreTrainedModel, untied_model_dir: Path
) -> None:
    embeddings = base.get_input_embeddings().weight
    assert lm_head_weight(base) is embeddings
    untied = load_base(ModelSection(name_or_path=str(untied_model_dir)), CPU)
    assert lm_head_weight(untied) is dict(untied.named_parameters())["lm_head.weight"]
    assert lm_head_weight(untied) is not untied.get_input_embeddings().weight
    assert lm_head_weight(add_lora(base, LoraSection(rank=4, alpha=8), 0)) is embeddings
    assert max_context(base) == 1024


@pytest.mark.parametrize(
    ("missing", "needed"),
    [
        ("config.json", "has no config.json"),
        ("tokenizer.json", "has no tokenizer"),
        ("model.safetensors", "has no weights in safetensors"),
    ],
)
def test_a_model_directory_that_lacks_a_part_says_which(
    missing: str, needed: str, model_dir: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(model_dir, directory)
    (directory / missing).unlink()
    section = ModelSection(name_or_path=str(directory))
    with pytest.raises(ValueError, match=needed) as caught:
        load_tokenizer(section)
        load_base(section, CPU)
    message = str(caught.value)
    # What came, and what to do.
    assert str(directory) in message
    assert "generation_config.json" in message
    assert "--model.name_or_path" in message


@pytest.mark.parametrize("whole", [True, False])
def test_an_adapter_is_not_taken_for_a_model(whole: bool, model_dir: Path, tmp_path: Path) -> None:
    """Beside a model's files transformers loads it silently, and the base would be another."""
    directory = tmp_path / "model"
    if whole:
        shutil.copytree(model_dir, directory)
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_text("{}")
    for load in (load_tokenizer, lambda section: load_base(section, CPU)):
        with pytest.raises(ValueError, match=r"holds an adapter .*; needs a whole model; merge it"):
            load(ModelSection(name_or_path=str(directory)))


def test_a_tokenizer_without_a_chat_template_is_refused(model_dir: Path, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(model_dir, directory)
    (directory / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"no chat template.*instruct model"):
        load_tokenizer(ModelSection(name_or_path=str(directory)))


def test_a_damaged_config_is_named_and_not_taken_for_a_hub_id(
    model_dir: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(model_dir, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config)[:-20])
    with pytest.raises(ValueError, match=r"config.*damaged") as caught:
        load_base(ModelSection(name_or_path=str(directory)), CPU)
    assert "hub" not in str(caught.value)


def test_truncated_weights_get_a_message(model_dir: Path, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(model_dir, directory)
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="file in that directory is damaged"):
        load_base(ModelSection(name_or_path=str(directory)), CPU)


def test_cuda_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"--train\.device cpu"):
        pick_device("cuda")
    assert pick_device("auto") == CPU
