"""PaintLoss: packed and padded inputs."""

import re

import pytest
import torch

from paint_kernels import PaintLoss, paint_loss


def test_packed(build):
    batch = build((5, 0, 7), 61)
    module = PaintLoss(temperature=0.8, top_fraction=0.3, reduction="token_mean")
    output = batch.loss(lambda *tensors, **head: module(*tensors, denominator=4, **head), **{})
    expected = batch.loss(
        paint_loss, temperature=0.8, top_fraction=0.3, reduction="token_mean", denominator=4
    )
    for actual, wanted in zip(output, expected, strict=True):
        assert torch.equal(actual, wanted)


def test_padded_equals_packed(build):
    """Positions are kept by the mask alone: left, right or in the middle, whatever stands there."""
    batch = build((3, 0, 5), 61).trainable()
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[0, 2:5] = True
    mask[2, [0, 1, 4, 6, 7]] = True
    student, teacher = torch.full((2, 3, 8, 16), 1e4)
    student[mask], teacher[mask] = batch.student.detach(), batch.teacher
    student.requires_grad_()
    module = PaintLoss(top_fraction=0.3)
    output = module(student, teacher, batch.weight, loss_mask=mask)
    expected = batch.loss(paint_loss, top_fraction=0.3)
    for actual, wanted in zip(output, expected, strict=True):
        assert torch.equal(actual, wanted)
    (gradient,) = torch.autograd.grad(output.loss, student)
    (wanted,) = torch.autograd.grad(expected.loss, batch.student)
    assert torch.equal(gradient[mask], wanted)
    assert (gradient[~mask] == 0).all()


def test_it_needs_bounds_or_a_mask(build):
    batch = build()
    module = PaintLoss()
    with pytest.raises(ValueError, match="got neither"):
        module(batch.student, batch.teacher, batch.weight)
    with pytest.raises(ValueError, match="got both"):
        module(
            *(batch.student, batch.teacher, batch.weight, batch.cu_seqlens),
            loss_mask=torch.ones(1, 17, dtype=torch.bool),
        )


@pytest.mark.parametrize("mask", [torch.ones(2, 4), torch.ones(2, 5, dtype=torch.bool)])
def test_a_mask_of_another_kind(mask):
    hidden = torch.randn(2, 4, 16)
    with pytest.raises(ValueError, match=r"True on kept positions|must begin with theirs"):
        PaintLoss()(hidden, hidden, torch.randn(9, 16), loss_mask=mask)


def test_a_mask_on_another_device():
    hidden, mask = torch.randn(2, 4, 16), torch.ones(2, 4, dtype=torch.bool, device="meta")
    with pytest.raises(ValueError, match="loss_mask is on meta, other inputs on cpu: move them to"):
        PaintLoss()(hidden, hidden, torch.randn(9, 16), loss_mask=mask)


def test_it_has_no_parameters_and_says_what_it_does():
    module = PaintLoss(top_fraction=0.1)
    assert not module.state_dict()
    assert "forward_kl" in repr(module) and "top_fraction=0.1" in repr(module)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"reduction": "bogus"}, "reduction is 'bogus'"),
        ({"logit_scale": -1}, "logit_scale is -1"),
        ({"logit_scale": None}, "logit_scale is None"),
        ({"teacher_logit_scale": 0.0}, "teacher_logit_scale is 0.0"),
        ({"logit_softcap": 0}, "logit_softcap is 0"),
        ({"teacher_logit_softcap": "30"}, "teacher_logit_softcap is the string"),
        ({"vocab_size": -3}, "vocab_size is -3"),
        ({"temperature": None}, "temperature is None"),
        ({"temperature": torch.ones((), requires_grad=True)}, "temperature.detach()"),
    ],
)
def test_a_setting_out_of_its_range_is_refused_when_the_module_is_built(options, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        PaintLoss(**options)
