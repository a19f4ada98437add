"""Losses on the teacher's top-k with the Triton backend, like the cases of triton_cases.py."""

import dataclasses

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from served import TAILS, check_served, clear_clip, error_of, serve

from paint_kernels import (
    LossSettings,
    _tokens,
    _topk_ops,
    _torch_topk,
    _triton_backend,
    _triton_topk,
    paint_loss,
    paint_loss_from_topk,
)
from paint_kernels._heads import Head
from paint_kernels._shards import WHOLE
from paint_kernels._torch_divergences import DIVERGENCES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True, scope="module")
def small_tiles():
    """Several tiles, chunks and a ragged last one even at test sizes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_triton_backend, "LANES", 32)
        patch.setattr(_triton_topk, "ENTRIES", 4)
        patch.setattr(_triton_topk, "WIDTH_BLOCK", 8)
        patch.setattr(_triton_topk, "SOFTMAX_BLOCK", 64)
        patch.setattr(_tokens, "most_rows", lambda *_: 9)
        yield


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence_tail_and_clip(build, divergence, tail, clip):
    served = serve(build((7, 0, 1, 12), 203, device=DEVICE), 9)
    options = {"divergence": divergence, "jsd_weight": 0.3, "tail": tail, "temperature": 0.8}
    options |= {"top_fraction": 0.3, "interpolation_weight": 0.3}
    tau = clear_clip(served, 0.03, **options) if clip else None
    check_served(served, backend="triton", pointwise_clip=tau, **options)


# Each example takes a second here: a failing one is not shrunk.
@settings(deadline=None, derandomize=True, max_examples=12, phases=[Phase.explicit, Phase.generate])
@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple),
    vocab_size=st.integers(2, 150),
    hidden=st.integers(1, 20),
    k=st.floats(0, 1),
    tail=st.sampled_from(TAILS),
    reduction=st.sampled_from(["sequence_mean", "none"]),
    head=st.booleans(),
    seed=st.integers(0, 100),
)
def test_ragged_rows_and_odd_shapes(build, lengths, vocab_size, hidden, k, seed, **options):
    batch = build(lengths, vocab_size, hidden=hidden, seed=seed, device=DEVICE)
    served = serve(batch, 1 + int(min(k, 0.3) * (vocab_size - 1)), seed=seed)
    check_served(served, backend="triton", pointwise_clip=None, **options)


def each_token(num_tokens):
    weights = torch.linspace(-1, 2, num_tokens, device=DEVICE)
    weights[1::4] = 0.0
    selected = torch.arange(num_tokens, device=DEVICE) % 3 == 0
    temperatures = torch.linspace(0.6, 1.5, num_tokens, device=DEVICE)
    return {"token_weights": weights, "temperature": temperatures, "selected": selected}


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("logit_softcap", [None, 4.0])
@pytest.mark.parametrize("reduction", ["sequence_mean", "none"])
def test_everything_at_once(build, tail, logit_softcap, reduction):
    served = serve(build((7, 0, 1, 12), 203, bias=True, device=DEVICE), 9)
    options = {"tail": tail, "logit_scale": 0.7, "logit_softcap": logit_softcap, **each_token(20)}
    options |= {"divergence": "jsd", "interpolation_weight": 0.3, "reduction": reduction}
    options["pointwise_clip"] = clear_clip(served, 0.02, **options)
    check_served(served, backend="triton", chunk_rows=7, **options)


@pytest.mark.filterwarnings("ignore:(All-NaN|invalid value):RuntimeWarning")
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("reduction", ["sequence_mean", "none"])
def test_rows_of_weight_0(build, tail, reduction):
    served = serve(build((7, 5), 203, bias=True, device=DEVICE), 9)
    options = {"tail": tail, "reduction": reduction, "logit_softcap": 4.0, "pointwise_clip": None}
    options |= {"token_weights": each_token(12)["token_weights"], "top_fraction": 0.4}
    student = served.student.clone()
    student[options["token_weights"] == 0] = float("nan")
    found = []
    for one in (dataclasses.replace(served, student=student), served):
        one = one.trainable()
        loss = one.loss(paint_loss_from_topk, backend="triton", **options).loss
        found.append((loss, *torch.autograd.grad(loss.sum(), list(one.trained.values()))))
    for actual, expected in zip(*found, strict=True):
        assert actual.isfinite().all() and error_of(actual, expected) < 1e-6


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_products(build, half_products_anywhere, tail, dtype):
    """What a GPU runs: float32 logits, and the tail back through the head in float16."""
    served = serve(build((7, 0, 12), 301, noise=0.3, dtype=dtype, device=DEVICE), 9)
    check_served(served, backend="triton", tail=tail, tolerance=1e-2, pointwise_clip=None)


@pytest.mark.parametrize("tail", TAILS)
def test_whole_vocabulary_and_rows_without_ids(build, tail):
    served = serve(build((4, 3), 30, device=DEVICE), 30, ragged=False)
    ids = served.ids.clone()
    ids[2] = -1
    served = dataclasses.replace(served, ids=ids)
    output = check_served(served, backend="triton", tail=tail, pointwise_clip=None)
    assert output.token_kl[2] == 0


def test_heads_that_are_not_row_major(build):
    served = serve(build((4, 3), 30, device=DEVICE), 5).trainable()
    losses = []
    for weight in (served.weight, served.weight.T.contiguous().T):
        loss = dataclasses.replace(served, weight=weight).loss(
            paint_loss_from_topk, backend="triton", tail="renormalise"
        )
        losses.append((loss.loss, *torch.autograd.grad(loss.loss, (served.student, served.weight))))
    for one, other in zip(*losses, strict=True):
        torch.testing.assert_close(one, other)


def test_many_tokens_of_one_row_of_the_head(error):
    """The programs of most rows of the head have nothing to add, one has everything."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(40, 3, generator=generator).to(DEVICE)
    hidden = torch.randn(40, 11, generator=generator).to(DEVICE)
    ids = torch.tensor([5, -1, 2]).repeat(40, 1).to(DEVICE)
    values[ids < 0] = 0.0
    start = torch.randn(9, 11, generator=generator).to(DEVICE)
    actual, expected = start.clone(), start.double()
    _triton_topk.add_head_gradient(values, hidden, ids, actual)
    _torch_topk.add_head_gradient(values.double(), hidden.double(), ids, expected)
    assert error(actual, expected) < 1e-6
    assert torch.equal(actual[[0, 1, 3, 4, 6, 7, 8]], start[[0, 1, 3, 4, 6, 7, 8]])


def test_offsets_past_two_to_the_31(error):
    """Row 2 of the head starts at element 2^31. Only the rows' own pages are ever touched."""
    stride = 2**30
    storage = torch.empty(2 * stride + 40, dtype=torch.float16, device=DEVICE)
    head = torch.randn(3, 40).half()
    spread = storage.as_strided((3, 40), (stride, 1)).copy_(head)
    hidden = torch.randn(2, 40, device=DEVICE)
    ids = torch.tensor([[2, 0], [1, 2]], device=DEVICE)
    logits = _triton_topk.gathered_logits(hidden, spread, ids)
    expected = (hidden.double().cpu() @ head.double().T).gather(1, ids.cpu())
    assert error(logits.cpu(), expected) < 1e-6
    values, gradient = torch.randn(2, 2, device=DEVICE), torch.empty(2, 40, device=DEVICE)
    _triton_topk.hidden_gradient(values, spread, ids, None, gradient)
    expected = (values.double().cpu()[:, :, None] * head.double()[ids.cpu()]).sum(1)
    assert error(gradient.cpu(), expected) < 1e-6


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("head", [True, False])
def test_teacher_top_k(build, check, divergence, head):
    batch = build((7, 0, 1, 12), 203, device=DEVICE)
    options = {"divergence": divergence, "pointwise_clip": None, "top_fraction": 0.3}
    check(paint_loss, batch, head=head, backend="triton", teacher_top_k=7, **options)


@pytest.mark.parametrize("tail", TAILS)
def test_opcheck(build, tail):
    served = serve(build((5, 0, 7), 61, device=DEVICE), 6).trainable()
    options = LossSettings(temperature=0.9, top_fraction=0.3, backend="triton").arguments()
    options += WHOLE.arguments()
    tensors = (served.student, *Head(served.weight).arguments(), served.ids, served.logprobs)
    weights = torch.rand(12, device=DEVICE)
    by_token = served.cu_seqlens, weights, weights > 0.7, None, None
    torch.library.opcheck(
        _topk_ops.paint_loss_from_topk, (*tensors, *by_token, True, True, tail, *options)
    )


def test_backends_agree(build):
    served = serve(build((7, 9), 301, noise=0.05, device=DEVICE), 20)
    for tail in TAILS:
        results = []
        for backend in ("torch", "triton"):
            mine = served.trainable()
            output = mine.loss(paint_loss_from_topk, backend=backend, tail=tail)
            grads = torch.autograd.grad(output.loss, (mine.student, mine.weight))
            results.append((*output, *grads))
        for one, other in zip(*results, strict=True):
            assert error_of(one, other) < 2e-5
