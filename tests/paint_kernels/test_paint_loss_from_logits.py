"""The logits-level loss: gradients, masked vocabularies, ties, discontinuities."""

import math

import pytest
import torch

from paint_kernels import _plan, _torch_backend, paint_loss_from_logits, reference

BOUNDS = torch.tensor([0, 4, 4, 10], dtype=torch.int32)


@pytest.fixture(autouse=True, scope="module")
def small_chunks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_plan, "CPU_CHUNK_ELEMENTS", 400)
        patch.setattr(_torch_backend, "BLOCK_ELEMENTS", 200)
        yield


def logits(seed: int, vocab_size: int = 97, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(10, vocab_size, generator=generator)).to(dtype)


def compare(student, teacher, error, tolerance=2e-4, **settings):
    student, exact_student = student.clone().requires_grad_(), student.double().requires_grad_()
    output = paint_loss_from_logits(student, teacher, BOUNDS, **settings)
    exact = reference.paint_loss_from_logits(exact_student, teacher.double(), BOUNDS, **settings)
    for name in ("token_loss", "token_kl", "student_entropy", "teacher_entropy", "clipped_mass"):
        actual, expected = getattr(output, name), getattr(exact, name)
        assert torch.equal(actual.isinf(), expected.isinf()), name
        finite = expected.isfinite()
        assert error(actual[finite], expected[finite]) < 2e-4, name
    assert torch.equal(output.selected, exact.selected)
    upstream = torch.full_like(exact.loss, 0.7)
    (expected,) = torch.autograd.grad(exact.loss, exact_student, upstream)
    (actual,) = torch.autograd.grad(output.loss, student, upstream.to(output.loss))
    assert actual.dtype == student.dtype
    assert error(actual, expected) < tolerance
    return output, actual


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize(
    ("vocab_size", "spread", "distance", "temperature"),
    [
        *((2048, 0.02, 0.015, 1.0), (2048, 3.0, 5e-3, 1.0), (151_936, 0.02, 0.005, 0.7)),
        *((151_936, 3.0, 3e-3, 1.0), (151_936, 3.0, 0.03, 1.0), (32_768, 6.0, 0.01, 1.5)),
    ],
)
def test_every_small_divergence_keeps_its_digits(
    monkeypatch, divergence, vocab_size, spread, distance, temperature
):
    """Flat and confident rows, with light and heavy tiles of the size that is used. Divergences
    from 2e-6 to 5e-4 nats."""
    monkeypatch.setattr(_torch_backend, "BLOCK_ELEMENTS", _plan.BLOCK_ELEMENTS)
    generator = torch.Generator().manual_seed(0)
    student = spread * torch.randn(10, vocab_size, generator=generator)
    teacher = student + distance * torch.randn(10, vocab_size, generator=generator)
    options = {"divergence": divergence, "pointwise_clip": None, "temperature": temperature}
    found = paint_loss_from_logits(student, teacher, BOUNDS, **options).token_kl
    exact = reference.paint_loss_from_logits(student.double(), teacher.double(), BOUNDS, **options)
    errors = (found.double() - exact.token_kl).abs() / exact.token_kl
    assert errors.max() < 1e-4


@pytest.mark.parametrize("reduction", ["sequence_mean", "none"])
@pytest.mark.parametrize("vocab_size", [None, 60])
@pytest.mark.parametrize("top_k", [None, 9])
def test_against_the_reference(error, reduction, vocab_size, top_k):
    compare(
        logits(1),
        logits(2),
        error,
        reduction=reduction,
        vocab_size=vocab_size,
        teacher_top_k=top_k,
        top_fraction=0.4,
        interpolation_weight=0.2,
        temperature=1.1,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(error, dtype):
    student = logits(1, dtype=dtype)
    compare(student, student + 0.1 * logits(2, dtype=dtype), error, tolerance=6e-3)


def test_different_padding_needs_the_vocabulary():
    whole = paint_loss_from_logits(logits(1)[:, :90], logits(2)[:, :90], BOUNDS)
    padded = paint_loss_from_logits(logits(1), logits(2)[:, :90], BOUNDS, vocab_size=90)
    assert torch.equal(whole.token_loss, padded.token_loss)


@pytest.mark.parametrize("clip", [0.06, None])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_masked_tokens_on_either_side(error, clip, weight):
    """-inf on the teacher, on both, and (with p~ > 0 there) on the student alone."""
    student, teacher = logits(1), logits(2)
    teacher[0, 3:50] = -math.inf
    teacher[1, 5:70] = student[1, 5:70] = -math.inf
    teacher[2, :-1] = -math.inf
    student[5, 11] = -math.inf
    student[6, :96] = teacher[6, :96] = -math.inf
    output, gradient = compare(
        student,
        teacher,
        error,
        pointwise_clip=clip,
        top_fraction=0.5,
        interpolation_weight=weight,
    )
    assert gradient.isfinite().all()
    if clip is None and not output.selected[5]:
        assert output.token_kl[5] == math.inf


@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_a_fully_masked_row_has_no_loss(error, side):
    student, teacher = logits(1), logits(2)
    if side != "teacher":
        student[7] = -math.inf
    if side != "student":
        teacher[7] = -math.inf
    output, gradient = compare(student, teacher, error, top_fraction=0.2)
    assert output.token_loss[7] == output.token_kl[7] == output.clipped_mass[7] == 0
    assert (gradient[7] == 0).all()
    assert output.loss.isfinite()


def test_not_a_number_is_not_hidden():
    student = logits(1)
    student[2, 5] = math.nan
    output = paint_loss_from_logits(student, logits(2), BOUNDS)
    assert output.token_loss[2].isnan() and output.loss.isnan()
    assert output.token_loss[3:].isfinite().all()


def test_equal_logits_give_zero(error):
    """Several largest entries in a row, and no divergence at all."""
    student = torch.zeros(10, 97, requires_grad=True)
    output = paint_loss_from_logits(student, torch.zeros(10, 97), BOUNDS)
    torch.testing.assert_close(output.student_entropy, torch.full((10,), math.log(97)))
    assert output.token_kl.abs().max() == 0
    (gradient,) = torch.autograd.grad(output.loss, student)
    assert gradient.abs().max() < 1e-8


def test_an_entry_on_the_clip_is_unclipped():
    """f = tau exactly: the loss is the same on both sides of the rule, the gradient is not."""
    student = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    bounds = torch.tensor([0, 1])
    f = reference.divergence_terms(
        torch.log_softmax(student.detach(), -1), torch.log_softmax(teacher, -1), "forward_kl", 0.5
    )[0, 0].item()
    settings = {"interpolation_weight": 0.0, "pointwise_clip": f + 1e-12}
    output = paint_loss_from_logits(student, teacher, bounds, **settings)
    assert output.clipped_mass.item() == 0
    (gradient,) = torch.autograd.grad(output.loss, student)
    torch.testing.assert_close(gradient, torch.tensor([[-0.25, 0.25]], dtype=torch.float64))


def test_the_callers_logits_are_left_alone():
    student, teacher = logits(1).requires_grad_(), logits(2)
    copies = student.detach().clone(), teacher.clone()
    paint_loss_from_logits(student, teacher, BOUNDS, top_fraction=0.5).loss.backward()
    assert torch.equal(student, copies[0]) and torch.equal(teacher, copies[1])


def test_extreme_logits_stay_finite(error):
    """Entropies of 1e-100 are 0 in float32, so they are left unranked here."""
    output, gradient = compare(300 * logits(1), 300 * logits(2), error, top_fraction=0.0)
    assert output.token_kl.max() > 1000
    assert gradient.isfinite().all()
