"""Settings of reduced precision change no result of the loss, and are as before afterwards."""

from dataclasses import replace

import pytest
import torch

from paint_kernels import paint_loss
from paint_kernels._precision import full_precision

CUDA, MKLDNN = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul


def older_setting():
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # the older and the newer setting disagree
        return None


def state():
    return (
        *(older_setting(), CUDA.fp32_precision, MKLDNN.fp32_precision),
        *(torch.backends.fp32_precision, torch.backends.mkldnn.fp32_precision),
        CUDA.allow_fp16_accumulation,
        CUDA.allow_fp16_reduced_precision_reduction,
        CUDA.allow_bf16_reduced_precision_reduction,
    )


@pytest.fixture(autouse=True)
def restored():
    initial = state()
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = torch.backends.mkldnn.fp32_precision = "none"
    CUDA.fp32_precision = MKLDNN.fp32_precision = "none"
    assert state() == initial


def older(value):
    return lambda: torch.set_float32_matmul_precision(value)


def newer(owner, value):
    return lambda: setattr(owner, "fp32_precision", value)


def mixed():
    torch.set_float32_matmul_precision("high")
    CUDA.fp32_precision = "ieee"
    MKLDNN.fp32_precision = "bf16"


SETTINGS = {
    "nothing": lambda: None,
    "highest": older("highest"),
    "high": older("high"),
    "medium": older("medium"),
    "cuda": newer(CUDA, "tf32"),
    "mkldnn": newer(MKLDNN, "bf16"),
    "general": newer(torch.backends, "tf32"),
    "general of mkldnn": newer(torch.backends.mkldnn, "bf16"),
    "mixed": mixed,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_full_inside_and_as_before_after(name):
    SETTINGS[name]()
    before = state()
    with full_precision():
        assert CUDA.fp32_precision in ("ieee", "none")
        assert MKLDNN.fp32_precision in ("ieee", "none")
        if name != "nothing":
            assert torch.get_float32_matmul_precision() == "highest"
    assert state() == before


def test_what_was_inherited_is_inherited_afterwards():
    torch.backends.fp32_precision = "tf32"
    with full_precision():
        pass
    torch.backends.fp32_precision = "ieee"
    assert CUDA.fp32_precision == MKLDNN.fp32_precision == "ieee"


def test_settings_are_restored_after_an_error():
    torch.set_float32_matmul_precision("medium")
    before = state()
    with pytest.raises(ZeroDivisionError), full_precision():
        1 / 0  # noqa: B018
    assert state() == before


@pytest.mark.parametrize("name", ["high", "medium", "mkldnn", "mixed"])
def test_the_loss_is_the_same_to_the_last_bit(build, name):
    """With "medium", a CPU with bfloat16 instructions computes float32 products from them."""
    batch = build((5, 70), 4100, hidden=64, noise=0.1).trainable()
    bias = torch.linspace(-1, 1, 4100).requires_grad_()
    batch = replace(batch, bias=bias)
    options = {"pointwise_clip": None, "top_fraction": 0.3}

    def results():
        output = batch.loss(paint_loss, **options)
        return (*output, *torch.autograd.grad(output.loss, (batch.student, batch.weight, bias)))

    expected = results()
    SETTINGS[name]()
    for actual, wanted in zip(results(), expected, strict=True):
        assert torch.equal(actual, wanted)
