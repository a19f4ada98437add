"""What PyTorch asks of an operator: registration, compilation, autograd's corner cases, layouts."""

import dataclasses

import pytest
import torch

from paint_kernels import (
    LossSettings,
    PaintLoss,
    _ops,
    _token_ops,
    paint_loss,
    paint_loss_from_logits,
    reference,
    token_logprobs,
    token_stats,
)
from paint_kernels._heads import Heads
from paint_kernels._shards import WHOLE

_OWN = LossSettings(temperature=0.9, top_fraction=0.3, interpolation_weight=0.3, backend="torch")
OPTIONS = _OWN.arguments() + WHOLE.arguments()
WITH_SELECTION = dataclasses.replace(_OWN, top_fraction=1.0).arguments() + WHOLE.arguments()
REDUCTIONS = ("sequence_mean", "none")


@pytest.fixture
def batch(build):
    return build((5, 0, 7), 61).trainable()


def both_heads(batch, *, bias=None, **numbers):
    return Heads(batch.weight, bias, batch.teacher_weight, **numbers).arguments()


CAPPED = {"logit_scale": 0.7, "logit_softcap": 3.0, "teacher_logit_scale": 0.9}


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("own_head", [True, False])
@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("more", [True, False])
def test_opcheck_paint_loss(build, head, own_head, per_token, more):
    batch = build((5, 0, 7), 61, teacher_hidden=9 if own_head else None).trainable(head)
    weights = None if per_token else torch.rand(12)
    bias = torch.randn(61, requires_grad=head) if more else None
    temperatures = torch.rand(12) + 0.5 if more else None
    given = torch.arange(12) % 3 == 0 if more else None
    zeros = torch.arange(12) % 4 == 0 if more else None
    arguments = (
        *(batch.student, batch.teacher, *both_heads(batch, bias=bias, **CAPPED if more else {})),
        *(batch.cu_seqlens, weights, zeros, temperatures, given),
        *(True, head, head and more, *(WITH_SELECTION if more else OPTIONS)),
    )
    torch.library.opcheck(_ops.paint_loss, arguments)


@pytest.mark.parametrize("per_token", [True, False])
def test_opcheck_paint_loss_from_logits(batch, per_token):
    student, teacher = torch.randn(12, 61, requires_grad=True), torch.randn(12, 61)
    weights = None if per_token else torch.rand(12)
    temperatures = torch.rand(12) + 0.5 if per_token else None
    zeros = torch.arange(12) % 4 == 0 if per_token else None
    by_token = weights, zeros, temperatures, None
    arguments = (student, teacher, batch.cu_seqlens, *by_token, True, *OPTIONS)
    torch.library.opcheck(_ops.paint_loss_from_logits, arguments)


@pytest.mark.parametrize("more", [True, False])
def test_opcheck_the_others(batch, more):
    ids, weights = torch.arange(12), torch.rand(12)
    temperatures = torch.rand(12) + 0.5 if more else None
    settings = (0.9, "torch", 5 if more else None, *WHOLE.arguments())
    student, numbers = batch.student.detach(), (0.7, 3.0) if more else (1.0, None)
    bias = torch.randn(61) if more else None
    head = (batch.weight.detach(), bias, *numbers)
    torch.library.opcheck(_token_ops.token_stats, (student, *head, temperatures, *settings))
    torch.library.opcheck(
        _token_ops.token_logprobs_head_gradient,
        (student, *head, ids, temperatures, weights, True, more, *settings),
    )
    selected = torch.arange(12) % 3 == 0
    zeros = torch.arange(12) % 4 == 0 if more else None
    heads = both_heads(dataclasses.replace(batch, weight=head[0]), bias=bias)
    torch.library.opcheck(
        _ops.paint_loss_head_gradient,
        (
            *(student, batch.teacher, *heads),
            *(selected, weights, zeros, temperatures, True, more, *OPTIONS),
        ),
    )
    trained = None if bias is None else bias.requires_grad_()
    torch.library.opcheck(
        _token_ops.token_logprobs,
        (batch.student, batch.weight, trained, *numbers, ids, temperatures, True, *settings),
    )


def both_gradients(function, batch):
    loss = function(batch.student, batch.teacher, batch.weight, batch.cu_seqlens)
    return [loss, *torch.autograd.grad(loss.sum(), (batch.student, batch.weight))]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compiled_paint_loss_equals_eager(batch, reduction):
    """fullgraph: one graph, without a break at the operator or at the checks."""

    def function(student, teacher, weight, bounds):
        output = paint_loss(2 * student, teacher, weight, bounds, reduction=reduction)
        return output.loss * 3 + output.token_kl.sum()

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for actual, expected in zip(
        both_gradients(compiled, batch), both_gradients(function, batch), strict=True
    ):
        assert torch.equal(actual, expected)


def test_compiled_module_and_functions(batch):
    module = PaintLoss(top_fraction=0.3)
    ids = torch.arange(12)

    def function(student, teacher, weight, bounds):
        logits = student @ weight.T
        return (
            module(student, teacher, weight, bounds).loss
            + paint_loss_from_logits(logits, logits.detach() + 1, bounds, denominator=3).loss
            + token_logprobs(student, weight, ids).logprobs.sum()
            + token_stats(student, weight).entropy.sum()
        )

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for actual, expected in zip(
        both_gradients(compiled, batch), both_gradients(function, batch), strict=True
    ):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("teacher_top_k", [None, 5])
def test_compiled_with_everything_that_a_trainer_gives(batch, reduction, teacher_top_k):
    bias = torch.randn(61, requires_grad=True)
    given = {
        "token_weights": torch.rand(12),
        "temperature": torch.rand(12) + 0.5,
        "selected": torch.arange(12) % 3 == 0,
    }
    head = {"logit_scale": 0.7, "logit_softcap": 3.0}

    def function(student, teacher, weight, bias, bounds):
        loss = paint_loss(
            *(student, teacher, weight, bounds),
            lm_head_bias=bias,
            reduction=reduction,
            teacher_top_k=teacher_top_k,
            chunk_rows=5,
            **(given | head),
        ).loss
        tempered = {"lm_head_bias": bias, "temperature": given["temperature"], **head}
        logprobs = token_logprobs(student, weight, torch.arange(12), **tempered).logprobs
        entropy = token_stats(student, weight, **tempered).entropy
        logits = student @ weight.T, teacher @ weight.T
        from_logits = paint_loss_from_logits(*logits, bounds, **given).loss
        return loss.sum() + logprobs.sum() + entropy.sum() + from_logits

    inputs = (batch.student, batch.teacher, batch.weight, bias, batch.cu_seqlens)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    trained = (batch.student, batch.weight, bias)
    expected, actual = function(*inputs), compiled(*inputs)
    torch.testing.assert_close(actual, expected)
    for one, other in zip(
        torch.autograd.grad(actual, trained), torch.autograd.grad(expected, trained), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("padded", [True, False])
def test_compiled_labels(batch, padded):
    """Their number of rows depends on values, which torch.compile allows on request."""
    labels = torch.where(torch.arange(12) % 4 == 0, -100, 1)

    def function(student, teacher, weight, bounds):
        if padded:
            student, teacher = student.view(3, 4, -1), teacher.view(3, 4, -1)
            return paint_loss(student, teacher, weight, labels=labels.view(3, 4)).loss
        return paint_loss(student, teacher, weight, bounds, labels=labels).loss

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        for actual, expected in zip(
            both_gradients(compiled, batch), both_gradients(function, batch), strict=True
        ):
            torch.testing.assert_close(actual, expected)


def test_compiled_with_lengths_that_change(build):
    compiled = torch.compile(
        lambda *inputs: paint_loss(*inputs).loss, backend="aot_eager", fullgraph=True, dynamic=True
    )
    for lengths in ((5, 0, 7), (3, 2, 9), (8, 8, 8)):
        batch = build(lengths, 61).trainable()
        expected = both_gradients(lambda *inputs: paint_loss(*inputs).loss, batch)
        for actual, wanted in zip(both_gradients(compiled, batch), expected, strict=True):
            assert torch.equal(actual, wanted)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_two_backward_passes(batch, reduction):
    loss = batch.loss(paint_loss, reduction=reduction).loss
    inputs = (batch.student, batch.weight)
    first = torch.autograd.grad(loss.sum(), inputs, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(3 * loss.sum(), inputs)
    for one, three, before in zip(first, second, kept, strict=True):
        assert torch.equal(one, before)
        torch.testing.assert_close(three, 3 * one)


def test_two_backward_passes_of_logprobs(batch):
    loss = token_logprobs(batch.student, batch.weight, torch.arange(12)).logprobs.sum()
    inputs = (batch.student, batch.weight)
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(3 * loss, inputs)
    for one, three in zip(first, second, strict=True):
        torch.testing.assert_close(three, 3 * one)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("wanted", ["student", "weight"])
def test_one_gradient_at_a_time(batch, error, reduction, wanted):
    both = dict(zip(("student", "weight"), both_gradients_of(batch, reduction), strict=True))
    getattr(batch, "weight" if wanted == "student" else "student").requires_grad_(False)
    alone = torch.autograd.grad(
        batch.loss(paint_loss, reduction=reduction).loss.sum(), getattr(batch, wanted)
    )[0]
    assert error(alone, both[wanted]) < 1e-6


def both_gradients_of(batch, reduction):
    loss = batch.loss(paint_loss, reduction=reduction).loss
    return torch.autograd.grad(loss.sum(), (batch.student, batch.weight))


def test_the_teacher_gets_no_gradient(build):
    batch = build(teacher_hidden=9).trainable()
    batch.teacher.requires_grad_()
    batch.teacher_weight.requires_grad_()
    batch.loss(paint_loss).loss.backward()
    assert batch.student.grad is not None and batch.weight.grad is not None
    assert batch.teacher.grad is None and batch.teacher_weight.grad is None


def test_no_gradient_no_work(batch):
    """Under no_grad the loss has the same values, and neither graph nor gradient."""
    with torch.no_grad():
        output = batch.loss(paint_loss)
    assert not output.loss.requires_grad
    assert torch.equal(output.loss, batch.loss(paint_loss).loss)


def test_logged_values_are_detached(batch):
    output = batch.loss(paint_loss)
    assert output.loss.requires_grad
    assert not any(value.requires_grad for value in output[1:])


def test_a_second_derivative_is_refused(batch):
    loss = batch.loss(paint_loss).loss
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(loss, batch.student, create_graph=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("own_head", [True, False])
def test_autocast_rounds_inputs_as_linear_does_and_nothing_else(build, error, reduction, own_head):
    """The products of rounded inputs stay float32; gradients come back in the inputs' dtype."""
    batch = build((5, 0, 7), 61, teacher_hidden=9 if own_head else None).trainable()
    options = {"reduction": reduction, "pointwise_clip": None}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = batch.loss(paint_loss, **options).loss
        stats = token_stats(batch.student, batch.weight)
    gradients = torch.autograd.grad(loss.sum(), (batch.student, batch.weight))
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    exact = batch.to(torch.bfloat16).double().trainable()
    exact_loss = exact.loss(reference.paint_loss, **options).loss
    assert error(loss, exact_loss) < 2e-4
    expected = torch.autograd.grad(exact_loss.sum(), (exact.student, exact.weight))
    for actual, wanted in zip(gradients, expected, strict=True):
        assert error(actual, wanted) < 6e-3
    exact_stats = reference.token_stats(exact.student.detach(), exact.weight.detach())
    assert error(stats.entropy, exact_stats.entropy) < 2e-4


def test_non_contiguous_inputs(build, error):
    batch = build((5, 0, 7), 61)
    student = torch.stack([batch.student, batch.student], dim=1)[:, 0].requires_grad_()
    teacher = batch.teacher.T.contiguous().T
    weight = batch.weight.T.contiguous().T.requires_grad_()
    bounds = torch.stack([batch.cu_seqlens, batch.cu_seqlens], dim=1)[:, 0]
    assert not any(t.is_contiguous() for t in (student, teacher, weight, bounds))
    loss = paint_loss(student, teacher, weight, bounds).loss
    plain = batch.trainable()
    expected = both_gradients(lambda *inputs: paint_loss(*inputs).loss, plain)
    actual = [loss, *torch.autograd.grad(loss, (student, weight))]
    for one, other in zip(actual, expected, strict=True):
        assert error(one, other) < 1e-6


def test_gradients_reach_through_the_hidden_states(build, error):
    """The upstream gradient passes on into a model below, as reference has it."""
    batch = build((5, 7), 61)
    layer = torch.nn.Linear(16, 16)
    exact = torch.nn.Linear(16, 16, dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    settings = {"pointwise_clip": None}
    paint_loss(
        layer(batch.student), batch.teacher, batch.weight, batch.cu_seqlens, **settings
    ).loss.backward()
    wide = batch.double()
    reference.paint_loss(
        exact(wide.student), wide.teacher, wide.weight, wide.cu_seqlens, **settings
    ).loss.backward()
    assert error(layer.weight.grad, exact.weight.grad) < 2e-4
