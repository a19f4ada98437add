"""The emulated formats: fewer digits cost more, and the KL is the requested one."""

import pytest
import torch

from bench import logit_formats
from bench.logit_formats import errors_of, logit_gradient, make_case, mean_kl


def test_the_teacher_has_the_requested_kl() -> None:
    case = make_case(0, 0.002, num_rows=16, hidden=64, vocab_size=2000)
    assert mean_kl(*case) == pytest.approx(0.002, rel=0.1)


def test_the_gradient_is_that_of_the_clipped_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    student = 3 * torch.randn(5, 50, generator=generator, dtype=torch.float64)
    delta = torch.randn(5, 50, generator=generator, dtype=torch.float64)
    student.requires_grad_()
    log_p = torch.log_softmax(student, dim=-1)
    log_q = torch.log_softmax((student + delta).detach(), dim=-1)
    f = log_q.exp() * (log_q - log_p)
    assert (f > logit_formats.CLIP).any()
    (expected,) = torch.autograd.grad(f.clamp(max=logit_formats.CLIP).sum(), student)
    torch.testing.assert_close(logit_gradient(student.detach(), delta), expected)


def test_fewer_digits_cost_more() -> None:
    case = make_case(0, 0.002, num_rows=16, hidden=64, vocab_size=2000)
    errors = {name: error for name, (_, error) in errors_of(case).items()}
    both, delta = errors["z_S bf16, z_T bf16"], errors["z_S bf16, delta bf16"]
    wide_delta, wide = errors["z_S fp32, delta bf16"], errors["z_S fp32, z_T fp32"]
    assert both > 10 * delta > 10 * wide_delta > 50 * wide
    assert wide < 2e-4
    bf16, fp16 = (
        errors["gradient by the logits bf16"],
        errors["gradient by the logits fp16, scaled by 256"],
    )
    assert fp16 < bf16 < 5e-3


def test_a_run_has_one_cell_for_each_kl() -> None:
    result = logit_formats.run(4, 16, 200, [0.002, 0.02], 2, "python -m bench.logit_formats")
    assert all(len(line["errors"]) == 2 for line in result["formats"])
    assert all(
        cell["largest"] >= cell["median"] > 0
        for line in result["formats"]
        for cell in line["errors"]
    )
