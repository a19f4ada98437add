"""The gradient of the clipped forward KL, which the paper's theory leaves out.

A row's gradient by the student's logits is p_S(v) times the target's mass on the unclipped entries,
minus p_T(v) if v is unclipped itself.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from paint_kernels import paint_loss

Array = NDArray[np.float64]
Draw = Callable[..., Array]


def gradient_of(student: Array, target: Array, clip: float | None) -> Array:
    """Returns (N, V) gradients of the summed loss by the student's logits."""
    logits = torch.from_numpy(np.log(student)).requires_grad_()
    loss = paint_loss(
        logits,
        torch.from_numpy(np.log(target)),
        # The logits are the hidden states.
        torch.eye(student.shape[-1], dtype=torch.float64),
        torch.tensor([0, len(student)]),
        pointwise_clip=clip,
        interpolation_weight=0.0,
        reduction="sum",
    ).loss
    (gradient,) = torch.autograd.grad(loss, logits)
    return gradient.numpy()


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.001, 0.06, 0.3]))
def test_no_gradient_by_a_clipped_logit_is_negative(draw: Draw, seed: int, clip: float) -> None:
    """However much the teacher prefers the entry: the rest of the target pulls elsewhere."""
    generator = np.random.default_rng(seed)
    size = int(generator.integers(2, 8))
    student, target = draw(generator, 2, 6, size, least=1e-3)
    clipped = target * np.log(target / student) > clip
    rest = np.where(clipped, 0.0, target).sum(axis=-1, keepdims=True)
    gradient = gradient_of(student, target, clip)
    expected = student * rest - np.where(clipped, 0.0, target)
    np.testing.assert_allclose(gradient, expected, rtol=1e-8, atol=1e-12)
    assert (gradient[clipped] >= 0).all()


def test_where_the_teacher_is_sure_and_the_student_is_not_the_clip_turns_the_step() -> None:
    """A teacher that is sure of one of two ways, with tau = 0.06: the step goes to the other, at a
    hundredth of the size."""
    student, target = np.array([[0.5, 0.5]]), np.array([[0.99, 0.01]])
    unclipped, clipped = (gradient_of(student, target, clip)[0] for clip in (None, 0.06))
    assert unclipped == pytest.approx([-0.49, 0.49], rel=1e-7, abs=0)
    assert clipped == pytest.approx([0.005, -0.005], rel=1e-7, abs=0)
    # A slip that is rare enough is still corrected: 0.99 log(0.99 / 0.95) = 0.04.
    rare = gradient_of(np.array([[0.95, 0.05]]), target, 0.06)[0]
    assert rare == pytest.approx([-0.04, 0.04], rel=1e-7, abs=0)
