"""The specification itself: by gradcheck, by hand-written PyTorch, by the closed-form gradient."""

import math

import pytest
import torch
import torch.nn.functional as F

from paint_kernels import reference


@pytest.mark.parametrize("top_k", [None, 6])
@pytest.mark.parametrize("clip", [None, 0.06])
@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean", "sum", "none"])
def test_gradcheck(build, clip_for, reduction, clip, top_k):
    batch = build((3, 0, 4), 11, hidden=4).double()
    options = {"top_fraction": 0.4, "interpolation_weight": 0.3, "temperature": 0.9}
    tau = clip_for(batch, **options) if clip and not top_k else clip

    # The target is a constant, so finite differences may move the student of the loss alone.
    constant = batch.loss(reference.paint_loss, **options)
    student_logits = reference.project(batch.student, batch.weight)
    teacher_logits = reference.project(batch.teacher, batch.weight)
    target = reference.interpolate(teacher_logits, student_logits, constant.selected, 0.3)

    def loss(student, weight):
        return reference.paint_loss_from_logits(
            reference.project(student, weight),
            target,
            batch.cu_seqlens,
            pointwise_clip=tau,
            top_fraction=0.0,
            temperature=0.9,
            teacher_top_k=top_k,
            reduction=reduction,
        ).loss

    inputs = (batch.student.requires_grad_(), batch.weight.requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_plain_settings_are_opsd_forward_kl(build, error, temperature):
    """k = 0, f = 0, no clip, averaged over tokens: KL(teacher, student) as PyTorch has it."""
    batch = build((6, 9)).double().trainable()
    settings = {"top_fraction": 0.0, "interpolation_weight": 0.0, "pointwise_clip": None}
    settings |= {"temperature": temperature, "reduction": "token_mean"}
    loss = batch.loss(reference.paint_loss, **settings).loss
    expected = F.kl_div(
        F.log_softmax(batch.student @ batch.weight.T / temperature, dim=-1),
        F.log_softmax(batch.teacher @ batch.weight.detach().T / temperature, dim=-1),
        reduction="batchmean",
        log_target=True,
    )
    assert error(loss, expected) < 1e-12
    inputs = (batch.student, batch.weight)
    for actual, wanted in zip(
        torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        assert error(actual, wanted) < 1e-12


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_gradient_has_its_closed_form(build, clip_for, error, temperature):
    """dL/dz_S(j) = (p_S(j) sum over U of p~ - p~(j) [j in U]) / T."""
    batch = build((12,), 50).double()
    tau = clip_for(batch, top_fraction=0.0, temperature=temperature)
    student = (batch.student @ batch.weight.T).requires_grad_()
    teacher = batch.teacher @ batch.weight.T
    output = reference.paint_loss_from_logits(
        student,
        teacher,
        batch.cu_seqlens,
        temperature=temperature,
        pointwise_clip=tau,
        top_fraction=0.0,
        reduction="sum",
    )
    (gradient,) = torch.autograd.grad(output.loss, student)
    p_student = torch.softmax(student.detach() / temperature, dim=-1)
    p_target = torch.softmax(teacher / temperature, dim=-1)
    unclipped = p_target * (p_target.log() - p_student.log()) <= tau
    assert (~unclipped).any()
    mass = (p_target * unclipped).sum(dim=-1, keepdim=True)
    assert error(gradient, (p_student * mass - p_target * unclipped) / temperature) < 1e-12


def test_one_row_by_hand():
    """p_T = (3/4, 1/4), p_S = (1/2, 1/2): f = (0.3041, -0.1733); the clip cuts the first."""
    student = torch.zeros(1, 2, dtype=torch.float64)
    teacher = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    bounds = torch.tensor([0, 1])
    output = reference.paint_loss_from_logits(
        student, teacher, bounds, pointwise_clip=0.1, interpolation_weight=0.0
    )
    f = (0.75 * math.log(1.5), 0.25 * math.log(0.5))
    assert output.token_kl.item() == pytest.approx(f[0] + f[1])
    assert output.loss.item() == pytest.approx(0.1 + f[1])
    assert output.clipped_mass.item() == pytest.approx(0.75)
    assert output.student_entropy.item() == pytest.approx(math.log(2))
    teacher_entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert output.teacher_entropy.item() == pytest.approx(teacher_entropy)
    assert output.entropy_ratio.item() == pytest.approx(teacher_entropy / math.log(2))
    assert output.selected.tolist() == [True]


def test_interpolated_target_by_hand():
    """Half of each: logits (log 3, 0) and (0, 0) meet at (log sqrt 3, 0)."""
    student = torch.zeros(1, 2, dtype=torch.float64)
    teacher = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    output = reference.paint_loss_from_logits(
        student,
        teacher,
        torch.tensor([0, 1]),
        pointwise_clip=None,
        top_fraction=1.0,
        interpolation_weight=0.5,
    )
    p = math.sqrt(3) / (1 + math.sqrt(3))
    expected = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
    assert output.token_kl.item() == pytest.approx(expected)


def test_reductions(build):
    batch = build((3, 0, 1, 6)).double()
    settings = {"pointwise_clip": None}

    def loss(reduction, **more):
        return batch.loss(reference.paint_loss, reduction=reduction, **settings, **more).loss

    tokens = loss("none")
    means = torch.stack([tokens[:3].mean(), tokens[3], tokens[4:].mean()])
    torch.testing.assert_close(loss("sequence_mean"), means.mean())
    torch.testing.assert_close(loss("sequence_mean", denominator=8), means.sum() / 8)
    torch.testing.assert_close(loss("token_mean"), tokens.mean())
    torch.testing.assert_close(loss("token_mean", denominator=40), tokens.sum() / 40)
    torch.testing.assert_close(loss("sum"), tokens.sum())
