"""A GPU's half-precision products, with the one call that needs a GPU replaced by the same product
in float32: what is rounded, and how much of the gradients that costs."""

import pytest
import torch

from paint_kernels import _plan, _sources, paint_loss, reference, token_logprobs

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def small_chunks(half_products_anywhere, monkeypatch):
    monkeypatch.setattr(_plan, "CPU_CHUNK_ELEMENTS", 7 * 2000)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("own_head", [True, False])
def test_gradients_before_their_last_rounding(
    build, error, dtype, divergence, own_head, row_gradients
):
    """Below 1e-3, where storing the gradient by the logits in bfloat16 alone would cost 1.3e-3."""
    batch = build((5, 0, 8), 2000, noise=0.3, dtype=dtype, teacher_hidden=9 if own_head else None)
    rows, head, exact_rows, exact_head = row_gradients(
        batch, divergence=divergence, pointwise_clip=None
    )
    assert rows.dtype == head.dtype == torch.float32
    assert error(rows, exact_rows) < 5e-4
    assert error(head, exact_head) < 5e-4


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("temperature", [0.01, 5.0])
def test_outliers_and_scales(build, error, dtype, scale, temperature, row_gradients):
    """Heads far from 1, one weight a hundred times the others, fit into float16 all the same."""
    batch = build((6, 7), 300, noise=0.2, dtype=dtype)
    batch.weight.mul_(scale)
    batch.weight[5, 3] = 100 * scale
    batch.student[:, 2] *= 50
    batch.student.mul_(0.2 * temperature / scale)
    batch.teacher.copy_((batch.student.float() * 1.1).to(dtype))
    rows, head, exact_rows, exact_head = row_gradients(
        batch, temperature=temperature, pointwise_clip=None, top_fraction=0.0
    )
    assert exact_rows.norm() > 0
    assert error(rows, exact_rows) < 1e-3
    assert error(head, exact_head) < 1e-3


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize("softcap", [None, 6.0])
def test_heads_with_a_bias_a_scale_and_a_cap(build, error, dtype, scale, softcap, row_gradients):
    """The factors of the chain rule are applied to float32 sums, so any scale fits float16."""
    batch = build((5, 0, 8), 2000, noise=0.3, bias=True, dtype=dtype)
    batch.student.mul_(1 / scale)
    batch.teacher.mul_(1 / scale)
    batch.bias.mul_(1 / scale)
    temperatures = torch.logspace(-2, 2, 13)
    for row, temperature in enumerate(temperatures):
        batch.student[row] *= min(1.0, temperature)
        batch.teacher[row] *= min(1.0, temperature)
    settings = {"temperature": 1.0, "pointwise_clip": None, "scale": scale, "softcap": softcap}
    found = row_gradients(batch, temperatures=temperatures, **settings)
    for actual, expected in zip(found[:3], found[3:], strict=True):
        assert actual.dtype == torch.float32
        assert error(actual, expected) < 6e-4


def test_one_rounding_to_the_dtype_of_the_inputs(build, error):
    """The delivered gradient is the exact one, rounded once, whatever the upstream gradient."""
    batch = build((5, 8), 2000, noise=0.3, dtype=torch.bfloat16)
    mine, exact = batch.trainable(False), batch.double().trainable(False)
    options = {"pointwise_clip": None, "top_fraction": 0.3}
    (7.3 * mine.loss(paint_loss, **options).loss).backward()
    (7.3 * exact.loss(reference.paint_loss, **options).loss).backward()
    rounding = error(exact.student.grad.bfloat16(), exact.student.grad)
    assert error(mine.student.grad, exact.student.grad) < 1.1 * rounding


@pytest.fixture
def small_groups(monkeypatch):
    """Two chunks of seven rows or fewer in a group."""
    monkeypatch.setattr(_plan, "HEAD_GROUP_ROWS", 8)


@pytest.mark.parametrize("dtype", HALVES)
def test_groups_of_chunks_for_the_head(
    build, error, dtype, row_gradients, small_groups, head_products
):
    """30 rows in five chunks of 6, and the selected ones, which the CPU computes again."""
    batch = build((9, 0, 21), 2000, noise=0.3, dtype=dtype)
    rows, head, exact_rows, exact_head = row_gradients(batch, pointwise_clip=None)
    assert head_products[:3] == [(12, False), (12, True), (6, True)]
    assert sum(rows for rows, _ in head_products[3:]) == 10
    assert error(rows, exact_rows) < 5e-4
    assert error(head, exact_head) < 5e-4


def test_selected_rows_are_projected_once_more(build, error, row_gradients, monkeypatch):
    """The head's gradient has them already: their loss is computed twice, from the same logits."""
    projected, project = [], _sources.project

    def counted(hidden_states, weight, out):
        projected.append(len(hidden_states))
        return project(hidden_states, weight, out=out)

    monkeypatch.setattr(_sources, "project", counted)
    batch = build((9, 0, 21), 2000, noise=0.3, dtype=torch.bfloat16)
    _, head, _, exact_head = row_gradients(batch, pointwise_clip=None)
    assert sum(projected) == 2 * (30 + 10)
    assert error(head, exact_head) < 5e-4


@pytest.mark.parametrize("dtype", HALVES)
def test_groups_of_chunks_for_log_probabilities(build, error, dtype, small_groups, head_products):
    batch = build((19,), 2000, dtype=dtype).trainable()
    exact = batch.double().trainable()
    ids, upstream = torch.arange(19), torch.linspace(0.5, 2, 19)
    token_logprobs(batch.student, batch.weight, ids, chunk_rows=7).logprobs.backward(upstream)
    wanted = reference.token_logprobs(exact.student, exact.weight, ids).logprobs
    wanted.backward(upstream.double())
    assert head_products == [(14, False), (5, True)]
    rounding = error(exact.weight.grad.to(dtype), exact.weight.grad)
    assert error(batch.weight.grad, exact.weight.grad) < 1.2 * rounding + 2e-4


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


def test_empty_and_zero_inputs(build, row_gradients):
    batch = build((0,), 50, dtype=torch.bfloat16)
    rows, head, *_ = row_gradients(batch)
    assert rows.shape == (0, 16) and head.abs().max() == 0
    batch = build((4,), 50, dtype=torch.bfloat16)
    batch.weight.zero_()
    rows, head, *_ = row_gradients(batch)
    assert rows.abs().max() == 0 and head.isfinite().all()


@pytest.fixture
def empty_memory_has_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("lengths", [(), (9, 0, 6)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_head_s_gradient_is_written_before_it_is_read(
    build, error, row_gradients, empty_memory_has_nan, lengths, dtype
):
    assert torch.empty(1).isnan()
    _, head, _, exact_head = row_gradients(build(lengths, 2000, noise=0.3, dtype=dtype))
    assert error(head, exact_head) < 5e-4


@pytest.mark.parametrize("temperature", [1e-3, 200.0])
def test_temperatures_at_which_a_fixed_scale_would_leave_float16(
    build, error, temperature, row_gradients
):
    """Gradients reach 1 / temperature: 256 times that is above 65504, or near the smallest."""
    batch = build((6, 7), 300, noise=0.3, dtype=torch.bfloat16)
    batch.student.mul_(temperature)
    batch.teacher.mul_(temperature)
    options = {"temperature": temperature, "pointwise_clip": None, "top_fraction": 0.0}
    rows, head, exact_rows, exact_head = row_gradients(batch, **options)
    assert error(rows, exact_rows) < 5e-4
    assert error(head, exact_head) < 5e-4


def test_small_gradients_stay_above_float16s_smallest_number(build, error, row_gradients):
    """A teacher at a KL near 1e-7: unscaled, most entries would be below 6e-8."""
    batch = build((5, 8), 2000, dtype=torch.bfloat16)
    batch.weight.mul_(0.3)
    batch.teacher.copy_(batch.student)
    batch.teacher[:, 0] *= 1 + 2**-7
    rows, _, exact_rows, _ = row_gradients(batch, pointwise_clip=None, top_fraction=0.0)
    assert exact_rows.norm() > 0
    assert error(rows, exact_rows) < 2e-3


def test_the_largest_weight_may_be_negative(build, error, row_gradients):
    batch = build((6, 7), 300, noise=0.2, dtype=torch.bfloat16)
    batch.weight[5, 3] = -3e4
    batch.student[:, 3] = batch.teacher[:, 3] = 1e-4
    batch.student[2, 7] = -300.0
    batch.teacher[2, 7] = -290.0
    rows, head, exact_rows, exact_head = row_gradients(batch, pointwise_clip=None)
    assert error(rows, exact_rows) < 1e-3
    assert error(head, exact_head) < 1e-3
