"""A token of weight 0 changes nothing else, whatever its hidden states or logits are."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from served import TAILS, serve

from paint_kernels import (
    _plan,
    _torch_backend,
    _torch_topk,
    paint_loss,
    paint_loss_from_logits,
    paint_loss_from_topk,
    reference,
    reference_topk,
)
from paint_kernels._torch_divergences import DIVERGENCES
from paint_kernels._weights import clear_rows, weighted, without_rows

REDUCTIONS = ("sequence_mean", "token_mean", "sum", "none")
JUNK = (math.nan, math.inf, -math.inf, 1e30)
SELECTING = {"top_fraction": 0.4, "interpolation_weight": 0.3}


@pytest.fixture(autouse=True, scope="module")
def small_chunks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_plan, "CPU_CHUNK_ELEMENTS", 1500)
        patch.setattr(_torch_backend, "BLOCK_ELEMENTS", 600)
        patch.setitem(_torch_topk.GATHERED_ELEMENTS, "cpu", 600)
        yield


def weights_of(num_tokens: int) -> torch.Tensor:
    weights = torch.linspace(-1, 2, num_tokens)
    weights[torch.arange(num_tokens) % 3 == 1] = 0.0
    return weights


def spoiled(batch: Any, junk: float, *, names: tuple[str, ...] = ("student", "teacher")) -> Any:
    """The batch with this in the rows of weight 0."""
    rows = weights_of(len(batch.student)) == 0
    changed = {name: getattr(batch, name).clone() for name in names}
    for tensor in changed.values():
        tensor[rows] = junk
    return dataclasses.replace(batch, **changed)


def results(output: Any, trained: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return output.loss, *torch.autograd.grad(output.loss.sum(), trained)


def check_equal(error: Any, found: Any, clean: Any, exact: Any) -> None:
    for actual, same, expected in zip(found, clean, exact, strict=True):
        assert actual.isfinite().all()
        torch.testing.assert_close(actual, same, rtol=1e-6, atol=1e-7)
        assert error(actual, expected) < 2e-4
    _, by_hidden, *_ = found
    assert (by_hidden[weights_of(len(by_hidden)) == 0] == 0).all()


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("logit_softcap", [None, 5.0])
@pytest.mark.parametrize("teacher_top_k", [None, 7])
def test_hidden_states(build, error, junk, reduction, logit_softcap, teacher_top_k):
    batch = build((7, 0, 12), 203, bias=True)
    options = {"reduction": reduction, "logit_softcap": logit_softcap, "pointwise_clip": None}
    options |= {"teacher_top_k": teacher_top_k, "token_weights": weights_of(19), **SELECTING}
    found = []
    for one, function in (
        (spoiled(batch, junk), paint_loss),
        (batch, paint_loss),
        (spoiled(batch, junk).double(), reference.paint_loss),
    ):
        one = one.trainable()
        trained = [one.student, one.weight, one.bias]
        found.append(results(one.loss(function, **options), trained))
    check_equal(error, *found)


@pytest.mark.parametrize("reduction", ["sequence_mean", "none"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("each", [True, False])
@pytest.mark.parametrize("clips", [True, False])
def test_every_divergence(build, clip_for, error, reduction, divergence, each, clips):
    batch = build((7, 0, 12), 203, teacher_hidden=9)
    options: dict[str, Any] = {"divergence": divergence, "token_weights": weights_of(19)}
    if each:
        options["temperature"] = torch.linspace(0.6, 1.5, 19)
    options |= SELECTING
    options["pointwise_clip"] = clip_for(batch, **options) if clips else None
    found = []
    for one, function in (
        (spoiled(batch, math.nan), paint_loss),
        (batch, paint_loss),
        (spoiled(batch, math.nan).double(), reference.paint_loss),
    ):
        one = one.trainable()
        output = one.loss(function, reduction=reduction, **options)
        found.append(results(output, [one.student, one.weight]))
    check_equal(error, *found)


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_half_precision_products(build, half_products_anywhere, name):
    batch = build((7, 0, 12), 301, noise=0.3, dtype=torch.bfloat16)
    found = []
    for one in (spoiled(batch, math.nan, names=(name,)), batch):
        one = one.trainable()
        output = one.loss(paint_loss, token_weights=weights_of(19), **SELECTING)
        found.append(results(output, [one.student, one.weight]))
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("teacher_top_k", [None, 7])
def test_logits(error, junk, reduction, teacher_top_k):
    generator = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, 19, 90, generator=generator)
    bounds, weights = torch.tensor([0, 7, 7, 19]), weights_of(19)
    options = {"reduction": reduction, "pointwise_clip": None, "token_weights": weights}
    options |= {"teacher_top_k": teacher_top_k, **SELECTING}
    spoiled_student, spoiled_teacher = student.clone(), teacher.clone()
    spoiled_student[weights == 0] = spoiled_teacher[weights == 0] = junk
    found = []
    for one, other, function in (
        (spoiled_student, spoiled_teacher, paint_loss_from_logits),
        (student, teacher, paint_loss_from_logits),
        (spoiled_student.double(), spoiled_teacher.double(), reference.paint_loss_from_logits),
    ):
        one = one.clone().requires_grad_()
        found.append(results(function(one, other, bounds, **options), [one]))
    check_equal(error, *found)


@pytest.mark.parametrize("junk", [math.nan, math.inf])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("reduction", ["sequence_mean", "none"])
@pytest.mark.parametrize("logit_softcap", [None, 5.0])
def test_a_served_top_k(build, error, junk, tail, reduction, logit_softcap):
    served = serve(build((7, 0, 12), 203, bias=True), 9)
    options = {"reduction": reduction, "tail": tail, "logit_softcap": logit_softcap}
    options |= {"token_weights": weights_of(19), "pointwise_clip": None, **SELECTING}
    found = []
    for one, dtype, function in (
        (spoiled(served, junk, names=("student", "logprobs")), None, paint_loss_from_topk),
        (served, None, paint_loss_from_topk),
        (
            *(spoiled(served, junk, names=("student", "logprobs")), torch.float64),
            reference_topk.paint_loss_from_topk,
        ),
    ):
        one = one.trainable(dtype)
        found.append(results(one.loss(function, **options), list(one.trained.values())))
    check_equal(error, *found)


def test_they_are_ranked_last_and_count(build):
    """ceil(0.25 * 8) of 8 positions, of which one is left that has a weight."""
    batch = build((8,), 61)
    weights = torch.zeros(8)
    weights[5] = 1.0
    output = batch.loss(paint_loss, token_weights=weights, top_fraction=0.25)
    assert output.selected[5] and output.selected.sum() == 2
    torch.testing.assert_close(output.loss, output.token_loss[5] / 8)


def test_a_token_of_another_weight_is_not_hidden(build):
    batch = build((5,), 61)
    batch.student[2] = math.nan
    for weight in (1e-20, -1.0, math.nan):
        weights = torch.ones(5)
        weights[2] = weight
        assert batch.loss(paint_loss, token_weights=weights).loss.isnan()


def test_rows_of_weight_0():
    rows, zero = torch.tensor([[math.nan, 1.0], [2.0, math.inf]]), torch.tensor([True, False])
    expected = torch.tensor([[0.0, 0.0], [2.0, math.inf]])
    assert torch.equal(without_rows(rows, zero), expected)
    assert without_rows(rows, None) is rows
    clear_rows(rows, zero)
    assert torch.equal(rows, expected)
    loss = weighted(torch.tensor([math.nan, 3.0]), torch.tensor([0.0, -2.0]))
    assert loss.tolist() == [0.0, -6.0]
