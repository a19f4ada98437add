"""Packed kernels around a reference in their place, which has their signatures and makes their
demands: every sequence comes out as it does alone."""

import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from paint_engine.config.sections import ModelSection
from paint_engine.model import attention
from paint_engine.model.attention import adopt_attention
from paint_engine.model.forward import causal_lm, hidden_states
from paint_engine.model.load import load_base
from paint_engine.model.packing import build_batch, pack_sequences
from paint_engine.model.sharding import checkpoint_activations, decoder_layers
from paint_engine.types import PackedSequences, TrainExample

# Float64 rounding through two layers; a leak between sequences moves states by more than VISIBLE.
TOLERANCE, VISIBLE = 1e-12, 1e-2


def reference_varlen(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scale: float, window: int
) -> Tensor:
    """Causal attention, sequence by sequence, on (M, heads, D): softmax(q k^T * scale) v.

    window: how many earlier tokens each one sees, -1 for all.
    """
    out = torch.empty_like(query)
    repeats = query.shape[1] // key.shape[1]
    for start, end in pairwise(bounds.tolist()):
        q, k, v = query[start:end], key[start:end], value[start:end]
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)[None, :]
        hidden = (distance < 0) | (distance > (window if window >= 0 else end))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out[start:end] = torch.einsum("hqk,khd->qhd", weights, v)
    return out


def check_demands(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, longest: int):
    """What FlashAttention's C++ checks, or reads without checking."""
    assert q.ndim == k.ndim == v.ndim == 3
    assert q.dtype == k.dtype == v.dtype
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    assert q.shape[1] % k.shape[1] == 0 and k.shape == v.shape
    assert type(longest) is int and longest == int(cu_q.diff().max())
    for bounds in (cu_q, cu_k):
        assert bounds.dtype == torch.int32 and bounds.device == q.device
        assert bounds.is_contiguous()
        assert bounds[0] == 0 and bounds[-1] == len(q)


class Calls:
    """How often the reference ran, and in which dtypes."""

    def __init__(self) -> None:
        self.dtypes: list[torch.dtype] = []

    def torch_2_11(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        return_aux: object = None,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:
        check_demands(query, key, value, cu_seq_q, cu_seq_k, max_q)
        assert max_k == max_q and return_aux is None and scale is not None
        # The op takes causality from exactly this tuple, or from a window that ends at the token.
        assert isinstance(window_size, tuple) and window_size[1] == 0
        self.dtypes.append(query.dtype)
        return reference_varlen(query, key, value, cu_seq_q, scale, window_size[0])

    def torch_2_13(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor | None,
        max_q: int,
        max_k: int,
        *,
        return_aux: object = None,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
        seqused_k: Tensor | None = None,
        block_table: Tensor | None = None,
        num_splits: int | None = None,
    ) -> Tensor:
        assert enable_gqa or query.shape[1] == key.shape[1]
        assert cu_seq_k is not None and seqused_k is block_table is num_splits is None
        rows = (query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)
        return self.torch_2_11(*rows, return_aux=return_aux, scale=scale, window_size=window_size)

    def flash_attn_varlen_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        **others: object,
    ) -> Tensor:
        assert causal and dropout_p == 0.0 and not others
        rows = (q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return self.torch_2_11(*rows, scale=softmax_scale, window_size=window_size)


KERNELS = {
    "torch_2_11": "varlen",
    "torch_2_13": "varlen",
    "flash_attn_varlen_func": "flash_attention_2",
}


@pytest.fixture
def calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The reference in place of both kernels; of torch's, with the signature that is asked for."""
    calls = Calls()
    version = getattr(request, "param", "torch_2_13")
    if version != "flash_attn_varlen_func":
        monkeypatch.setattr(attention, "varlen_attn", getattr(calls, version))
    package = SimpleNamespace(flash_attn_varlen_func=calls.flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    return calls


@pytest.mark.parametrize("calls", KERNELS, indirect=True)
def test_kernels_give_the_states_and_gradients_of_each_sequence_alone(
    calls: Calls,
    request: pytest.FixtureRequest,
    lora_model: PeftModel,
    ragged: list[TrainExample],
    relative_error: Callable[[Tensor, Tensor], float],
    states_alone,
    gradients,
) -> None:
    kernel = KERNELS[request.node.callspec.params["calls"]]
    expected = states_alone(lora_model, ragged)
    expected_gradients = gradients(lora_model, expected)
    adopt_attention(causal_lm(lora_model), kernel)
    states = hidden_states(lora_model, build_batch(ragged).student, attention=kernel)
    assert relative_error(states, expected) < TOLERANCE
    assert relative_error(gradients(lora_model, states), expected_gradients) < TOLERANCE
    # Once a layer: nothing went round the kernel.
    assert len(calls.dtypes) == 2


@pytest.mark.parametrize(
    "rows",
    [
        (((5,), (1,)),),
        (((5,), (1,)), ((6,), (2,)), ((7,), (3,))),
        (((5,), (1, 2, 3)), ((6, 7), ()), ((8, 9, 10), (4,))),
    ],
    ids=["one token each", "three of them", "an empty completion"],
)
def test_the_shortest_sequences(
    rows: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...],
    calls: Calls,
    base: PreTrainedModel,
    relative_error: Callable[[Tensor, Tensor], float],
) -> None:
    sequences = pack_sequences(*zip(*rows, strict=True))
    with torch.no_grad():
        padded = hidden_states(base, sequences, attention="padded")
        adopt_attention(base, "varlen")
        packed = hidden_states(base, sequences, attention="varlen")
    assert relative_error(packed, padded) < TOLERANCE
    assert calls.dtypes


def test_bounds_of_one_long_sequence_would_be_seen(
    calls: Calls,
    base: PreTrainedModel,
    ragged: list[TrainExample],
    relative_error,
    states_alone,
) -> None:
    sequences = build_batch(ragged).student
    adopt_attention(base, "varlen")
    whole = torch.tensor([0, len(sequences.token_ids)], dtype=torch.int32)
    leaking = PackedSequences(
        sequences.token_ids, sequences.position_ids, whole, sequences.loss_positions
    )
    with torch.no_grad():
        expected = states_alone(base, ragged)
        assert (
            relative_error(hidden_states(base, sequences, attention="varlen"), expected) < TOLERANCE
        )
        assert relative_error(hidden_states(base, leaking, attention="varlen"), expected) > VISIBLE


def test_no_dense_mask_is_built(
    calls: Calls, base: PreTrainedModel, ragged: list[TrainExample]
) -> None:
    adopt_attention(base, "varlen")
    sizes: list[int] = []

    def note(module: nn.Module, args: object, kwargs: dict[str, Tensor | None]) -> None:
        mask = kwargs["attention_mask"]
        assert mask is not None
        sizes.append(mask.numel())

    for layer in decoder_layers(base):
        layer.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        hidden_states(base, build_batch(ragged).student, attention="varlen")
        assert sizes == [0, 0]
        # Left to the positions, the mask is as large as it looks.
        hidden_states(base, sequences := build_batch(ragged).student, attention="packed")
    assert sizes[2:] == [len(sequences.token_ids) ** 2] * 2


@pytest.mark.parametrize("checkpointed", [False, True])
def test_recomputed_layers_see_the_same_bounds(
    checkpointed: bool,
    calls: Calls,
    lora_model: PeftModel,
    ragged: list[TrainExample],
    gradients,
) -> None:
    model = causal_lm(lora_model)
    sequences = build_batch(ragged).student
    adopt_attention(model, "varlen")
    lora_model.train()
    expected = gradients(lora_model, hidden_states(lora_model, sequences, attention="varlen"))
    calls.dtypes.clear()
    if checkpointed:
        checkpoint_activations(lora_model)
    states = hidden_states(lora_model, sequences, attention="varlen")
    # Between the two passes the layers serve others: what they use is bound to the call.
    with torch.no_grad():
        hidden_states(lora_model, build_batch(ragged[:1]).teacher, attention="padded")
    assert torch.equal(gradients(lora_model, states), expected)
    assert len(calls.dtypes) == (4 if checkpointed else 2)


@pytest.mark.parametrize("window", [1, 3])
def test_sliding_layers_see_their_window(
    window: int, calls: Calls, ragged: list[TrainExample], relative_error
) -> None:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.15,
        use_sliding_window=True,
        sliding_window=window,
        max_window_layers=1,
    )
    assert config.layer_types == ["full_attention", "sliding_attention"]
    model = Qwen3ForCausalLM(config).eval()
    sequences = build_batch(ragged).student
    with torch.no_grad():
        expected = hidden_states(model, sequences, attention="padded")
        adopt_attention(model, "varlen")
        packed = hidden_states(model, sequences, attention="varlen")
    # Float32, whose rounding is far below a token more or less in the window.
    assert relative_error(packed, expected) < 1e-6


def test_float32_weights_under_autocast_reach_the_kernel_in_half_precision(
    calls: Calls, model_dir: Path, ragged: list[TrainExample]
) -> None:
    section = ModelSection(name_or_path=str(model_dir), dtype="bfloat16")
    model = load_base(section, torch.device("cpu"), trains_base=True)
    adopt_attention(model, "varlen")
    hidden_states(model, build_batch(ragged).student, attention="varlen").sum().backward()
    assert calls.dtypes == [torch.bfloat16] * 2
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
