"""The two sides of the CPU benchmark compute the same loss, so their times may be compared."""

import pytest
import torch

from bench.kernels import SIDES, gradient_errors, make_inputs


def test_both_sides_agree_with_float64_and_with_each_other() -> None:
    inputs = make_inputs(num_rollouts=3, num_tokens=41, hidden=16, vocab_size=257)
    errors = gradient_errors(inputs)
    assert set(errors) == set(SIDES)
    assert max(errors.values()) < 2e-4
    with torch.no_grad():
        losses = [loss(*inputs).item() for loss in SIDES.values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
