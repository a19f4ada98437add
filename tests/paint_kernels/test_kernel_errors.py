"""A user's mistake is a ValueError that says what came and what is needed."""

import dataclasses
import re
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from paint_kernels import (
    PaintLoss,
    paint_loss,
    paint_loss_from_logits,
    select_top_fraction,
    token_logprobs,
    token_stats,
)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0: it must be a finite number above 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        (
            {"divergence": "kl"},
            "divergence is 'kl': available are 'forward_kl', 'reverse_kl', 'jsd'",
        ),
        ({"jsd_weight": 1.5}, "jsd_weight is 1.5: it must lie in [0, 1]"),
        ({"divergence": "jsd", "jsd_weight": 0.0}, "it must lie inside (0, 1)"),
        ({"divergence": "jsd", "jsd_weight": 1.0}, 'it tends to, scaled, is "reverse_kl"'),
        ({"pointwise_clip": float("inf")}, "pointwise_clip is inf"),
        ({"pointwise_clip": 0.0}, "or None to clip nothing"),
        ({"top_fraction": -0.1}, "top_fraction is -0.1: it must lie in [0, 1]"),
        ({"top_fraction": float("nan")}, "top_fraction is nan"),
        ({"interpolation_weight": 2.0}, "interpolation_weight is 2.0"),
        ({"teacher_top_k": 0}, "teacher_top_k is 0: it must be an integer in 1..203"),
        ({"teacher_top_k": 204}, "teacher_top_k is 204"),
        ({"teacher_top_k": 51, "vocab_size": 50}, "it must be an integer in 1..50"),
        ({"entropy_floor": 0.0}, "entropy_floor is 0.0"),
        ({"vocab_size": 204}, "vocab_size is 204: it must be an integer in 1..203"),
        ({"vocab_size": 50.0}, "vocab_size is 50.0: it must be an integer"),
        ({"teacher_top_k": 2.5}, "teacher_top_k is 2.5: it must be an integer in 1..203, the size"),
        ({"temperature": "1"}, "temperature is the string '1': it must be a number"),
        (
            {"pointwise_clip": "none"},
            "pointwise_clip is 'none': it must be a finite number above 0",
        ),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"reduction": "mean"}, "reduction is 'mean': available are 'sequence_mean'"),
        ({"reduction": "sum", "denominator": 3}, "reduction 'sum' does not divide"),
        ({"reduction": "none", "denominator": 3}, "reduction 'none' does not divide"),
        ({"denominator": 0}, "denominator is 0"),
        ({"denominator": torch.ones(2)}, "denominator has shape (2,)"),
        ({"backend": "cuda"}, "backend is 'cuda': available are 'auto', 'torch', 'triton'"),
    ],
)
def test_settings(build, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build().loss(paint_loss, **settings)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("student", torch.randn(17), "student_hidden_states has shape (17,): it must be (N, H)"),
        ("student", torch.randn(2, 17, 16), "student_hidden_states has shape (2, 17, 16)"),
        ("student", torch.zeros(17, 16, dtype=torch.int32), "student_hidden_states is torch.int32"),
        ("student", torch.randn(17, 8), "student_hidden_states is 8 wide, lm_head_weight 16"),
        ("student", torch.randn(16, 16), "student_hidden_states has 16 rows"),
        ("student", [1.0], "student_hidden_states is of type list"),
        ("teacher", torch.randn(17, 8), "needs its own teacher_lm_head_weight"),
        ("weight", torch.randn(16), "lm_head_weight has shape (16,): it must be (V, H)"),
        ("teacher_weight", torch.randn(7, 16), "lm_head_weight has 203 rows"),
        ("teacher_weight", torch.randn(203, 8), "teacher_hidden_states is 16 wide"),
        ("weight", torch.randn(203, 16, device="meta"), "lm_head_weight is on meta"),
        ("cu_seqlens", torch.tensor([0.0, 17.0]), "cu_seqlens is torch.float32"),
        ("cu_seqlens", torch.tensor([[0, 17]]), "cu_seqlens has shape (1, 2)"),
        ("cu_seqlens", [0, 17], "cu_seqlens is of type list"),
        ("cu_seqlens", torch.tensor([0, 17], device="meta"), "cu_seqlens is on meta"),
        ("cu_seqlens", torch.tensor([0, 16]), "cu_seqlens is [0, 16]: it must start at 0"),
        ("cu_seqlens", torch.tensor([0, 18]), "and end at 17"),
        ("cu_seqlens", torch.tensor([1, 17]), "it must start at 0"),
        ("cu_seqlens", torch.tensor([0, 9, 4, 17]), "never decrease"),
    ],
)
def test_tensors(build, field, value, message):
    batch = dataclasses.replace(build(), **{field: value})
    with pytest.raises(ValueError, match=re.escape(message)):
        batch.loss(paint_loss)


def test_a_module_instead_of_its_weight(build):
    batch = dataclasses.replace(build(), weight=nn.Linear(16, 203))
    with pytest.raises(ValueError, match="is the module Linear: pass its weight"):
        batch.loss(paint_loss)


def test_a_lora_wrapped_head(build):
    class LoraLinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_layer = nn.Linear(16, 203)
            self.lora_A = nn.ModuleDict({"default": nn.Linear(16, 2)})

    batch = dataclasses.replace(build(), weight=LoraLinear())
    with pytest.raises(ValueError, match="LoRA adapters, whose update would be ignored"):
        batch.loss(paint_loss)


@pytest.fixture
def mesh(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield DeviceMesh("cpu", [0])
    torch.distributed.destroy_process_group()


def test_dtensor_heads(build, mesh):
    """Sharded over the vocabulary on several ranks: test_vocab_parallel.py."""
    batch = build()
    sharded = distribute_tensor(batch.weight, mesh, [Shard(1)])
    with pytest.raises(ValueError, match=r"lm_head_weight is a DTensor .* \.full_tensor\(\)"):
        dataclasses.replace(batch, weight=sharded).loss(paint_loss)
    for placement in (Replicate(), Shard(0)):
        whole = distribute_tensor(batch.weight, mesh, [placement])
        output = dataclasses.replace(batch, weight=whole).loss(paint_loss)
        assert torch.equal(output.loss, batch.loss(paint_loss).loss)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_dtensor_hidden_states_beside_a_mask(build, mesh, role):
    batch = build((3, 5), 61)
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    padded = {name: torch.zeros(2, 5, 16) for name in ("student", "teacher")}
    padded["student"][mask], padded["teacher"][mask] = batch.student, batch.teacher
    padded[role] = distribute_tensor(padded[role], mesh, [Replicate()])
    output = PaintLoss()(*padded.values(), batch.weight, loss_mask=mask)
    assert torch.equal(output.loss, batch.loss(paint_loss).loss)


def test_triton_on_a_cpu():
    """In a process of its own: whether kernels are interpreted is settled at their import."""
    code = (
        "import torch; from paint_kernels import token_stats\n"
        "try: token_stats(torch.ones(2, 3), torch.ones(4, 3), backend='triton')\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={}, check=True
    )
    assert "it needs CUDA tensors, or TRITON_INTERPRET=1" in done.stdout


def test_triton_not_installed():
    """The package imports and runs without triton; only asking for the backend is an error."""
    code = (
        "import sys, importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "import torch, paint_kernels\n"
        "hidden, head = torch.ones(2, 3), torch.ones(4, 3)\n"
        "paint_kernels.token_stats(hidden, head)\n"
        "assert 'paint_kernels._triton_kernels' not in sys.modules\n"
        "try: paint_kernels.token_stats(hidden, head, backend='triton')\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={}, check=True
    )
    assert "triton is not installed" in done.stdout


def test_triton_computes_in_float32(build):
    with pytest.raises(ValueError, match="an input is float64"):
        build().double().loss(paint_loss, backend="triton")


def test_logits():
    student, bounds = torch.randn(5, 9), torch.tensor([0, 5])
    with pytest.raises(ValueError, match="9 columns, teacher_logits 8"):
        paint_loss_from_logits(student, torch.randn(5, 8), bounds)
    with pytest.raises(ValueError, match="student_logits has 5 rows, teacher_logits 4"):
        paint_loss_from_logits(student, torch.randn(4, 9), bounds)
    with pytest.raises(ValueError, match=r"teacher_logits has shape \(5,\): it must be \(N, V\)"):
        paint_loss_from_logits(student, torch.randn(5), bounds)


def test_token_ids():
    hidden, head = torch.randn(3, 4), torch.randn(9, 4)
    with pytest.raises(ValueError, match=r"token_ids span -100\.\.2: they must lie in 0\.\.8"):
        token_logprobs(hidden, head, torch.tensor([1, -100, 2]))
    with pytest.raises(ValueError, match=r"they must lie in 0\.\.4"):
        token_logprobs(hidden, head, torch.tensor([1, 8, 2]), vocab_size=5)
    with pytest.raises(ValueError, match=r"token_ids has shape \(2,\)"):
        token_logprobs(hidden, head, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="token_ids is torch"):
        token_logprobs(hidden, head, torch.ones(3))


def test_stats():
    with pytest.raises(ValueError, match="hidden_states is 4 wide, lm_head_weight 5"):
        token_stats(torch.randn(3, 4), torch.randn(9, 5))
    with pytest.raises(ValueError, match="temperature is -1"):
        token_stats(torch.randn(3, 4), torch.randn(9, 4), temperature=-1)


def test_selection():
    with pytest.raises(ValueError, match="top_fraction is"):
        select_top_fraction(torch.ones(3), torch.tensor([0, 3]), 1.5)
    with pytest.raises(ValueError, match=r"cu_seqlens is \[0, 2\]"):
        select_top_fraction(torch.ones(3), torch.tensor([0, 2]), 0.5)


def test_token_ids_that_are_no_tensor_are_refused():
    with pytest.raises(ValueError, match="token_ids is of type list: it must be a tensor"):
        token_logprobs(torch.randn(3, 4), torch.randn(5, 4), [1, 2, 3])


# PyTorch's own, of its rules for forward mode.
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.jit")
def test_forward_mode_differentiation_is_refused():
    student, head, bounds = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 3])

    def loss(hidden):
        return paint_loss(hidden, student, head, bounds).loss

    with pytest.raises(ValueError, match="student_hidden_states has a tangent of forward-mode"):
        torch.func.jvp(loss, (student,), (torch.ones(3, 4),))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(head, torch.ones(5, 4))
        with pytest.raises(ValueError, match=r"backward only\. Use loss\.backward"):
            token_logprobs(student, dual, torch.arange(3))
        paint_loss(student, student, head, bounds)
