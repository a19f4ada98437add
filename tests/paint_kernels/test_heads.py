"""Heads with a bias, a scale and a softcap, and what a caller gives for each token, in PyTorch."""

import dataclasses
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from paint_kernels import (
    PaintLoss,
    _plan,
    _torch_backend,
    _torch_divergences,
    paint_loss,
    paint_loss_from_logits,
    reference,
    select_top_fraction,
    token_logprobs,
    token_stats,
)
from paint_kernels._heads import Head, Heads, add_bias_gradient
from paint_kernels._torch_divergences import DIVERGENCES

LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=4).map(tuple)


@pytest.fixture(autouse=True, scope="module")
def small_chunks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_plan, "CPU_CHUNK_ELEMENTS", 1500)
        patch.setattr(_torch_backend, "BLOCK_ELEMENTS", 600)
        patch.setattr(_torch_divergences, "TILE", 64)
        yield


def per_token(num_tokens, *, seed=0, signed=True):
    """Weights of both signs, some of them 0, and temperatures."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(num_tokens, generator=generator)
    weights[::4] = 0.0
    temperatures = 0.6 + torch.rand(num_tokens, generator=generator)
    return {"token_weights": weights if signed else weights.abs(), "temperature": temperatures}


@settings(deadline=None, derandomize=True, max_examples=80)
@given(
    lengths=LENGTHS,
    vocab_size=st.integers(2, 200),
    logit_scale=st.sampled_from([1.0, 0.25, 2.0]),
    logit_softcap=st.sampled_from([None, 6.0, 30.0]),
    own_head=st.booleans(),
    bias=st.booleans(),
    by_token=st.booleans(),
    selected=st.booleans(),
    divergence=st.sampled_from(list(DIVERGENCES)),
    clip=st.booleans(),
    top_k=st.booleans(),
    top_fraction=st.sampled_from([0.0, 0.3, 1.0]),
    interpolation_weight=st.sampled_from([0.0, 0.3]),
    reduction=st.sampled_from(["sequence_mean", "token_mean", "sum", "none"]),
    chunk_rows=st.sampled_from([None, 1, 4, 100]),
    head=st.booleans(),
    seed=st.integers(0, 50),
)
def test_everything_at_once(
    build, check, clip_for, lengths, vocab_size, own_head, bias, by_token, selected, clip, top_k,
    head, seed, reduction, chunk_rows, **options,
):  # fmt: skip
    own = 9 if own_head else None
    batch = build(lengths, vocab_size, teacher_hidden=own, bias=bias, seed=seed)
    num_tokens = sum(lengths)
    if own_head:
        options |= {"teacher_logit_scale": 0.7, "teacher_logit_softcap": 5.0}
    if selected:
        options["selected"] = torch.arange(num_tokens) % 3 == 1
    if by_token:
        options |= per_token(num_tokens, seed=seed)
    if top_k:
        options["teacher_top_k"] = min(7, vocab_size)
    tau = clip_for(batch, **options) if clip and num_tokens and not top_k else None
    options |= {"reduction": reduction, "chunk_rows": chunk_rows}
    check(paint_loss, batch, head=head, pointwise_clip=tau, **options)


@pytest.mark.parametrize("wanted", [("student",), ("weight",), ("bias",), ("weight", "bias")])
@pytest.mark.parametrize("reduction", ["sequence_mean", "none"])
def test_each_gradient_alone(build, error, wanted, reduction):
    batch = build((5, 7), 61, bias=True)
    options = {"reduction": reduction, "logit_softcap": 4.0, "pointwise_clip": None}
    found = []
    for one, function in ((batch, paint_loss), (batch.double(), reference.paint_loss)):
        for name in wanted:
            getattr(one, name).requires_grad_()
        loss = one.loss(function, **options).loss.sum()
        found.append(torch.autograd.grad(loss, [getattr(one, name) for name in wanted]))
    for actual, expected in zip(*found, strict=True):
        assert error(actual, expected) < 2e-4


@pytest.mark.parametrize("head", [True, False])
def test_float64(build, check, head):
    batch = build(bias=True, dtype=torch.float64)
    options = {"logit_scale": 0.5, "logit_softcap": 2.0, **per_token(17)}
    check(paint_loss, batch, head=head, tolerance=1e-12, pointwise_clip=None, **options)


def test_a_bias_in_float64_makes_the_result_float64(build):
    batch = build(bias=True)
    output = dataclasses.replace(batch, bias=batch.bias.double()).loss(paint_loss)
    assert output.loss.dtype == torch.float64


def test_the_teacher_defaults_to_the_student_only_without_its_own_head(build):
    head = {"logit_scale": 0.5, "logit_softcap": 2.0}
    own = {"teacher_logit_scale": 0.5, "teacher_logit_softcap": 2.0}
    batch = build(bias=True)
    shared = batch.loss(paint_loss, **head)
    spelled = dataclasses.replace(batch, teacher_bias=batch.bias).loss(paint_loss, **head, **own)
    again = dataclasses.replace(batch, teacher_weight=batch.weight.clone(), teacher_bias=batch.bias)
    for other in (spelled, again.loss(paint_loss, **head, **own)):
        torch.testing.assert_close(other.token_kl, shared.token_kl)
    apart = dataclasses.replace(batch, teacher_weight=batch.weight.clone())
    for missing, said in (("scale", "0.5"), ("softcap", "2.0")):
        given = {name: value for name, value in own.items() if missing not in name}
        message = (
            rf"^logit_{missing} is {said}, and the teacher has a head of its own without teacher"
        )
        with pytest.raises(ValueError, match=message):
            apart.loss(paint_loss, **head, **given)
    none = {"teacher_logit_scale": 1, "teacher_logit_softcap": math.inf}
    plain = apart.loss(paint_loss, **head, **none)
    entropy = token_stats(batch.teacher, batch.weight).entropy
    torch.testing.assert_close(plain.teacher_entropy, entropy)
    assert Heads(batch.weight, batch.bias, batch.weight).teacher == Head(batch.weight)


@pytest.mark.parametrize("logit_softcap", [None, 2.0])
@pytest.mark.parametrize("chunk_rows", [None, 4])
@pytest.mark.parametrize("wanted", [("student",), ("bias",), ("student", "weight", "bias")])
def test_token_functions(build, error, logit_softcap, chunk_rows, wanted):
    batch, ids = build((13,), 90, bias=True), torch.arange(13)
    head = {"logit_scale": 0.7, "logit_softcap": logit_softcap, "vocab_size": 80}
    temperature, upstream = per_token(13)["temperature"], torch.linspace(0.5, 2, 13)
    found = []
    for one, functions, more in (
        (batch, (token_logprobs, token_stats), {"chunk_rows": chunk_rows}),
        (batch.double(), (reference.token_logprobs, reference.token_stats), {}),
    ):
        for name in wanted:
            getattr(one, name).requires_grad_()
        settings = {**head, **more, "lm_head_bias": one.bias, "temperature": temperature}
        logprobs, entropy = functions[0](one.student, one.weight, ids, **settings)
        stats = functions[1](one.student, one.weight, **settings)
        assert not stats.entropy.requires_grad and not entropy.requires_grad
        grads = torch.autograd.grad(
            logprobs, [getattr(one, name) for name in wanted], upstream.to(logprobs)
        )
        found.append((logprobs, entropy, *stats, *grads))
    for actual, expected in zip(*found, strict=True):
        assert error(actual, expected) < 2e-4


def test_one_temperature_for_all_tokens_is_that_number(build):
    """Both as a number, which the row functions apply, and divided into the logits."""
    batch = build((6, 11), bias=True).trainable()
    one = batch.loss(paint_loss, temperature=0.7)
    each = batch.loss(paint_loss, temperature=torch.full((17,), 0.7))
    inputs = (batch.student, batch.weight, batch.bias)
    for actual, expected in zip(
        (*each, *torch.autograd.grad(each.loss, inputs)),
        (*one, *torch.autograd.grad(one.loss, inputs)),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_logits_with_a_temperature_weight_and_selection_of_their_own(error):
    generator = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, 12, 90, generator=generator)
    bounds, given = torch.tensor([0, 5, 12]), torch.arange(12) % 2 == 0
    options = {"pointwise_clip": None, "selected": given, **per_token(12)}
    for reduction in ("sequence_mean", "none"):
        mine, wide = student.clone().requires_grad_(), student.double().requires_grad_()
        output = paint_loss_from_logits(mine, teacher, bounds, reduction=reduction, **options)
        exact = reference.paint_loss_from_logits(
            wide, teacher.double(), bounds, reduction=reduction, **options
        )
        assert torch.equal(output.selected, given) and error(output.loss, exact.loss) < 2e-4
        output.loss.sum().backward()
        exact.loss.sum().backward()
        assert error(mine.grad, wide.grad) < 2e-4
        assert torch.equal(teacher, teacher.clone())


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean", "sum", "none"])
def test_token_weights_change_no_denominator(build, reduction):
    batch, weights = build((3, 0, 6)), per_token(9)["token_weights"]
    options = {"pointwise_clip": None, "reduction": reduction}
    output = batch.loss(paint_loss, token_weights=weights, **options)
    # Tokens of weight 0 are ranked last.
    options["selected"] = output.selected
    plain = batch.loss(paint_loss, **options)
    assert torch.equal(output.token_loss, plain.token_loss)
    shares = {
        "sequence_mean": torch.tensor([1 / 6] * 3 + [1 / 12] * 6),
        "token_mean": torch.full((9,), 1 / 9),
    }.get(reduction, torch.ones(9))
    expected = plain.token_loss * weights * shares
    torch.testing.assert_close(output.loss, expected if reduction == "none" else expected.sum())
    ones = batch.loss(paint_loss, token_weights=torch.ones(9, dtype=torch.bool), **options)
    torch.testing.assert_close(ones.loss, plain.loss)


def test_a_weight_of_0_removes_the_gradient(build):
    batch = build((5, 4)).trainable()
    weights = torch.arange(9) % 2
    loss = batch.loss(paint_loss, token_weights=weights).loss
    (gradient,) = torch.autograd.grad(loss, batch.student)
    assert (gradient[weights == 0] == 0).all() and (gradient[weights == 1] != 0).any(dim=1).all()


@pytest.mark.parametrize("interpolation_weight", [0.0, 0.3])
def test_a_selection_from_outside(build, interpolation_weight):
    """The selection of the gathered ratios, as of a rollout in two parts, gives the same losses."""
    batch = build((6, 11))
    options = {"interpolation_weight": interpolation_weight, "pointwise_clip": None}
    whole = batch.loss(paint_loss, top_fraction=0.3, **options)
    stats = [token_stats(hidden, batch.weight) for hidden in (batch.student, batch.teacher)]
    ratio = stats[1].entropy / stats[0].entropy
    chosen = select_top_fraction(ratio, batch.cu_seqlens, 0.3)
    parts = []
    for rows in (slice(0, 9), slice(9, 17)):
        part = paint_loss(
            *(batch.student[rows], batch.teacher[rows], batch.weight),
            torch.tensor([0, len(range(17)[rows])]),
            selected=chosen[rows],
            **options,
        )
        parts.append(part)
    for name in ("token_loss", "student_entropy", "teacher_entropy", "entropy_ratio", "selected"):
        joined = torch.cat([getattr(part, name) for part in parts])
        torch.testing.assert_close(joined, getattr(whole, name))


def labelled(build, lengths, seed):
    """A padded batch, labels that keep some of its rows, and the same rows packed by hand."""
    num_rows, longest = len(lengths), max(lengths, default=0)
    generator = torch.Generator().manual_seed(seed)
    padded = build((num_rows * longest,), 61, bias=True, seed=seed)
    labels = torch.randint(61, (num_rows, longest), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.4] = -1
    for row, length in enumerate(lengths):
        labels[row, length:] = -1
    return padded, labels


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=4),
    packed=st.booleans(),
    reduction=st.sampled_from(["sequence_mean", "token_mean", "none"]),
    more=st.booleans(),
    seed=st.integers(0, 50),
)
def test_labels(build, error, lengths, packed, reduction, more, seed):
    batch, labels = labelled(build, lengths, seed)
    shape, num_tokens = labels.shape, labels.numel()
    options = {"ignore_index": -1, "reduction": reduction, "pointwise_clip": None}
    options |= {"top_fraction": 0.3, "interpolation_weight": 0.3}
    given = {}
    if more:
        given = {**per_token(num_tokens), "selected": torch.arange(num_tokens) % 2 == 0}
    bounds = torch.arange(shape[0] + 1) * shape[1] if packed else None
    view = (num_tokens,) if packed else shape
    found = []
    for one, function in ((batch, paint_loss), (batch.double(), reference.paint_loss)):
        one = one.trainable()
        hidden = (one.student.view(*view, 16), one.teacher.view(*view, 16))
        output = function(
            *(*hidden, one.weight, bounds),
            labels=labels.view(view),
            lm_head_bias=one.bias,
            **{name: values.view(view) for name, values in given.items()},
            **options,
        )
        inputs = (one.student, one.weight, one.bias)
        found.append((*output, *torch.autograd.grad(output.loss.sum(), inputs)))
    for actual, expected in zip(*found, strict=True):
        assert actual.shape == expected.shape and error(actual, expected) < 2e-4
    kept = labels.view(view) != -1
    _, token_loss, *_, selected = found[0][:8]
    assert token_loss.shape == view
    assert (token_loss[~kept] == 0).all() and not selected[~kept].any()


def test_labels_are_rows_left_out_by_hand(build):
    batch, labels = labelled(build, [4, 0, 6], 3)
    rows = labels.flatten() != -1
    lengths = (labels != -1).sum(1)
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    options = {"lm_head_bias": batch.bias, "top_fraction": 0.3}
    expected = paint_loss(batch.student[rows], batch.teacher[rows], batch.weight, bounds, **options)
    hidden = (batch.student.view(3, 6, -1), batch.teacher.view(3, 6, -1))
    given = {"labels": labels, "ignore_index": -1, "lm_head_bias": batch.bias}
    for output in (
        paint_loss(*hidden, batch.weight, top_fraction=0.3, **given),
        PaintLoss(top_fraction=0.3)(*hidden, batch.weight, **given),
    ):
        assert torch.equal(output.loss, expected.loss)
        assert torch.equal(output.token_kl.flatten()[rows], expected.token_kl)


def test_the_module_passes_everything_on(build):
    batch = build((3, 5), 61, bias=True)
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    head = {"logit_scale": 0.7, "logit_softcap": 3.0, "teacher_logit_scale": 0.9}
    given = {**per_token(8), "selected": torch.arange(8) % 2 == 0}
    expected = batch.loss(paint_loss, chunk_rows=3, **head, **given)

    def padded(packed):
        values = packed.new_zeros(2, 5, *packed.shape[1:])
        values[mask] = packed
        return values

    module = PaintLoss(chunk_rows=3, **head)
    output = module(
        *(padded(batch.student), padded(batch.teacher), batch.weight),
        loss_mask=mask,
        lm_head_bias=batch.bias,
        **{name: padded(values) for name, values in given.items()},
    )
    for actual, wanted in zip(output, expected, strict=True):
        assert torch.equal(actual, wanted)
    assert "logit_softcap=3.0" in repr(module) and "chunk_rows=3" in repr(module)


def test_chunk_rows_bound_the_rows_whose_logits_exist(build, monkeypatch):
    """Of the three functions with a loop of their own."""
    from paint_kernels import _sources, _tokens

    sizes = []

    def chunk_buffer(num_rows, *arguments):
        sizes.append(num_rows)
        return make(num_rows, *arguments)

    make = _sources.chunk_buffer
    monkeypatch.setattr(_sources, "chunk_buffer", chunk_buffer)
    monkeypatch.setattr(_tokens, "chunk_buffer", chunk_buffer)
    batch = build((10, 7), 61)
    batch.loss(paint_loss, chunk_rows=5)
    token_stats(batch.student, batch.weight, chunk_rows=5)
    token_logprobs(batch.student, batch.weight, torch.arange(17), chunk_rows=5)
    assert sizes == [10, 5, 5]  # of both models, then of one


def test_the_gradient_of_a_bias_in_parts(monkeypatch, error):
    monkeypatch.setattr("paint_kernels._heads.BIAS_TILE", 7)
    gradient, weights = torch.randn(5, 40).half(), torch.randn(5)
    total = torch.ones(40)
    add_bias_gradient(gradient, weights, total)
    assert error(total, 1 + weights.double() @ gradient.double()) < 1e-6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"logit_scale": 0.0}, "logit_scale is 0.0: it must be a finite number above 0"),
        ({"logit_softcap": -1.0}, "logit_softcap is -1.0: it must be a number above 0, or inf for"),
        ({"teacher_logit_scale": -2}, "teacher_logit_scale is -2"),
        ({"teacher_logit_softcap": 0}, "teacher_logit_softcap is 0"),
        ({"lm_head_bias": torch.ones(61, 1)}, "lm_head_bias is torch.float32 of shape (61, 1)"),
        ({"lm_head_bias": torch.ones(60)}, "it must be floating point, (61,) on cpu"),
        ({"lm_head_bias": torch.ones(61).long()}, "lm_head_bias is torch.int64"),
        ({"teacher_lm_head_bias": torch.ones(9)}, "teacher_lm_head_bias is torch.float32"),
        ({"token_weights": torch.ones(11)}, "token_weights is torch.float32 of shape (11,)"),
        ({"token_weights": [1.0] * 12}, "token_weights is of type list"),
        ({"token_weights": torch.ones(12, requires_grad=True)}, "the loss has none by it: detach"),
        ({"temperature": torch.ones(11)}, "temperature is torch.float32 of shape (11,) on cpu: it"),
        ({"temperature": torch.ones(12, device="meta")}, "of shape (12,) on meta"),
        ({"temperature": torch.zeros(12)}, "temperature spans 0.0..0.0: every token needs"),
        ({"temperature": torch.full((12,), torch.inf)}, "every token needs a finite number"),
        ({"selected": torch.ones(12)}, "selected is torch.float32: it must be bool"),
        ({"chunk_rows": 0}, "chunk_rows is 0: it must be an integer above 0, or None"),
        ({"chunk_rows": 2.5}, "chunk_rows is 2.5"),
        ({"labels": torch.ones(12)}, "labels is torch.float32: it must be a tensor of int32"),
        ({"labels": [1] * 12}, "labels is list"),
        ({"labels": torch.ones(12, device="meta").long()}, "labels is on meta, other inputs on cp"),
        ({"labels": torch.ones(3, 4).long()}, "labels has shape (3, 4): it must be (B, T)"),
        ({"labels": torch.ones(11).long()}, "cu_seqlens is [0, 5, 12]"),
    ],
)
def test_errors(build, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        batch = build((5, 7), 61)
        paint_loss(batch.student, batch.teacher, batch.weight, batch.cu_seqlens, **settings)


def test_labels_without_bounds_have_a_row_for_each_rollout(build):
    batch = build((12,), 61)
    tensors = (batch.student, batch.teacher, batch.weight)
    with pytest.raises(ValueError, match=r"labels has shape \(12,\): it must be \(B, T\)"):
        paint_loss(*tensors, labels=torch.ones(12).long())
    with pytest.raises(ValueError, match=r"student_hidden_states has shape \(12, 16\), the labels"):
        paint_loss(*tensors, labels=torch.ones(3, 4).long())
    with pytest.raises(ValueError, match="cu_seqlens is of type NoneType: it must be a tensor"):
        paint_loss(*tensors)


@pytest.mark.parametrize("name", ["teacher_hidden_states", "token_weights"])
def test_what_labels_cut_is_where_they_are(build, name):
    batch = build((12,), 61)
    tensors = {"student_hidden_states": batch.student, "teacher_hidden_states": batch.teacher}
    tensors = {key: one.view(3, 4, -1) for key, one in tensors.items()}
    tensors |= {"lm_head_weight": batch.weight, "token_weights": torch.ones(3, 4)}
    tensors[name] = tensors[name].to("meta")
    with pytest.raises(ValueError, match=f"{name} is on meta, other inputs on cpu: move them to"):
        paint_loss(**tensors, labels=torch.ones(3, 4).long())


def test_a_module_setting_is_one_number():
    with pytest.raises(ValueError, match=r"temperature has shape \(3,\): it must be one number"):
        PaintLoss(temperature=torch.ones(3))


def test_a_head_whose_bias_can_be_seen(build):
    batch = build((5, 7), 61)
    layer = nn.Linear(16, 61)
    with pytest.raises(ValueError, match=r"a \(V, H\) tensor, and its bias as lm_head_bias"):
        paint_loss(batch.student, batch.teacher, layer, batch.cu_seqlens)
    with pytest.raises(ValueError, match="its bias as teacher_lm_head_bias"):
        paint_loss(
            *(batch.student, batch.teacher, batch.weight, batch.cu_seqlens),
            teacher_lm_head_weight=layer,
        )


def test_top_k_of_a_teacher_in_float64_trains_a_float32_head(build, check):
    batch = build((5, 7), 61, dtype=torch.float32)
    wide = dataclasses.replace(batch, teacher=batch.teacher.double())
    check(paint_loss, wide, teacher_top_k=3, pointwise_clip=None)
