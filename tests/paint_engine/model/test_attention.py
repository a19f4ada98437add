"""Which attention runs, on which model, and that everything but a packed pass is left alone; on a
GPU, the kernels themselves."""

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.attention.varlen import varlen_attn
from transformers import AutoModelForCausalLM, PreTrainedModel

from paint_engine.model import attention
from paint_engine.model.attention import (
    adopt_attention,
    choose_attention,
    packed_arguments,
    pick_attention,
)
from paint_engine.model.forward import causal_lm, hidden_states
from paint_engine.model.packing import batch_to, build_batch
from paint_engine.rollout.builtin import generate
from paint_engine.rollout.engine import SamplingParams
from paint_engine.types import PackedSequences, TrainExample

CPU, GPU = torch.device("cpu"), torch.device("cuda")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_a_model_that_loses_the_bounds_fails_in_place_of_leaking(
    base: PreTrainedModel, ragged: list[TrainExample]
) -> None:
    arguments = packed_arguments(build_batch(ragged).student, "varlen")
    # SDPA, which was not told about packing; then a model that drops the argument on the way.
    with pytest.raises(RuntimeError, match="size"):
        base.base_model(**arguments)
    adopt_attention(base, "varlen")
    del arguments["packing"]
    with pytest.raises(RuntimeError, match="size"):
        base.base_model(**arguments)


def test_everything_else_is_sdpa_as_before(
    base: PreTrainedModel, ragged: list[TrainExample]
) -> None:
    sequences = build_batch(ragged).teacher
    params = SamplingParams(
        max_new_tokens=9,
        temperature=1.0,
        top_p=0.95,
        top_k=20,
        stop_token_ids=(2,),
        vocab_size=340,
    )
    prompts = [item.rollout.prompt_ids for item in ragged]

    def run() -> tuple[list[object], list[Tensor]]:
        with torch.no_grad():
            states = [hidden_states(base, sequences, attention=a) for a in ("packed", "padded")]
        sampled = generate(base, prompts, [1, 2, 3, 4], params, max_sequences=3)
        return list(sampled), states

    sampled, states = run()
    adopt_attention(base, "varlen")
    sampled_after, states_after = run()
    # Cache, left padding and masks: to the bit.
    assert sampled_after == sampled
    assert all(map(torch.equal, states_after, states))


def test_the_installed_operator_has_the_arguments_that_are_passed() -> None:
    flag = attention._gqa_flag(varlen_attn)
    rows = (torch.empty(6, 4, 8), torch.empty(6, 2, 8), torch.empty(6, 2, 8))
    bounds = torch.tensor([0, 4, 6], dtype=torch.int32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        out = varlen_attn(*rows, bounds, bounds, 4, 4, scale=0.3, window_size=(-1, 0), **flag)
    assert isinstance(out, Tensor)
    assert out.shape == (6, 4, 8)


def test_torchs_own_operator_takes_the_call_and_nothing_waits_for_the_device(
    base: PreTrainedModel, ragged: list[TrainExample]
) -> None:
    """Schema, shapes and autograd of the operator itself, on tensors without data: reading one of
    their values, as a wait for the device does, raises."""
    adopt_attention(base, "varlen")
    arguments = packed_arguments(build_batch(ragged).student, "varlen")
    num_tokens = arguments["input_ids"].shape[1]
    with FakeTensorMode() as mode:
        packing = arguments["packing"]
        arguments = {
            name: mode.from_tensor(value) if isinstance(value, Tensor) else value
            for name, value in arguments.items()
        }
        bounds = mode.from_tensor(packing.cu_seqlens)
        with pytest.raises(DataDependentOutputException):
            bounds.max().item()
        arguments["packing"] = replace(packing, cu_seqlens=bounds)
        model = AutoModelForCausalLM.from_config(base.config, dtype=torch.bfloat16)
        states = model.base_model(**arguments).last_hidden_state
        assert states.shape == (1, num_tokens, 32)
        assert states.dtype == torch.bfloat16
        states.sum().backward()
        gradient = model.get_parameter("model.layers.0.self_attn.k_proj.weight").grad
        assert gradient is not None and gradient.shape == (16, 32)


def test_the_config_of_a_saved_model_does_not_name_our_attention(
    base: PreTrainedModel, tmp_path: Path
) -> None:
    adopt_attention(base, "varlen")
    base.save_pretrained(tmp_path)
    assert attention.IMPLEMENTATION not in (tmp_path / "config.json").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "qwen3"


@pytest.mark.parametrize("name", ["packed", "varlen", "flash_attention_2"])
def test_layers_that_do_not_keep_sequences_apart_are_refused(
    name: str, base: PreTrainedModel
) -> None:
    base.config.layer_types = ["linear_attention", "full_attention"]
    adopt_attention(base, "padded")
    with pytest.raises(ValueError, match=r"linear_attention.*--model\.attention padded"):
        adopt_attention(base, name)


def test_dropout_in_the_attention_is_refused(base: PreTrainedModel) -> None:
    base.config.attention_dropout = 0.1
    adopt_attention(base, "packed")
    with pytest.raises(ValueError, match=r"attention_dropout is 0\.1; set it to 0"):
        adopt_attention(base, "varlen")


def test_a_model_with_attention_of_its_own_is_refused(
    base: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(base), "_can_set_attn_implementation", classmethod(lambda cls: False))
    with pytest.raises(ValueError, match=r"Qwen3ForCausalLM does not.*--model\.attention padded"):
        adopt_attention(base, "varlen")


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A GPU of some capability, with or without flash-attn."""

    def pretend(capability: tuple[int, int] = (9, 0), *, flash: bool = True) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
        monkeypatch.setattr(attention, "find_spec", lambda name: object() if flash else None)

    return pretend


@pytest.mark.parametrize(
    ("name", "device", "dtype", "picked"),
    [
        ("auto", CPU, torch.float32, "padded"),
        ("auto", CPU, torch.bfloat16, "padded"),
        ("auto", GPU, torch.float32, "padded"),
        ("auto", GPU, torch.bfloat16, "varlen"),
        ("auto", GPU, torch.float16, "varlen"),
        ("padded", GPU, torch.bfloat16, "padded"),
        ("packed", CPU, torch.float32, "packed"),
        ("varlen", GPU, torch.bfloat16, "varlen"),
        ("flash_attention_2", GPU, torch.float16, "flash_attention_2"),
    ],
)
def test_what_is_picked(
    name: str, device: torch.device, dtype: torch.dtype, picked: str, pretend: Callable[..., None]
) -> None:
    pretend()
    assert pick_attention(name, device, dtype) == picked


@pytest.mark.parametrize("name", ["varlen", "flash_attention_2"])
@pytest.mark.parametrize(
    ("device", "dtype", "capability", "message"),
    [
        (CPU, torch.bfloat16, (9, 0), r"needs a GPU, but the device is cpu; .*auto or padded"),
        (GPU, torch.float32, (9, 0), r"computes in float32; use --model\.dtype bfloat16"),
        (GPU, torch.float16, (7, 5), r"8\.0 .*but this is Tesla T4; .*auto or padded"),
    ],
)
def test_what_cannot_run_is_refused(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    capability: tuple[int, int],
    message: str,
    pretend: Callable[..., None],
) -> None:
    pretend(capability)
    with pytest.raises(ValueError, match=message) as caught:
        pick_attention(name, device, dtype)
    assert repr(name) in str(caught.value)


def test_auto_on_an_older_gpu_is_padded_and_flash_needs_its_package(
    pretend: Callable[..., None],
) -> None:
    pretend((7, 5))
    assert pick_attention("auto", GPU, torch.float16) == "padded"
    pretend(flash=False)
    with pytest.raises(ValueError, match=r"'\.\[flash\]' in.*--model\.attention varlen"):
        pick_attention("flash_attention_2", GPU, torch.bfloat16)


@pytest.fixture
def no_waits() -> Iterator[None]:
    """Any wait of the host for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def _long(examples: Callable[..., list[TrainExample]]) -> list[TrainExample]:
    """Lengths on both sides of the kernels' blocks of 64 and 128 tokens."""
    return examples((5, 1, 130, 64), (11, 4, 1, 300), (4, 127, 200, 64))


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["varlen", "flash_attention_2"])
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_kernels_on_a_gpu_are_as_accurate_as_padded_rows(
    kernel: str,
    role: str,
    lora_model: PeftModel,
    examples: Callable[..., list[TrainExample]],
    relative_error: Callable[[Tensor, Tensor], float],
    gradients,
) -> None:
    if kernel == "flash_attention_2" and find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed")
    batch = build_batch(_long(examples))
    sequences: PackedSequences = getattr(batch, role)
    # The same rounded weights in both: the reference differs by the arithmetic alone.
    nn.Module.to(lora_model, torch.bfloat16)
    exact = deepcopy(lora_model)
    nn.Module.to(exact, torch.float64)
    expected = hidden_states(exact, sequences, attention="padded")
    expected_gradients = gradients(exact, expected)

    nn.Module.to(lora_model, GPU)
    adopt_attention(causal_lm(lora_model), pick_attention(kernel, GPU, torch.bfloat16))
    there: PackedSequences = getattr(batch_to(batch, GPU), role)
    errors = {}
    for name in ("padded", kernel):
        states = hidden_states(lora_model, there, attention=name)
        states_error = relative_error(states.detach().cpu().double(), expected)
        grads = gradients(lora_model, states).cpu().double()
        errors[name] = states_error, relative_error(grads, expected_gradients)
    for packed, padded in zip(errors[kernel], errors["padded"], strict=True):
        # Rounding to bfloat16 moves them by about 2e-2, a leak moves gradients by their own size.
        assert packed < 1.5 * padded + 1e-3, errors


@needs_gpu
@pytest.mark.gpu
def test_a_packed_pass_on_a_gpu_waits_for_nothing(
    lora_model: PeftModel, examples: Callable[..., list[TrainExample]], request
) -> None:
    nn.Module.to(lora_model, torch.bfloat16)
    nn.Module.to(lora_model, GPU)
    adopt_attention(causal_lm(lora_model), "varlen")
    there = batch_to(build_batch(_long(examples)), GPU).student
    hidden_states(lora_model, there, attention="varlen").sum().backward()
    request.getfixturevalue("no_waits")
    hidden_states(lora_model, there, attention="varlen").sum().backward()


def test_auto_pads_where_a_model_cannot_be_packed(
    base: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paint_engine.model.attention._usable", lambda device, dtype: True)
    gpu = torch.device("cuda")
    base.config.attention_dropout = 0.1
    assert choose_attention(base, "auto", gpu, torch.bfloat16) == "padded"
    with pytest.raises(ValueError, match=r"attention_dropout is 0\.1"):
        choose_attention(base, "varlen", gpu, torch.bfloat16)
    base.config.attention_dropout = 0.0
    assert choose_attention(base, "auto", gpu, torch.bfloat16) == "varlen"
