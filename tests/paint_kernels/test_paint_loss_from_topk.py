"""paint_loss_from_topk in PyTorch against the float64 reference, and what the operators owe."""

import dataclasses
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from served import TAILS, Served, check_served, clear_clip, error_of, serve

from paint_kernels import (
    LossSettings,
    _plan,
    _topk_ops,
    _torch_topk,
    paint_loss,
    paint_loss_from_topk,
    reference,
    reference_topk,
)
from paint_kernels._heads import Head, Heads, Projection
from paint_kernels._shards import WHOLE
from paint_kernels._torch_divergences import DIVERGENCES

LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=5).map(tuple)


@pytest.fixture(autouse=True, scope="module")
def small_chunks():
    """Several chunks and pieces even at test sizes, none of them aligned with a rollout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_plan, "CPU_CHUNK_ELEMENTS", 1500)
        patch.setitem(_torch_topk.GATHERED_ELEMENTS, "cpu", 600)
        yield


@pytest.mark.parametrize("noise", [None, 0.05])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence_tail_and_clip(build, divergence, tail, clip, noise):
    served = serve(build((7, 0, 1, 12), 203, noise=noise), 9)
    options = {"divergence": divergence, "jsd_weight": 0.3, "tail": tail, "temperature": 0.8}
    options |= {"top_fraction": 0.3, "interpolation_weight": 0.3}
    around = 0.03 if noise is None else {"jsd": 1e-5}.get(divergence, 1e-3)
    tau = clear_clip(served, around, **options) if clip else None
    output = check_served(served, pointwise_clip=tau, **options)
    assert (output.clipped_mass > 0).any().item() is clip


@settings(deadline=None, derandomize=True, max_examples=90)
@given(
    lengths=LENGTHS,
    vocab_size=st.integers(2, 120),
    hidden=st.integers(1, 20),
    k=st.floats(0, 1),
    tail=st.sampled_from(TAILS),
    temperature=st.floats(0.7, 1.3),
    divergence=st.sampled_from(list(DIVERGENCES)),
    top_fraction=st.sampled_from([0.0, 0.03, 0.5, 1.0]),
    interpolation_weight=st.sampled_from([0.0, 0.03, 0.5]),
    clip=st.booleans(),
    reduction=st.sampled_from(["sequence_mean", "token_mean", "sum", "none"]),
    head=st.booleans(),
    seed=st.integers(0, 100),
)
def test_ragged_rows_and_odd_shapes(
    build, lengths, vocab_size, hidden, k, clip, reduction, head, seed, **options
):
    batch = build(lengths, vocab_size, hidden=hidden, seed=seed)
    served = serve(batch, 1 + int(k * (vocab_size - 1)), seed=seed)
    tau = clear_clip(served, 0.05, **options) if clip else None
    check_served(served, head=head, reduction=reduction, pointwise_clip=tau, **options)


def by_token(num_tokens, seed=0):
    """Weights of both signs, some of them 0, and temperatures."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(num_tokens, generator=generator)
    weights[::4] = 0.0
    temperatures = 0.6 + torch.rand(num_tokens, generator=generator)
    return {"token_weights": weights, "temperature": temperatures}


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    lengths=LENGTHS,
    vocab_size=st.integers(2, 120),
    k=st.floats(0, 1),
    tail=st.sampled_from(TAILS),
    logit_scale=st.sampled_from([1.0, 0.25, 2.0]),
    logit_softcap=st.sampled_from([None, 6.0, 30.0, math.inf]),
    bias=st.booleans(),
    each=st.booleans(),
    selected=st.booleans(),
    divergence=st.sampled_from(list(DIVERGENCES)),
    top_fraction=st.sampled_from([0.0, 0.3, 1.0]),
    interpolation_weight=st.sampled_from([0.0, 0.3]),
    clip=st.booleans(),
    reduction=st.sampled_from(["sequence_mean", "token_mean", "sum", "none"]),
    chunk_rows=st.sampled_from([None, 1, 4, 100]),
    head=st.booleans(),
    seed=st.integers(0, 50),
)
def test_everything_at_once(
    build, lengths, vocab_size, k, bias, each, selected, clip, reduction, chunk_rows, head, seed,
    **options,
):  # fmt: skip
    served = serve(build(lengths, vocab_size, bias=bias, seed=seed), 1 + int(k * (vocab_size - 1)))
    if selected:
        options["selected"] = torch.arange(sum(lengths)) % 3 == 1
    if each:
        options |= by_token(sum(lengths), seed)
    tau = clear_clip(served, 0.05, **options) if clip else None
    options |= {"reduction": reduction, "chunk_rows": chunk_rows}
    check_served(served, head=head, pointwise_clip=tau, **options)


@pytest.mark.parametrize("tail", TAILS)
def test_everything_in_float64(build, tail):
    served = serve(build((5, 0, 8), 77, bias=True, dtype=torch.float64), 6)
    ids = torch.where(served.ids < 70, served.ids, -1)
    served = dataclasses.replace(served, ids=ids)
    options = {"logit_scale": 0.5, "logit_softcap": 2.0, **by_token(13), "pointwise_clip": None}
    check_served(served, tail=tail, tolerance=1e-11, vocab_size=70, **options)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("each", [True, False])
def test_half_precision_products_with_a_softcap(build, half_products_anywhere, tail, each):
    batch = build((7, 0, 12), 301, noise=0.3, bias=True, dtype=torch.bfloat16)
    options = {"logit_scale": 0.5, "logit_softcap": 3.0, "pointwise_clip": None}
    if each:
        options |= by_token(19)
    check_served(serve(batch, 9), tail=tail, tolerance=6e-3, **options)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("wanted", [("student",), ("weight",), ("bias",), ("weight", "bias")])
@pytest.mark.parametrize("reduction", ["sequence_mean", "none"])
def test_each_gradient_alone(build, tail, wanted, reduction):
    served = serve(build((5, 7), 61, bias=True), 6)
    options = {"tail": tail, "reduction": reduction, "logit_softcap": 4.0, "pointwise_clip": None}
    found = []
    for dtype, function in (
        (None, paint_loss_from_topk),
        (torch.float64, reference_topk.paint_loss_from_topk),
    ):
        one = served.trainable(dtype)
        for name in {"student", "weight", "bias"} - set(wanted):
            getattr(one, name).requires_grad_(False)
        loss = one.loss(function, **options).loss.sum()
        found.append(torch.autograd.grad(loss, [getattr(one, name) for name in wanted]))
    for actual, expected in zip(*found, strict=True):
        assert error_of(actual, expected) < 2e-4


def test_a_bias_in_float64_makes_the_result_float64(build):
    served = serve(build(bias=True), 4)
    wide = dataclasses.replace(served, bias=served.bias.double())
    for tail in TAILS:
        assert wide.loss(paint_loss_from_topk, tail=tail).loss.dtype == torch.float64


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("reduction", ["sequence_mean", "none"])
def test_labels(build, tail, packed, reduction):
    """Rows left out by labels, whose answers of the teacher may be anything."""
    served = serve(build((6, 6, 6), 61, bias=True), 5).trainable()
    view = (18,) if packed else (3, 6)
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(61, view, generator=generator)
    labels[torch.rand(view, generator=generator) < 0.4] = -1
    labels.view(3, 6)[1] = -1
    ids = torch.where(labels.flatten()[:, None] == -1, 999, served.ids)
    given = {**by_token(18), "selected": torch.arange(18) % 2 == 0}
    found = []
    for dtype, function in (
        (None, paint_loss_from_topk),
        (torch.float64, reference_topk.paint_loss_from_topk),
    ):
        one = served.trainable(dtype)
        output = function(
            *(one.student.view(*view, 16), one.weight),
            *(ids.view(*view, 5), one.logprobs.view(*view, 5)),
            one.cu_seqlens if packed else None,
            labels=labels,
            ignore_index=-1,
            lm_head_bias=one.bias,
            reduction=reduction,
            tail=tail,
            pointwise_clip=None,
            **{name: values.view(view) for name, values in given.items()},
        )
        grads = torch.autograd.grad(output.loss.sum(), list(one.trained.values()))
        found.append((*output, *grads))
    for actual, expected in zip(*found, strict=True):
        assert actual.shape == expected.shape and error_of(actual, expected) < 2e-4
    assert (found[0][1][labels == -1] == 0).all()


def test_chunk_rows_bound_the_rows_whose_logits_exist(build, monkeypatch):
    from paint_kernels import _tokens

    sizes = []

    def chunk_buffer(num_rows, *arguments):
        sizes.append(num_rows)
        return make(num_rows, *arguments)

    make = _tokens.chunk_buffer
    monkeypatch.setattr(_tokens, "chunk_buffer", chunk_buffer)
    serve(build((10, 7), 61), 4).loss(paint_loss_from_topk, chunk_rows=5)
    assert sizes == [5]


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_whole_vocabulary_is_paint_loss(build, divergence, tail):
    """At temperature 1 of the student, and with no tail left, all three are the loss itself."""
    batch = build((7, 0, 1, 12), 61, noise=0.3)
    served = serve(batch, 61, ragged=False).trainable()
    options = {"divergence": divergence, "top_fraction": 0.3, "pointwise_clip": None}
    output = served.loss(paint_loss_from_topk, tail=tail, **options)
    whole = batch.trainable()
    expected = whole.loss(paint_loss, **options)
    assert torch.equal(output.selected, expected.selected)
    assert error_of(output.token_kl, expected.token_kl) < 2e-4
    actual = torch.autograd.grad(output.loss, (served.student, served.weight))
    wanted = torch.autograd.grad(expected.loss, (whole.student, whole.weight))
    for one, other in zip(actual, wanted, strict=True):
        assert error_of(one, other) < 2e-4


def test_renormalise_is_teacher_top_k(build):
    batch = build((7, 0, 1, 12), 203)
    options = {"top_fraction": 0.3, "interpolation_weight": 0.3, "pointwise_clip": None}
    served = serve(batch, 9, ragged=False)
    output = served.loss(paint_loss_from_topk, tail="renormalise", **options)
    expected = batch.loss(paint_loss, teacher_top_k=9, **options)
    assert error_of(output.token_kl, expected.token_kl) < 1e-5
    assert error_of(output.teacher_entropy, expected.teacher_entropy) < 1e-5


def test_a_bucket_loses_divergence_and_a_dropped_tail_can_be_negative(build):
    batch = build((20,), 203, noise=0.5)
    options = {"top_fraction": 0.0, "pointwise_clip": None}
    served = serve(batch, 5, ragged=False)
    bucket = served.loss(paint_loss_from_topk, **options).token_kl
    whole = batch.loss(paint_loss, **options).token_kl
    assert (bucket >= 0).all() and (bucket <= whole).all()
    options |= {"divergence": "reverse_kl", "tail": "drop"}
    assert (served.loss(paint_loss_from_topk, **options).token_kl < 0).any()


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_confident_teachers_keep_a_tail(build, divergence, tail):
    """Probabilities that sum to 1, or by rounding to more, leave the least tail."""
    batch = build((6,), 50)
    served = serve(batch, 3, ragged=False)
    logprobs = torch.tensor([0.0, -20.0, -21.0]).repeat(6, 1)
    logprobs[3:, 1] = math.log(0.009)
    served = dataclasses.replace(served, logprobs=logprobs)
    output = check_served(
        served, tail=tail, divergence=divergence, pointwise_clip=None, top_fraction=0.5
    )
    assert output.token_kl.isfinite().all()


@pytest.mark.parametrize("tail", TAILS)
def test_confident_students_keep_their_digits(build, tail):
    """A tail of 1e-8, which 1 minus the sum of the probabilities would lose."""
    batch = build((6,), 150, noise=0.02)
    batch.weight[:, 0] = 0.0
    batch.weight[7] = 0.0
    batch.weight[7, 0] = 1.0
    for hidden in (batch.student, batch.teacher):
        hidden[:, 0] = torch.linspace(17.0, 19.0, 6)
        hidden[:, 1:] *= 0.5
    served = serve(batch, 4, ragged=False)
    check_served(served, tail=tail, pointwise_clip=None, top_fraction=0.5)


@pytest.mark.parametrize("tail", TAILS)
def test_rows_without_ids_are_tokens_without_loss(build, tail):
    served = serve(build((4, 3), 50), 5, ragged=False)
    ids = served.ids.clone()
    ids[[1, 5]] = -1
    output = check_served(dataclasses.replace(served, ids=ids), tail=tail, pointwise_clip=None)
    assert (output.token_kl == 0).nonzero()[:, 0].tolist() == [1, 5]
    nothing = dataclasses.replace(served, ids=torch.full_like(ids, -1)).trainable()
    loss = nothing.loss(paint_loss_from_topk, tail=tail).loss
    loss.backward()
    assert loss == 0 and nothing.student.grad.norm() == nothing.weight.grad.norm() == 0


@pytest.mark.parametrize("tail", TAILS)
def test_probabilities_of_zero(build, tail):
    served = serve(build((4, 3), 50), 5, ragged=False)
    logprobs = served.logprobs.clone()
    logprobs[:, 2] = -math.inf
    logprobs[3] = -math.inf
    served = dataclasses.replace(served, logprobs=logprobs)
    output = check_served(served, tail=tail, pointwise_clip=None, top_fraction=0.5)
    # All of the last one's probability is in its tail.
    assert (output.token_kl[3] > 0).item() is (tail == "bucket")


@pytest.mark.parametrize("tail", TAILS)
def test_padded_heads_and_float64(build, tail):
    batch = build((5, 8), 100, dtype=torch.float64)
    served = serve(dataclasses.replace(batch, weight=batch.weight[:77]), 6)
    served = dataclasses.replace(served, weight=batch.weight)
    output = check_served(
        served, tail=tail, vocab_size=77, tolerance=1e-11, pointwise_clip=None, temperature=1.3
    )
    assert output.loss.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tail", TAILS)
def test_half_precision_rounds_inputs_and_gradients_only(build, dtype, tail):
    served = serve(build((5, 0, 8), noise=0.3, dtype=dtype), 9)
    options = {"tail": tail, "pointwise_clip": None, "top_fraction": 0.3}
    output = check_served(served, tolerance=6e-3, **options)
    exact = served.trainable(torch.float64).loss(reference_topk.paint_loss_from_topk, **options)
    torch.testing.assert_close(output.token_kl.double(), exact.token_kl, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("tail", TAILS)
def test_half_precision_products(build, half_products_anywhere, tail):
    """What a GPU runs: float32 logits, and the tail back through the head in float16."""
    served = serve(build((7, 0, 12), 301, noise=0.3, dtype=torch.bfloat16), 9)
    check_served(served, tail=tail, tolerance=6e-3, pointwise_clip=None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_groups_of_chunks_for_the_head(
    build, half_products_anywhere, monkeypatch, head_products, dtype
):
    """Five chunks of at most four rows, two in a group."""
    monkeypatch.setattr(_plan, "HEAD_GROUP_ROWS", 5)
    served = serve(build((7, 0, 12), 301, noise=0.3, dtype=dtype), 9)
    mine, exact = served.trainable(), served.trainable(torch.float64)
    options = {"temperature": 0.8, "pointwise_clip": None, "reduction": "sum"}
    mine.loss(paint_loss_from_topk, **options, chunk_rows=4).loss.backward()
    exact.loss(reference_topk.paint_loss_from_topk, **options).loss.backward()
    assert head_products == [(8, False), (8, True), (3, True)]
    rounding = error_of(exact.weight.grad.to(dtype), exact.weight.grad)
    assert error_of(mine.weight.grad, exact.weight.grad) < 1.1 * rounding + 2e-4


@pytest.mark.parametrize("tail", TAILS)
def test_autocast_rounds_the_inputs_alone(build, tail):
    """Also where the backward pass runs under it."""
    served = serve(build((5, 8), noise=0.3), 9).trainable()
    with torch.autocast("cpu", torch.bfloat16):
        output = served.loss(paint_loss_from_topk, tail=tail)
        actual = torch.autograd.grad(output.loss, (served.student, served.weight))
    rounded = served.trainable(torch.bfloat16).trainable(torch.float32)
    expected = rounded.loss(paint_loss_from_topk, tail=tail)
    assert error_of(output.token_kl, expected.token_kl) < 1e-5
    wanted = torch.autograd.grad(expected.loss, (rounded.student, rounded.weight))
    for one, other in zip(actual, wanted, strict=True):
        assert error_of(one, other) < 4e-3


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("lengths", [(), (0, 0)])
def test_no_tokens(build, lengths, tail):
    served = serve(build(lengths, 30), 4).trainable()
    output = served.loss(paint_loss_from_topk, tail=tail)
    output.loss.backward()
    assert output.loss == 0 and torch.equal(served.weight.grad, torch.zeros_like(served.weight))


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("more", [True, False])
@pytest.mark.parametrize("tail", TAILS)
def test_opcheck(build, tail, more, per_token):
    served = serve(build((5, 0, 7), 61, bias=more), 6).trainable()
    weights = None if per_token else torch.rand(12)
    by_token = None, None, None
    if more:
        by_token = torch.arange(12) % 4 == 0, torch.rand(12) + 0.5, torch.arange(12) % 3 == 0
    options = LossSettings(temperature=0.9, top_fraction=0.3, backend="torch").arguments()
    options += WHOLE.arguments()
    head = served.weight, served.bias, *(0.7, 3.0 if more else None)
    tensors = served.student, *head, served.ids, served.logprobs, served.cu_seqlens
    torch.library.opcheck(
        _topk_ops.paint_loss_from_topk, (*tensors, weights, *by_token, True, True, tail, *options)
    )


@pytest.mark.parametrize("own_head", [True, False])
@pytest.mark.parametrize("more", [True, False])
def test_opcheck_of_teacher_top_k_and_the_gradients(build, own_head, more):
    batch = build((5, 0, 7), 61, teacher_hidden=9 if own_head else None, bias=more).trainable()
    numbers = (0.7, 3.0) if more else (1.0, None)
    heads = Heads(batch.weight, batch.bias, batch.teacher_weight, batch.teacher_bias, *numbers)
    temperatures = torch.rand(12) + 0.5 if more else None
    given = torch.arange(12) % 3 == 0 if more else None
    zeros = torch.arange(12) % 4 == 0 if more else None
    options = LossSettings(teacher_top_k=4, top_fraction=0.3, backend="torch").arguments()
    options += WHOLE.arguments()
    tensors = batch.student, batch.teacher, *heads.arguments(), batch.cu_seqlens
    for weights in (None, torch.rand(12)):
        torch.library.opcheck(
            _topk_ops.paint_loss_teacher_top_k,
            (*tensors, weights, zeros, temperatures, given, True, *options),
        )
    served = serve(batch, 4)
    student, weight = batch.student.detach(), batch.weight.detach()
    for values, rest in ((torch.rand(12, 4), None), (torch.rand(12, 5), torch.rand(12))):
        arguments = values, served.ids, student, weight
        hidden = None if rest is None else torch.rand(12, 16)
        torch.library.opcheck(_topk_ops.support_hidden_gradient, (*arguments, hidden, *options))
        bias = None if batch.bias is None else batch.bias.detach()
        arguments = *arguments, bias, *numbers, temperatures, zeros, rest
        torch.library.opcheck(
            _topk_ops.support_head_gradient, (*arguments, True, bias is not None, *options)
        )


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("more", [True, False])
@pytest.mark.parametrize("reduction", ["sequence_mean", "none"])
def test_compiled_equals_eager(build, tail, more, reduction):
    torch._dynamo.reset()  # each case counts as a recompilation of this function
    options = {"tail": tail, "reduction": reduction}
    if more:
        options |= {"logit_scale": 0.7, "logit_softcap": 3.0, "chunk_rows": 5}

    def function(student, weight, ids, logprobs, bounds, **own):
        if more:
            each = torch.arange(len(ids), device=student.device)
            own |= {"token_weights": each % 4, "temperature": 0.5 + 0.1 * each}
            own["selected"] = each % 3 == 0
        output = paint_loss_from_topk(2 * student, weight, ids, logprobs, bounds, **own, **options)
        return output.loss.sum() * 3 + output.token_kl.sum()

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for lengths in ((5, 0, 7), (3, 2, 9)):
        served = serve(build(lengths, 61, bias=more), 6).trainable()
        expected, actual = served.loss(function), served.loss(compiled)
        assert torch.equal(actual, expected)
        inputs = list(served.trained.values())
        for one, other in zip(
            torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs), strict=True
        ):
            assert torch.equal(one, other)


def test_compiled_teacher_top_k(build):
    def function(student, teacher, weight, bounds):
        return paint_loss(student, teacher, weight, bounds, teacher_top_k=5).loss

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for lengths in ((5, 0, 7), (3, 2, 9)):
        batch = build(lengths, 61).trainable()
        inputs = batch.student, batch.teacher, batch.weight, batch.cu_seqlens
        assert torch.equal(compiled(*inputs), function(*inputs))


@pytest.mark.parametrize("tail", TAILS)
def test_two_backward_passes_and_one_gradient_at_a_time(build, tail):
    served = serve(build((5, 8)), 6).trainable()
    loss = served.loss(paint_loss_from_topk, tail=tail).loss
    inputs = served.student, served.weight
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(3 * loss, inputs)
    for one, three in zip(first, second, strict=True):
        torch.testing.assert_close(three, 3 * one)
    for name, both in zip(("student", "weight"), first, strict=True):
        alone = serve(build((5, 8)), 6)
        getattr(alone, name).requires_grad_()
        alone.loss(paint_loss_from_topk, tail=tail).loss.backward()
        assert error_of(getattr(alone, name).grad, both) < 1e-6
    with torch.no_grad():
        assert not served.loss(paint_loss_from_topk, tail=tail).loss.requires_grad


@pytest.mark.parametrize("tail", TAILS)
def test_no_tensor_of_the_size_of_the_logits(build, tail):
    """The largest tensor alive at any moment is a chunk's, not N x V. Operators are opaque to a
    dispatch mode, so their functions are called."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from paint_kernels import _topk

    class LargestTensor(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.numel = max(self.numel, result.numel())
            return result

    served, loss_settings = serve(build((60, 40), 300), 5), LossSettings(backend="torch")
    student = Projection(served.student, Head(served.weight), None, "torch")
    with LargestTensor() as largest:
        _topk.run_loss_from_topk(
            student,
            served.ids,
            served.logprobs,
            served.cu_seqlens,
            tail,
            loss_settings,
            with_hidden_gradient=True,
            with_gradient=True,
        )
    # Three buffers of the row functions, of a block of rows each.
    assert 0 < largest.numel <= 3 * _plan.most_rows(300, 16, torch.device("cpu"), 1) * 300


def test_teacher_top_k_makes_one_product(build, monkeypatch):
    """The teacher's, to find its largest logits; the rest are gathered rows of the head."""
    from paint_kernels import _heads

    rows = []

    def project(hidden_states, weight, out):
        rows.append(len(hidden_states))
        return torch.mm(hidden_states, weight.T, out=out)

    monkeypatch.setattr(_heads, "project", project)
    batch = build((7, 0, 12), 203).trainable()
    batch.loss(paint_loss, teacher_top_k=5).loss.backward()
    assert sum(rows) == 19


@pytest.mark.parametrize("field", ["ids", "logprobs"])
def test_rows_of_another_number(build, field):
    served = serve(build((5,), 30), 4)
    cut = dataclasses.replace(served, **{field: getattr(served, field)[1:]})
    with pytest.raises(ValueError, match=re.escape("both must be (5, K), K >= 1")):
        cut.loss(paint_loss_from_topk)


def with_row(served: Served, ids, logprobs) -> Served:
    new_ids, new_logprobs = served.ids.clone(), served.logprobs.clone()
    new_ids[2], new_logprobs[2] = torch.tensor(ids), torch.tensor(logprobs)
    return dataclasses.replace(served, ids=new_ids, logprobs=new_logprobs)


@pytest.mark.parametrize(
    ("ids", "logprobs", "message"),
    [
        ([1, 30], [-1.0, -2.0], "teacher_token_ids has 30 in row 2: ids must lie in 0..29"),
        ([1, -2], [-1.0, -2.0], "teacher_token_ids has -2 in row 2"),
        ([7, 7], [-1.0, -2.0], "teacher_token_ids has 7 in row 2: an id must not come twice"),
        ([7, 8], [-1.0, math.nan], "teacher_logprobs has nan in row 2"),
        ([7, 8], [-1.0, 0.5], "teacher_logprobs has 0.5 in row 2"),
        ([7, 8], [-0.5, -0.5], "of teacher_logprobs has 1.213"),
    ],
)
def test_wrong_rows_are_refused(build, ids, logprobs, message):
    served = with_row(serve(build((5,), 30), 2), ids, logprobs)
    with pytest.raises(ValueError, match=re.escape(message)):
        served.loss(paint_loss_from_topk)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"ids": torch.zeros(5, 2)}, {}, "teacher_token_ids is torch.float32"),
        ({"ids": [[1]]}, {}, "teacher_token_ids is of type list"),
        ({"logprobs": torch.zeros(5, 2, dtype=torch.int64)}, {}, "teacher_logprobs is torch.int64"),
        ({"logprobs": torch.zeros(5, 2, device="meta")}, {}, "teacher_logprobs is on meta"),
        ({"ids": torch.zeros(5, 2, dtype=torch.int64, device="meta")}, {}, "ids is on meta"),
        ({}, {"tail": "sum"}, "tail is 'sum': available are 'bucket', 'renormalise', 'drop'"),
        ({}, {"teacher_top_k": 2}, "here the columns of teacher_token_ids are the top-k"),
        ({}, {"logit_scale": 0.0}, "logit_scale is 0.0: it must be a finite number above 0"),
        ({}, {"logit_softcap": -1.0}, "logit_softcap is -1.0: it must be a number above 0"),
        ({}, {"lm_head_bias": torch.ones(29)}, "it must be floating point, (30,) on cpu"),
        ({}, {"token_weights": torch.ones(4)}, "token_weights is torch.float32 of shape (4,)"),
        ({}, {"temperature": torch.ones(4)}, "temperature is torch.float32 of shape (4,)"),
        ({}, {"temperature": torch.zeros(5)}, "temperature spans 0.0..0.0: every token needs"),
        ({}, {"selected": torch.ones(5)}, "selected is torch.float32: it must be bool"),
        ({}, {"chunk_rows": 0}, "chunk_rows is 0: it must be an integer above 0"),
        ({}, {"labels": torch.ones(5)}, "labels is torch.float32: it must be a tensor of int32"),
        ({}, {"labels": torch.ones(4).long()}, "cu_seqlens is [0, 5]"),
        ({"cu_seqlens": None}, {}, "cu_seqlens is of type NoneType: it must be a tensor"),
        ({}, {"vocab_size": 31}, "vocab_size is 31"),
    ],
)
def test_wrong_arguments_are_refused(build, changes, options, message):
    served = dataclasses.replace(serve(build((5,), 30), 2), **changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        served.loss(paint_loss_from_topk, **options)


def test_no_ids_at_all_are_refused(build):
    served = serve(build((5,), 30), 2)
    empty = dataclasses.replace(served, ids=served.ids[:, :0], logprobs=served.logprobs[:, :0])
    with pytest.raises(ValueError, match="K >= 1"):
        empty.loss(paint_loss_from_topk)


def test_the_reference_of_a_bucket_is_a_divergence_of_two_sums():
    """By hand, for one token with two of four ids."""
    logits = torch.tensor([[0.3, -1.0, 0.7, 2.0]], dtype=torch.float64)
    p = logits.softmax(-1)[0]
    p = torch.stack([p[3], p[0], p[1] + p[2]])
    q = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    output = reference_topk.paint_loss_from_topk(
        logits,
        torch.eye(4, dtype=torch.float64),
        torch.tensor([[3, 0]]),
        q[None, :2].log(),
        torch.tensor([0, 1]),
        pointwise_clip=None,
        top_fraction=0.0,
    )
    torch.testing.assert_close(output.token_kl[0], (q * (q / p).log()).sum())
    torch.testing.assert_close(output.student_entropy[0], reference.entropy_of(p.log()))
