"""The PyTorch backend of paint_loss against the float64 reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paint_kernels import (
    LossSettings,
    _loss,
    _matmul,
    _onednn,
    _plan,
    _torch_backend,
    _torch_divergences,
    paint_loss,
    reference,
)
from paint_kernels._heads import Head, Projection
from paint_kernels._sources import HiddenSource
from paint_kernels._torch_divergences import DIVERGENCES

LOW_CLIPS = dict.fromkeys(DIVERGENCES, 1e-3) | {"jsd": 1e-5}
"""low enough to clip something where the teacher is close to the student"""
LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=5).map(tuple)


@pytest.fixture(autouse=True, scope="module")
def small_chunks():
    """Several chunks and blocks even at test sizes, none of them aligned with a rollout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_plan, "CPU_CHUNK_ELEMENTS", 1500)
        patch.setattr(_torch_backend, "BLOCK_ELEMENTS", 600)
        patch.setattr(_torch_divergences, "TILE", 64)
        patch.setattr(_matmul, "WEIGHT_TILE", 48)
        yield


@pytest.mark.parametrize("noise", [None, 0.05])
@pytest.mark.parametrize("vocab_size", [2, 64, 203, 1031])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_vocabulary_and_kl(build, check, clip_for, vocab_size, noise, clip, divergence):
    batch = build((7, 0, 1, 12), vocab_size, noise=noise)
    options = {"top_fraction": 0.3, "interpolation_weight": 0.3, "temperature": 0.8}
    options |= {"divergence": divergence, "jsd_weight": 0.3}
    around = 0.06 if noise is None else LOW_CLIPS[divergence]
    tau = clip_for(batch, around, **options) if clip else None
    output = check(paint_loss, batch, pointwise_clip=tau, **options)
    assert (output.clipped_mass > 0).any().item() is clip


def test_products_that_the_user_keeps_from_onednn(build, check, monkeypatch):
    used, real = [], _matmul.onednn_product
    monkeypatch.setattr(_matmul, "onednn_product", lambda *given: used.append(1) or real(*given))
    batch = build((7, 0, 1, 12), 203)
    check(paint_loss, batch)
    assert bool(used) is _onednn._IS_USED
    used.clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "enabled", False)
        check(paint_loss, batch)
    monkeypatch.setattr(_onednn, "_IS_USED", False)
    check(paint_loss, batch)
    assert not used


def test_onednn_is_left_alone_where_it_is_unknown_or_inexact(monkeypatch):
    assert _onednn._is_exact()
    for mode, exact in (("BF16", False), ("any", False), ("STRICT", True)):
        monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", mode)
        assert _onednn._is_exact() is exact
    monkeypatch.setattr(_onednn, "_KNOWN", "mkldnn::_linear_pointwise(Tensor X) -> Tensor")
    assert not _onednn._is_known()


@settings(deadline=None, derandomize=True, max_examples=90)
@given(
    lengths=LENGTHS,
    vocab_size=st.integers(2, 300),
    temperature=st.floats(0.7, 1.3),
    divergence=st.sampled_from(list(DIVERGENCES)),
    jsd_weight=st.sampled_from([0.01, 0.5, 0.9]),
    top_fraction=st.sampled_from([0.0, 0.03, 0.07, 0.5, 1.0]),
    interpolation_weight=st.sampled_from([0.0, 0.03, 0.5]),
    clip=st.booleans(),
    reduction=st.sampled_from(["sequence_mean", "token_mean", "sum", "none"]),
    head=st.booleans(),
    own_head=st.booleans(),
    seed=st.integers(0, 100),
)
def test_settings_over_their_ranges(
    build, check, clip_for, lengths, vocab_size, clip, reduction, head, own_head, seed, **options
):
    batch = build(lengths, vocab_size, teacher_hidden=9 if own_head else None, seed=seed)
    tau = clip_for(batch, **options) if clip and sum(lengths) else None
    check(paint_loss, batch, head=head, reduction=reduction, pointwise_clip=tau, **options)


@pytest.mark.parametrize("weight", [0.03, 0.999, 1.0])
def test_full_interpolation_moves_the_target_onto_the_student(build, check, weight):
    """At k = 1 the selected targets are the student itself, with no divergence and no gradient."""
    batch = build((6, 9))
    settings = {"top_fraction": 0.4, "interpolation_weight": weight, "pointwise_clip": None}
    output = check(paint_loss, batch, **settings)
    if weight == 1:
        assert output.token_kl[output.selected].abs().max() < 1e-6
        assert output.token_kl[~output.selected].min() > 0.01


@pytest.mark.parametrize("k", [1, 7, 203])
@pytest.mark.parametrize("top_fraction", [0.3, 1.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_teacher_top_k(build, check, k, top_fraction, divergence):
    batch = build((7, 0, 1, 12))
    settings = {
        "divergence": divergence,
        "top_fraction": top_fraction,
        "interpolation_weight": 0.3,
        "pointwise_clip": None,
        "temperature": 1.2,
    }
    output = check(paint_loss, batch, teacher_top_k=k, **settings)
    if k == 1:
        assert output.teacher_entropy.abs().max() == 0
        assert output.token_kl.abs().max() == 0
    if k == 203:
        whole = batch.loss(paint_loss, **settings)
        torch.testing.assert_close(output.token_kl, whole.token_kl)


def test_teacher_top_k_ties_go_to_the_lower_index(build, check):
    batch = build((4,), 12, hidden=1, teacher_hidden=3)
    batch.teacher_weight[:] = batch.teacher_weight[:1]
    check(paint_loss, batch, teacher_top_k=5, pointwise_clip=None, top_fraction=0.0)
    kept = batch.student @ batch.weight[:5].T
    uniform = torch.full_like(kept, 0.2)
    expected = torch.nn.functional.kl_div(kept.log_softmax(-1), uniform, reduction="none").sum(-1)
    actual = batch.loss(paint_loss, teacher_top_k=5, pointwise_clip=None, top_fraction=0.0)
    torch.testing.assert_close(actual.token_kl, expected)


def test_vocab_size_drops_padded_rows(build, check):
    batch = build((5, 8), 100)
    output = check(paint_loss, batch, vocab_size=77, pointwise_clip=None, top_fraction=0.3)
    cut = build((5, 8), 100)
    cut.weight[77:] = 50.0
    same = cut.loss(paint_loss, vocab_size=77, pointwise_clip=None, top_fraction=0.3)
    assert torch.equal(output.token_kl, same.token_kl)


def test_heads_padded_to_different_sizes(build, error):
    batch = build((5, 8), 100, teacher_hidden=9)
    padded = torch.cat([batch.teacher_weight, torch.ones(28, 9)])
    expected = batch.loss(paint_loss)
    actual = paint_loss(
        batch.student,
        batch.teacher,
        batch.weight,
        batch.cu_seqlens,
        teacher_lm_head_weight=padded,
        vocab_size=100,
    )
    assert torch.equal(actual.token_loss, expected.token_loss)


@pytest.mark.parametrize("head", [True, False])
def test_float64_stays_float64(build, check, head):
    batch = build(dtype=torch.float64)
    output = check(paint_loss, batch, head=head, tolerance=1e-12, pointwise_clip=None)
    assert output.loss.dtype == output.token_kl.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["sequence_mean", "none"])
def test_half_precision_rounds_inputs_and_gradients_only(build, check, dtype, reduction):
    """Values are exact for the rounded inputs; a gradient is rounded where it is stored."""
    batch = build((5, 0, 8), dtype=dtype, noise=0.05)
    options = {"pointwise_clip": None, "top_fraction": 0.3, "interpolation_weight": 0.3}
    # One rounding of bfloat16 is up to 0.4% of an entry; a row is rounded twice on its way out.
    output = check(paint_loss, batch, tolerance=6e-3, reduction=reduction, **options)
    exact = batch.double().loss(reference.paint_loss, reduction=reduction, **options)
    assert output.token_kl.dtype == torch.float32
    torch.testing.assert_close(output.token_kl.double(), exact.token_kl, rtol=2e-4, atol=1e-7)


def test_mixed_dtypes_meet_in_the_wider(build, check):
    batch = build((5, 8))
    half = type(batch)(
        batch.student.bfloat16(), batch.teacher.bfloat16(), batch.weight, None, batch.cu_seqlens
    )
    output = check(paint_loss, half, tolerance=6e-3, pointwise_clip=None)
    exact = half.double().loss(reference.paint_loss, pointwise_clip=None)
    torch.testing.assert_close(output.token_kl.double(), exact.token_kl, rtol=2e-4, atol=1e-7)


def test_confident_rows_keep_their_digits(build, error):
    """H near 1e-5 nats: log(sum) alone would lose all digits, and p - 1 most of the gradient's."""
    batch = build((6, 6), 150, noise=0.02)
    batch.weight[:, 0] = 0.0
    batch.weight[7] = 0.0
    batch.weight[7, 0] = 1.0
    for hidden in (batch.student, batch.teacher):
        hidden[:, 0] = torch.linspace(17.0, 21.0, 12)
        hidden[:, 1:] *= 0.5
    settings = {"pointwise_clip": None, "top_fraction": 0.3, "interpolation_weight": 0.3}
    mine, exact_batch = batch.trainable(), batch.double().trainable()
    output = mine.loss(paint_loss, **settings)
    exact = exact_batch.loss(reference.paint_loss, **settings)
    assert exact.student_entropy.max() < 1e-3
    assert torch.equal(output.selected, exact.selected)
    for name in ("student_entropy", "teacher_entropy", "entropy_ratio"):
        torch.testing.assert_close(
            getattr(output, name).double(), getattr(exact, name), rtol=2e-4, atol=0.0
        )
    assert error(output.token_kl, exact.token_kl) < 2e-4
    for row in range(12):
        mine_row = torch.autograd.grad(
            mine.loss(paint_loss, reduction="none", **settings).loss[row], mine.student
        )[0]
        exact_row = torch.autograd.grad(
            exact_batch.loss(reference.paint_loss, reduction="none", **settings).loss[row],
            exact_batch.student,
        )[0]
        assert error(mine_row, exact_row) < 2e-4


def test_token_losses_can_be_negative(build, check, clip_for):
    """The clip cuts the positive terms alone."""
    batch = build((20,), 40)
    tau = clip_for(batch, 0.02, top_fraction=0.0)
    output = check(paint_loss, batch, pointwise_clip=tau, top_fraction=0.0)
    assert (output.token_loss < 0).any()
    assert (output.token_kl > 0).all()


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
@pytest.mark.parametrize("denominator", [5, 2.5, torch.tensor(7), torch.tensor(3.0)])
def test_denominator_replaces_the_count(build, check, reduction, denominator):
    batch = build((4, 0, 6))
    own = check(paint_loss, batch, reduction=reduction, pointwise_clip=None)
    count = 2 if reduction == "sequence_mean" else 10
    settings = {"reduction": reduction, "denominator": denominator, "pointwise_clip": None}
    output = check(paint_loss, batch, **settings)
    torch.testing.assert_close(output.loss * float(denominator), own.loss * count)


@pytest.mark.parametrize("lengths", [(0,), (0, 0, 0), ()])
@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean", "sum", "none"])
def test_no_tokens(build, lengths, reduction):
    batch = build(lengths).trainable()
    output = batch.loss(paint_loss, reduction=reduction)
    assert output.loss.shape == ((0,) if reduction == "none" else ())
    output.loss.sum().backward()
    assert output.loss.sum() == 0
    assert batch.student.grad.shape == (0, 16)
    assert torch.equal(batch.weight.grad, torch.zeros_like(batch.weight))


def test_one_token_is_always_selected(build, check):
    output = check(paint_loss, build((1,)), top_fraction=0.01, pointwise_clip=None)
    assert output.selected.all()


def test_no_tensor_of_the_size_of_the_logits(build):
    """The largest tensor alive at any moment is a chunk's, not N x V."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class LargestTensor(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.numel = max(self.numel, result.numel())
            return result

    batch = build((60, 40), 300).trainable(head=False)
    with LargestTensor() as largest:
        settings = LossSettings(backend="torch")
        most = _plan.most_rows(300, 16, torch.device("cpu"))
        chunks = _plan.plan_chunks(batch.cu_seqlens, 100, most, full=False)
        source = HiddenSource(
            Projection(batch.student.detach(), Head(batch.weight), None, "torch"),
            Projection(batch.teacher, Head(batch.weight), None, "torch"),
            None,
            rows_per_chunk=_plan.largest_chunk(chunks),
            temperature=1.0,
            with_hidden_gradient=True,
            with_weight_gradient=False,
            backend="torch",
        )
        _loss.run_loss(source, chunks, batch.cu_seqlens, settings)
    assert 0 < largest.numel <= 300 * 16


@pytest.mark.parametrize("noise", [0.004, 0.02, 0.1])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_small_divergences_of_a_large_vocabulary_keep_their_digits(build, error, divergence, noise):
    """At a KL near 1e-4 an error of 1e-7 in a row's normalisers would be a thousandth of it."""
    batch = build((6,), 40_000, noise=noise)
    options = {"divergence": divergence, "pointwise_clip": None, "top_fraction": 0.0}
    output = batch.loss(paint_loss, **options)
    exact = batch.double().loss(reference.paint_loss, **options)
    assert exact.token_kl.mean() < 3 * noise**2
    assert error(output.token_kl, exact.token_kl) < 5e-5


@pytest.mark.parametrize("spare_rows", [0, 1, 3, 6])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_of_tiles_are_those_of_float64(dtype, offset, spare_rows):
    """Whether the wide copy fits into the spare buffer in one piece, in several, or not at all."""
    x = torch.rand(6, 3 * 256 + 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    spare = torch.empty(offset + spare_rows * x.shape[1], dtype=dtype)[offset:].view(-1, x.shape[1])
    total, sums = _torch_backend.tile_sums(x, spare)
    expected = _torch_divergences.whole_tiles(x.double())[0].sum(-1)
    torch.testing.assert_close(sums, expected, rtol=1e-15, atol=0.0)
    torch.testing.assert_close(total[:, 0], x.double().sum(1), rtol=1e-15, atol=0.0)
