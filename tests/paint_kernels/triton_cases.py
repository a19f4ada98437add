"""The Triton backend against the float64 reference, on a GPU or else in Triton's interpreter.

test_triton_backend.py runs this file in a process of its own: the interpreter is chosen by
TRITON_INTERPRET=1 before triton is first imported.
"""

import dataclasses
import math
from functools import partial

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from paint_kernels import (
    LossSettings,
    _loss,
    _ops,
    _plan,
    _tokens,
    _triton_backend,
    _triton_heads,
    paint_loss,
    paint_loss_from_logits,
    reference,
    token_logprobs,
    token_stats,
)
from paint_kernels._heads import Heads
from paint_kernels._shards import WHOLE
from paint_kernels._torch_divergences import DIVERGENCES

# The kernels let -inf - -inf be NaN where a bound replaces it. On a GPU that is silent.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MOST_ROWS = 9
"""of a chunk: of (7, 0, 1, 12) the last rollout has one row in the first chunk, and ends in the
third"""
LOW_CLIPS = dict.fromkeys(DIVERGENCES, 1e-3) | {"jsd": 1e-5}
"""low enough to clip something where the teacher is close to the student"""


@pytest.fixture(autouse=True, scope="module")
def small_tiles():
    """Several tiles, chunks and a ragged last one even at test sizes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_triton_backend, "LANES", 64)
        # Some clipped entries are the largest of their group, and some are not.
        patch.setattr(_triton_backend, "GROUPS", 16)
        patch.setattr(_triton_heads, "BLOCK", 64)
        patch.setattr(_ops, "most_rows", lambda *_: MOST_ROWS)
        patch.setattr(_tokens, "most_rows", lambda *_: MOST_ROWS)
        yield


@pytest.mark.parametrize("noise", [None, 0.05])
@pytest.mark.parametrize("vocab_size", [2, 301])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_vocabulary_and_kl(build, check, clip_for, vocab_size, noise, clip, divergence):
    batch = build((7, 0, 1, 12), vocab_size, noise=noise, device=DEVICE)
    options = {"top_fraction": 0.3, "interpolation_weight": 0.3, "temperature": 0.8}
    options |= {"divergence": divergence, "jsd_weight": 0.3}
    around = 0.06 if noise is None else LOW_CLIPS[divergence]
    tau = clip_for(batch, around, **options) if clip else None
    output = check(paint_loss, batch, backend="triton", pointwise_clip=tau, **options)
    assert (output.clipped_mass > 0).any().item() is clip


# Each example takes a second here: a failing one is not shrunk.
@settings(deadline=None, derandomize=True, max_examples=12, phases=[Phase.explicit, Phase.generate])
@given(
    lengths=st.lists(st.integers(0, 5), min_size=2, max_size=3).map(tuple),
    vocab_size=st.integers(20, 200),
    temperature=st.floats(0.7, 1.3),
    top_fraction=st.sampled_from([0.0, 0.03, 0.5, 1.0]),
    interpolation_weight=st.sampled_from([0.0, 0.03, 0.5]),
    teacher_top_k=st.sampled_from([None, 7]),
    reduction=st.sampled_from(["sequence_mean", "none"]),
    head=st.booleans(),
    seed=st.integers(0, 100),
)
def test_settings_over_their_ranges(build, check, lengths, vocab_size, head, seed, **options):
    batch = build(lengths, vocab_size, seed=seed, device=DEVICE)
    check(paint_loss, batch, head=head, backend="triton", pointwise_clip=None, **options)


# As above; the same cases as for PyTorch in test_heads.py.
@settings(deadline=None, derandomize=True, max_examples=16, phases=[Phase.explicit, Phase.generate])
@given(
    lengths=st.lists(st.integers(0, 6), min_size=2, max_size=3).map(tuple),
    vocab_size=st.integers(20, 200),
    logit_scale=st.sampled_from([1.0, 0.25, 2.0]),
    logit_softcap=st.sampled_from([None, 6.0]),
    own_head=st.booleans(),
    bias=st.booleans(),
    by_token=st.booleans(),
    selected=st.booleans(),
    divergence=st.sampled_from(list(DIVERGENCES)),
    teacher_top_k=st.sampled_from([None, 7]),
    reduction=st.sampled_from(["sequence_mean", "none"]),
    chunk_rows=st.sampled_from([None, 4]),
    head=st.booleans(),
    seed=st.integers(0, 50),
)
def test_heads_and_values_of_each_token(
    build, check, lengths, vocab_size, own_head, bias, by_token, selected, head, seed, **options
):
    own, num_tokens = 9 if own_head else None, sum(lengths)
    batch = build(lengths, vocab_size, teacher_hidden=own, bias=bias, seed=seed, device=DEVICE)
    if own_head:
        options |= {"teacher_logit_scale": 0.7, "teacher_logit_softcap": 5.0}
    if selected:
        options["selected"] = torch.arange(num_tokens, device=DEVICE) % 3 == 1
    if by_token:
        options["token_weights"] = torch.linspace(-1, 1, num_tokens, device=DEVICE)
        options["temperature"] = torch.linspace(0.6, 1.6, num_tokens, device=DEVICE)
    options |= {"top_fraction": 0.3, "interpolation_weight": 0.3, "pointwise_clip": None}
    check(paint_loss, batch, head=head, backend="triton", **options)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_clipped_entries_of_capped_logits(build, check, clip_for, divergence):
    batch = build((7, 0, 12), 301, bias=True, device=DEVICE)
    options = {"divergence": divergence, "logit_scale": 0.7, "logit_softcap": 6.0}
    options["temperature"] = torch.linspace(0.6, 1.6, 19, device=DEVICE)
    tau = clip_for(batch, **options)
    output = check(paint_loss, batch, backend="triton", pointwise_clip=tau, **options)
    assert (output.clipped_mass > 0).any()


@pytest.mark.parametrize("temperatures", [True, False])
@pytest.mark.parametrize("softcap", [None, 0.5, 30.0])
def test_logits_of_a_head_and_the_way_back_through_its_cap(error, softcap, temperatures):
    """Of products from 1e-6 to 1e6 and of infinite ones: every logit alone is accurate."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-6, 6, 203)
    product = torch.stack([sizes, -sizes, torch.randn(203, generator=generator)]).to(DEVICE)
    product[2, :2] = torch.tensor([math.inf, -math.inf])
    bias = None if temperatures else torch.zeros(203, device=DEVICE)
    own = torch.tensor([0.5, 1.0, 2.0], device=DEVICE) if temperatures else None
    exact = 0.7 * product.double()
    if softcap is not None:
        exact = softcap * torch.tanh(exact / softcap)
    exact_slope = torch.ones_like(exact) if softcap is None else 1 - (exact / softcap) ** 2
    if own is not None:
        exact /= own.double()[:, None]
    logits = product.clone()
    _triton_heads.logits_from_product(logits, bias, 0.7, softcap, own)
    torch.testing.assert_close(logits.double(), exact, rtol=2e-6, atol=0.0)
    if softcap is not None:
        gradient = torch.randn(3, 203, generator=generator).to(DEVICE)
        expected = gradient.double() * exact_slope
        _triton_heads.gradient_through_cap(gradient, logits, softcap, own)
        assert error(gradient, expected) < 1e-6


def test_chunks_of_any_size_agree(build, error, monkeypatch):
    """Selecting before the losses, and redoing selected rows after them, come to the same."""
    batch = build((20, 11, 3), 90, noise=0.3, device=DEVICE).trainable()
    options = {"top_fraction": 0.3, "interpolation_weight": 0.3, "backend": "triton"}
    results = []
    for most in (34, 20, 12, 4):
        monkeypatch.setattr(_ops, "most_rows", lambda *_, most=most: most)
        output = batch.loss(paint_loss, **options)
        grads = torch.autograd.grad(output.loss, (batch.student, batch.weight))
        results.append((*output, *grads))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert error(one, two) < 2e-6


@pytest.mark.parametrize(
    ("host_bounds", "lengths", "most"),
    [(True, (7, 0, 1, 12), 9), (False, (7, 0, 1, 12), 9), (True, (10, 25, 25), 20)],
)
def test_a_gpu_does_not_read_how_many_rows_are_selected(
    build, check, monkeypatch, host_bounds, lengths, most
):
    """The list of rows that a GPU redoes, on any device: as long as the host's knowledge bounds it,
    filled up with rows that are done again to the same result, selected ones too."""
    found = []

    def rows_to_redo(early, *known):
        rows = find(early, *known)
        found.append((len(rows), int(early.sum())))
        return rows

    find = _loss.rows_to_redo
    monkeypatch.setattr(_loss, "rows_to_redo", rows_to_redo)
    monkeypatch.setattr(_loss, "may_read", lambda device: False)
    monkeypatch.setattr(_ops, "most_rows", lambda *_: most)
    if not host_bounds:
        plan = partial(_plan.plan_chunks, full=False)
        monkeypatch.setattr(_ops, "plan_chunks", lambda *inputs, full: plan(*inputs))
    batch = build(lengths, device=DEVICE)
    settings = {"top_fraction": 0.3, "interpolation_weight": 0.9, "pointwise_clip": None}
    check(paint_loss, batch, backend="triton", **settings)
    ((listed, selected),) = found
    # Of the rollout of 12 tokens one row is in an earlier chunk, and may be selected or not.
    assert selected <= listed <= 4 if most == 9 and host_bounds else listed > selected


@pytest.mark.parametrize("groups", [1, 128])
def test_predicted_and_missed_clipped_entries(build, check, monkeypatch, groups):
    """Rows whose clipped mass the candidates give, and rows that are read once more."""
    monkeypatch.setattr(_triton_backend, "GROUPS", groups)
    batch = build((7, 9), 301, noise=1.0, device=DEVICE)
    options = {"top_fraction": 0.3, "interpolation_weight": 0.3, "pointwise_clip": 1e-3}
    output = check(paint_loss, batch, backend="triton", **options)
    assert (output.clipped_mass > 0).all()


def test_masked_tokens(error):
    """-inf on either side or both, rows with one token left, rows with none."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, 8, 150, generator=generator).to(DEVICE)
    bounds = torch.tensor([0, 3, 8], device=DEVICE)
    teacher[0, 3:100] = -math.inf
    teacher[1, 5:70] = student[1, 5:70] = -math.inf
    student[2, 70] = -math.inf
    student[3, 1:] = teacher[3, 1:] = -math.inf
    student[4], teacher[5] = -math.inf, -math.inf
    student[6] = teacher[6] = -math.inf
    for clip in (0.06, None):
        for weight in (0.0, 0.3, 1.0):
            options = {"pointwise_clip": clip, "interpolation_weight": weight, "top_fraction": 0.5}
            mine, wide = student.clone().requires_grad_(), student.double().requires_grad_()
            output = paint_loss_from_logits(mine, teacher, bounds, backend="triton", **options)
            exact = reference.paint_loss_from_logits(wide, teacher.double(), bounds, **options)
            assert torch.equal(output.selected, exact.selected)
            for name in ("token_loss", "token_kl", "student_entropy", "clipped_mass"):
                actual, expected = getattr(output, name), getattr(exact, name)
                torch.testing.assert_close(actual.double(), expected, rtol=2e-4, atol=1e-6)
            upstream = torch.ones_like(exact.loss)
            (expected,) = torch.autograd.grad(exact.loss, wide, upstream)
            (actual,) = torch.autograd.grad(output.loss, mine, upstream.float())
            assert error(actual, expected) < 2e-4


@pytest.mark.parametrize("temperature", [0.1, 200.0])
def test_statistics_of_a_row_without_a_finite_logit(temperature):
    logits = torch.randn(2, 70, device=DEVICE)
    logits[1] = -math.inf
    stats = _triton_backend.row_stats(logits, temperature)
    assert stats.logsumexp.isfinite().tolist() == [True, False] and stats.logsumexp[1] < 0
    assert stats.entropy[1] == 0


@pytest.mark.parametrize("temperature", [0.3, 2.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_large_logits(error, divergence, temperature):
    """Of magnitude 1e4: differences within a row are taken before anything rounds them."""
    generator = torch.Generator().manual_seed(2)
    student = torch.randn(6, 150, generator=generator).to(DEVICE) + 1e4
    teacher = student + 0.5 * torch.randn(6, 150, generator=generator).to(DEVICE)
    student[3:] -= 2e4
    bounds = torch.tensor([0, 2, 6])
    options = {"divergence": divergence, "temperature": temperature, "pointwise_clip": None}
    options |= {"top_fraction": 0.3, "interpolation_weight": 0.0}
    mine, wide = student.clone().requires_grad_(), student.double().requires_grad_()
    output = paint_loss_from_logits(mine, teacher, bounds, backend="triton", **options)
    exact = reference.paint_loss_from_logits(wide, teacher.double(), bounds, **options)
    for name in ("token_loss", "student_entropy", "teacher_entropy"):
        assert error(getattr(output, name), getattr(exact, name)) < 2e-4
    (expected,) = torch.autograd.grad(exact.loss, wide)
    (actual,) = torch.autograd.grad(output.loss, mine)
    assert error(actual, expected) < 2e-4


def test_confident_rows_keep_their_digits(build):
    batch = build((6, 6), 150, noise=0.02, device=DEVICE)
    batch.weight[:, 0] = 0.0
    batch.weight[70] = 0.0
    batch.weight[70, 0] = 1.0
    for hidden in (batch.student, batch.teacher):
        hidden[:, 0] = torch.linspace(17.0, 21.0, 12)
        hidden[:, 1:] *= 0.5
    settings = {"pointwise_clip": None, "top_fraction": 0.3, "reduction": "none"}
    mine, exact_batch = batch.trainable(False), batch.double().trainable(False)
    output = mine.loss(paint_loss, backend="triton", **settings)
    exact = exact_batch.loss(reference.paint_loss, **settings)
    assert exact.student_entropy.max() < 1e-3
    for name in ("student_entropy", "teacher_entropy", "entropy_ratio"):
        torch.testing.assert_close(
            getattr(output, name).double(), getattr(exact, name), rtol=2e-4, atol=0.0
        )
    output.loss.sum().backward()
    exact.loss.sum().backward()
    row_errors = (mine.student.grad.double() - exact_batch.student.grad).norm(dim=1)
    assert (row_errors < 2e-4 * exact_batch.student.grad.norm(dim=1)).all()


@pytest.mark.parametrize("vocab_size", [None, 100])
def test_token_functions(build, error, vocab_size):
    batch = build((9,), device=DEVICE)
    ids = torch.arange(9, device=DEVICE)
    mine, wide = batch.trainable(), batch.double().trainable()
    settings = {"temperature": 0.9, "vocab_size": vocab_size}
    output = token_logprobs(mine.student, mine.weight, ids, backend="triton", **settings)
    exact = reference.token_logprobs(wide.student, wide.weight, ids, **settings)
    assert error(output.logprobs, exact.logprobs) < 2e-4
    upstream = 0.5 + torch.arange(9, device=DEVICE)
    output.logprobs.backward(upstream.float())
    exact.logprobs.backward(upstream.double())
    assert error(mine.student.grad, wide.student.grad) < 2e-4
    assert error(mine.weight.grad, wide.weight.grad) < 2e-4
    stats = token_stats(batch.student, batch.weight, backend="triton", **settings)
    exact_stats = reference.token_stats(batch.student.double(), batch.weight.double(), **settings)
    for actual, expected in zip(stats, exact_stats, strict=True):
        assert error(actual, expected) < 2e-5


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_token_functions_of_other_heads(build, error, softcap):
    batch = build((9,), bias=True, device=DEVICE)
    ids, upstream = torch.arange(9, device=DEVICE), torch.linspace(0.5, 2, 9, device=DEVICE)
    settings = {"temperature": torch.linspace(0.6, 1.6, 9, device=DEVICE), "logit_scale": 0.7}
    settings["logit_softcap"] = softcap
    found = []
    for one, functions, more in (
        (batch.trainable(), (token_logprobs, token_stats), {"backend": "triton", "chunk_rows": 4}),
        (batch.double().trainable(), (reference.token_logprobs, reference.token_stats), {}),
    ):
        given = {"lm_head_bias": one.bias, **settings, **more}
        logprobs, entropy = functions[0](one.student, one.weight, ids, **given)
        inputs = (one.student, one.weight, one.bias)
        grads = torch.autograd.grad(logprobs, inputs, upstream.to(logprobs))
        stats = functions[1](one.student, one.weight, **given)
        found.append((logprobs, entropy, *stats, *grads))
    for actual, expected in zip(*found, strict=True):
        assert error(actual, expected) < 2e-4


def test_logits_with_a_temperature_for_each_token(error):
    generator = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, 12, 150, generator=generator).to(DEVICE)
    options = {"pointwise_clip": None, "selected": torch.arange(12, device=DEVICE) % 2 == 0}
    options["temperature"] = torch.linspace(0.6, 1.6, 12, device=DEVICE)
    mine, wide, bounds = student.clone(), student.double(), torch.tensor([0, 5, 12])
    output = paint_loss_from_logits(
        mine.requires_grad_(), teacher, bounds, backend="triton", **options
    )
    exact = reference.paint_loss_from_logits(
        wide.requires_grad_(), teacher.double(), bounds, **options
    )
    assert error(output.token_kl, exact.token_kl) < 2e-4
    output.loss.backward()
    exact.loss.backward()
    assert error(mine.grad, wide.grad) < 2e-4


def test_not_a_number_is_not_hidden():
    student = torch.randn(4, 150, device=DEVICE)
    student[2, 75] = math.nan
    bounds = torch.tensor([0, 4], device=DEVICE)
    teacher = torch.randn(4, 150, device=DEVICE)
    output = paint_loss_from_logits(student, teacher, bounds, backend="triton")
    assert output.token_loss.isnan().tolist() == [False, False, True, False]


def spread_rows(values, stride=2**30):
    """A copy whose third row starts at element 2^31, where 32-bit offsets wrap. Only the rows' own
    pages are ever written, so the storage between them takes no memory on a CPU."""
    storage = torch.empty(2 * stride + 40, dtype=torch.float16, device=DEVICE)
    return storage.as_strided((3, 40), (stride, 1)).copy_(values)


def test_offsets_past_two_to_the_31(error):
    student, teacher = torch.randn(2, 3, 40).half()
    spread = spread_rows(student), spread_rows(teacher), spread_rows(torch.zeros(3, 40))
    stats = _triton_backend.row_stats(spread[0], 1.0)
    torch.testing.assert_close(stats.logsumexp.cpu(), student.float().logsumexp(-1))
    marked = torch.tensor([True, False, True], device=DEVICE)
    settings = LossSettings(
        pointwise_clip=None, top_fraction=0.5, interpolation_weight=0.5, backend="triton"
    )
    _triton_backend.row_loss(*spread[:2], marked, settings, spread[2])
    wide, kept = student.double().requires_grad_(), teacher.double()
    target = torch.where(marked.cpu()[:, None], 0.5 * (kept + wide.detach()), kept)
    kl = reference.clipped_divergence(
        wide.log_softmax(-1), target.log_softmax(-1), "forward_kl", 0.5, None
    )[0]
    (expected,) = torch.autograd.grad(kl.sum(), wide)
    assert error(spread[2].cpu(), expected) < 2e-3
    ids = torch.tensor([3, 39, 0], device=DEVICE)
    logprobs, _ = _triton_backend.row_logprobs(spread[0], ids, 1.0, spread[2])
    expected = torch.nn.functional.one_hot(ids.cpu(), 40) - wide.detach().softmax(-1)
    assert error(spread[2].cpu(), expected) < 2e-3
    chosen = wide.detach().log_softmax(-1).gather(1, ids.cpu()[:, None])[:, 0]
    assert error(logprobs.cpu(), chosen) < 2e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_half_precision_logits(error, dtype, divergence):
    """Values are exact for the logits as they are; the gradient is rounded where it is stored.
    (Triton's interpreter cuts digits off where a GPU rounds.)"""
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 9, 150, generator=generator).to(dtype).to(DEVICE)
    bounds = torch.tensor([0, 4, 9])
    options = {"divergence": divergence, "pointwise_clip": None, "top_fraction": 0.3}
    mine, wide = student.clone().requires_grad_(), student.double().requires_grad_()
    output = paint_loss_from_logits(mine, teacher, bounds, backend="triton", **options)
    exact = reference.paint_loss_from_logits(wide, teacher.double(), bounds, **options)
    assert error(output.token_kl, exact.token_kl) < 2e-4
    (expected,) = torch.autograd.grad(exact.loss, wide)
    (actual,) = torch.autograd.grad(output.loss, mine)
    assert actual.dtype == dtype
    assert error(actual, expected) < (8e-3 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_half_precision_products(build, error, row_gradients, half_products_anywhere, divergence):
    """What a GPU runs: float32 logits, and scaled float16 gradients back through the head."""
    batch = build((7, 0, 12), 301, noise=0.3, dtype=torch.bfloat16, device=DEVICE)
    options = {"divergence": divergence, "pointwise_clip": None, "backend": "triton"}
    rows, head, exact_rows, exact_head = row_gradients(batch, **options)
    assert error(rows, exact_rows) < 5e-4
    assert error(head, exact_head) < 5e-4


@pytest.mark.parametrize("softcap", [None, 6.0])
def test_groups_of_chunks_for_the_head(
    build, error, row_gradients, half_products_anywhere, head_products, monkeypatch, softcap
):
    """Two chunks of nine rows in a group, in a buffer whose rows are padded."""
    monkeypatch.setattr(_plan, "HEAD_GROUP_ROWS", MOST_ROWS + 1)
    batch = build((7, 0, 12, 21), 301, noise=0.3, dtype=torch.bfloat16, device=DEVICE)
    options = {"pointwise_clip": None, "softcap": softcap, "backend": "triton"}
    rows, head, exact_rows, exact_head = row_gradients(batch, **options)
    assert head_products[:3] == [(18, False), (18, True), (4, True)]
    assert all(add and rows <= MOST_ROWS for rows, add in head_products[3:])
    assert error(rows, exact_rows) < 5e-4
    assert error(head, exact_head) < 5e-4


@pytest.mark.parametrize("softcap", [None, 6.0])
def test_half_precision_products_of_other_heads(
    build, error, row_gradients, half_products_anywhere, softcap
):
    batch = build((7, 0, 12), 301, noise=0.3, bias=True, dtype=torch.bfloat16, device=DEVICE)
    found = row_gradients(
        batch,
        temperatures=torch.linspace(0.1, 5.0, 19, device=DEVICE),
        temperature=1.0,
        scale=0.0625,
        softcap=softcap,
        pointwise_clip=None,
        backend="triton",
    )
    for actual, expected in zip(found[:3], found[3:], strict=True):
        assert error(actual, expected) < 5e-4


def test_half_precision_log_probabilities(build, error, half_products_anywhere):
    batch = build((9,), 301, dtype=torch.bfloat16, device=DEVICE).trainable()
    exact = batch.double().trainable()
    ids = torch.arange(9, device=DEVICE)
    token_logprobs(
        batch.student, batch.weight, ids, temperature=0.7, backend="triton"
    ).logprobs.sum().backward()
    reference.token_logprobs(
        exact.student, exact.weight, ids, temperature=0.7
    ).logprobs.sum().backward()
    for one, other in ((batch.student, exact.student), (batch.weight, exact.weight)):
        assert error(one.grad, other.grad) < 4e-3


def test_log_probabilities_of_certain_tokens(build):
    """1 - p near 1e-5, at a temperature whose reciprocal is rounded."""
    weight = torch.eye(30, device=DEVICE)
    hidden = torch.zeros(4, 30, device=DEVICE)
    hidden[torch.arange(4), torch.arange(4)] = torch.tensor([9.0, 10.1, 10.7, 11.3], device=DEVICE)
    ids = torch.arange(4, device=DEVICE)
    actual = token_logprobs(hidden, weight, ids, temperature=0.7, backend="triton").logprobs
    expected = reference.token_logprobs(hidden.double(), weight.double(), ids, temperature=0.7)
    torch.testing.assert_close(actual.double(), expected.logprobs, rtol=1e-4, atol=0.0)


def test_logits_that_are_not_row_major(error):
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 90, 9, generator=generator).to(DEVICE)
    bounds = torch.tensor([0, 4, 9])
    options = {"pointwise_clip": None, "top_fraction": 0.3}
    mine = student.clone().requires_grad_()
    wide = student.T.double().requires_grad_()
    paint_loss_from_logits(mine.T, teacher.T, bounds, backend="triton", **options).loss.backward()
    reference.paint_loss_from_logits(wide, teacher.T.double(), bounds, **options).loss.backward()
    assert error(mine.grad.T, wide.grad) < 2e-4


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_top_k_and_token_losses_of_the_other_divergences(build, check, divergence):
    batch = build((7, 12), 90, device=DEVICE)
    options = {"divergence": divergence, "pointwise_clip": None, "top_fraction": 0.3}
    check(paint_loss, batch, backend="triton", teacher_top_k=7, **options)
    check(paint_loss, batch, backend="triton", reduction="none", **options)


def test_an_entry_on_the_clip_is_unclipped():
    """f exactly as the kernel has it: tau itself keeps the entry, a step below cuts it."""
    student = torch.zeros(1, 2, device=DEVICE)
    teacher = torch.tensor([[1e4, 0.0]], device=DEVICE)
    settings = {"backend": "triton", "interpolation_weight": 0.0}
    f = paint_loss_from_logits(
        student, teacher, torch.tensor([0, 1]), pointwise_clip=None, **settings
    ).token_kl.item()
    for tau, clipped in ((f, 0.0), (f * (1 - 2**-23), 1.0)):
        output = paint_loss_from_logits(
            student, teacher, torch.tensor([0, 1]), pointwise_clip=tau, **settings
        )
        assert output.clipped_mass.item() == clipped


@pytest.mark.parametrize("lengths", [(), (0, 0), (1,)])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_no_tokens_and_one(build, check, lengths, divergence):
    batch = build(lengths, 61, device=DEVICE)
    output = check(paint_loss, batch, backend="triton", divergence=divergence, pointwise_clip=None)
    assert output.selected.tolist() == [True] * sum(lengths)


@pytest.mark.filterwarnings("ignore:(All-NaN|invalid value):RuntimeWarning")
@pytest.mark.parametrize("junk", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("divergence", "reduction"),
    [("forward_kl", "sequence_mean"), ("reverse_kl", "none"), ("jsd", "sequence_mean")],
)
def test_rows_of_weight_0(build, error, divergence, reduction, junk):
    batch = build((7, 5), 203, device=DEVICE)
    weights = (torch.arange(12, device=DEVICE) % 3 - 1).float()
    student, teacher = batch.student.clone(), batch.teacher.clone()
    student[weights == 0] = teacher[weights == 0] = junk
    spoiled = dataclasses.replace(batch, student=student, teacher=teacher)
    options = {"divergence": divergence, "top_fraction": 0.4, "interpolation_weight": 0.3}
    options |= {"reduction": reduction, "token_weights": weights, "backend": "triton"}
    found = []
    for one in (spoiled, batch):
        one = one.trainable()
        loss = one.loss(paint_loss, **options).loss
        found.append((loss, *torch.autograd.grad(loss.sum(), (one.student, one.weight))))
    for actual, expected in zip(*found, strict=True):
        assert actual.isfinite().all() and error(actual, expected) < 1e-6


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_opcheck(build, divergence):
    batch = build((5, 0, 7), 61, device=DEVICE).trainable()
    settings = LossSettings(
        temperature=0.9,
        divergence=divergence,
        jsd_weight=0.3,
        top_fraction=0.3,
        interpolation_weight=0.3,
        backend="triton",
    )
    weights = torch.rand(12, device=DEVICE)
    torch.library.opcheck(
        _ops.paint_loss,
        (
            *(batch.student, batch.teacher, *Heads(batch.weight).arguments()),
            *(batch.cu_seqlens, weights, None, None, None, True, True, False),
            *(*settings.arguments(), *WHOLE.arguments()),
        ),
    )


def test_compiled(build):
    batch = build((5, 0, 7), 61, device=DEVICE).trainable()

    def function(*inputs):
        return paint_loss(*inputs, backend="triton", top_fraction=0.3).loss

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    inputs = (batch.student, batch.teacher, batch.weight, batch.cu_seqlens)
    expected = torch.autograd.grad(function(*inputs), (batch.student, batch.weight))
    actual = torch.autograd.grad(compiled(*inputs), (batch.student, batch.weight))
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)
