"""A GPU's half-precision products, with the one call that needs a GPU replaced by the same product
in float32: what is rounded, and how much of the gradients that costs."""

import pytest
import torch

from paint_kernels import _matmul, _plan, paint_loss, reference, token_logprobs

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def half_products_on_the_cpu(monkeypatch):
    def runs_in_half(hidden_states, weight):
        return hidden_states.dtype == weight.dtype and weight.dtype in HALVES

    def half_product(a, b, out, *, add):
        assert a.dtype == b.dtype and a.dtype in HALVES and out.dtype == torch.float32
        if not add:
            out.zero_()
        out.add_(a.float() @ b.float())

    monkeypatch.setattr(_matmul, "runs_in_half", runs_in_half)
    monkeypatch.setattr(_matmul, "half_product", half_product)
    monkeypatch.setattr(_plan, "CPU_CHUNK_ELEMENTS", 7 * 2000)


def operator_gradients(batch, **settings):
    """By the hidden states, unweighted rows before their last rounding, and by the head."""
    arguments = {
        "temperature": 0.9,
        "divergence": "forward_kl",
        "jsd_weight": 0.5,
        "pointwise_clip": 0.06,
        "top_fraction": 0.3,
        "interpolation_weight": 0.3,
        "teacher_top_k": None,
        "entropy_floor": 1e-6,
        "backend": "torch",
    } | settings
    num_tokens = len(batch.student)
    token_weights = torch.linspace(0.1, 1.3, num_tokens) / 1000
    _, _, _, rows, head = torch.ops.paint_kernels.paint_loss(
        *(batch.student, batch.teacher, batch.weight, batch.teacher_weight, batch.cu_seqlens),
        *(token_weights, True, True),
        **arguments,
    )
    exact = batch.double().trainable()
    del arguments["backend"]
    loss = exact.loss(reference.paint_loss, reduction="none", **arguments).loss
    (exact_rows,) = torch.autograd.grad(loss.sum(), exact.student, retain_graph=True)
    (exact_head,) = torch.autograd.grad((loss * token_weights).sum(), exact.weight)
    return rows, head, exact_rows, exact_head


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("own_head", [True, False])
def test_gradients_before_their_last_rounding(build, error, dtype, divergence, own_head):
    """Below 1e-3, where storing the gradient by the logits in bfloat16 alone would cost 1.3e-3."""
    batch = build((5, 0, 8), 2000, noise=0.3, dtype=dtype, teacher_hidden=9 if own_head else None)
    rows, head, exact_rows, exact_head = operator_gradients(
        batch, divergence=divergence, pointwise_clip=None
    )
    assert rows.dtype == head.dtype == torch.float32
    assert error(rows, exact_rows) < 5e-4
    assert error(head, exact_head) < 5e-4


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("temperature", [0.01, 5.0])
def test_outliers_and_scales(build, error, dtype, scale, temperature):
    """Heads far from 1, one weight a hundred times the others, fit into float16 all the same."""
    batch = build((6, 7), 300, noise=0.2, dtype=dtype)
    batch.weight.mul_(scale)
    batch.weight[5, 3] = 100 * scale
    batch.student[:, 2] *= 50
    batch.student.mul_(0.2 * temperature / scale)
    batch.teacher.copy_((batch.student.float() * 1.1).to(dtype))
    rows, head, exact_rows, exact_head = operator_gradients(
        batch, temperature=temperature, pointwise_clip=None, top_fraction=0.0
    )
    assert exact_rows.norm() > 0
    assert error(rows, exact_rows) < 1e-3
    assert error(head, exact_head) < 1e-3


def test_one_rounding_to_the_dtype_of_the_inputs(build, error):
    """The delivered gradient is the exact one, rounded once, whatever the upstream gradient."""
    batch = build((5, 8), 2000, noise=0.3, dtype=torch.bfloat16)
    mine, exact = batch.trainable(False), batch.double().trainable(False)
    options = {"pointwise_clip": None, "top_fraction": 0.3}
    (7.3 * mine.loss(paint_loss, **options).loss).backward()
    (7.3 * exact.loss(reference.paint_loss, **options).loss).backward()
    rounding = error(exact.student.grad.bfloat16(), exact.student.grad)
    assert error(mine.student.grad, exact.student.grad) < 1.1 * rounding


@pytest.mark.parametrize("dtype", HALVES)
def test_log_probabilities(build, error, dtype):
    batch = build((9,), 2000, dtype=dtype).trainable()
    exact = batch.double().trainable()
    ids = torch.arange(9)
    upstream = torch.linspace(0.5, 2, 9)
    output = token_logprobs(batch.student, batch.weight, ids, temperature=0.9)
    wanted = reference.token_logprobs(exact.student, exact.weight, ids, temperature=0.9)
    assert error(output.logprobs, wanted.logprobs) < 2e-4
    output.logprobs.backward(upstream)
    wanted.logprobs.backward(upstream.double())
    for one, other in ((batch.student, exact.student), (batch.weight, exact.weight)):
        rounding = error(other.grad.to(dtype), other.grad)
        assert error(one.grad, other.grad) < 1.2 * rounding + 2e-4


def test_empty_and_zero_inputs(build):
    batch = build((0,), 50, dtype=torch.bfloat16)
    rows, head, *_ = operator_gradients(batch)
    assert rows.shape == (0, 16) and head.abs().max() == 0
    batch = build((4,), 50, dtype=torch.bfloat16)
    batch.weight.zero_()
    rows, head, *_ = operator_gradients(batch)
    assert rows.abs().max() == 0 and head.isfinite().all()
