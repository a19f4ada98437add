"""Keeps the user's reduced-precision settings out of the matrix products.

TF32 (`torch.set_float32_matmul_precision("high")`, `torch.backends.cuda.matmul.allow_tf32` or
`.fp32_precision`), bfloat16 in float32 products on a CPU ("medium") and half-precision accumulation
(`allow_fp16_accumulation`, `allow_*_reduced_precision_reduction`) are chosen for the model. In the
loss they would round logits, whose errors the divergence of two close models magnifies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

CUDA, MKLDNN = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # pyright: ignore
FULL = ("ieee", "none")
"""values of `fp32_precision` under which a float32 product is one"""


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Runs products without reduced precision. Restores the settings, which are global to the
    process."""
    with _full_float32(), _full_accumulation():
        yield


@contextlib.contextmanager
def _full_float32() -> Iterator[None]:
    used = CUDA.fp32_precision, MKLDNN.fp32_precision
    if used[0] in FULL and used[1] in FULL:
        yield
        return
    # What a backend inherits is shown as its own. Written back as its own, it would no longer
    # follow the general setting.
    general = torch.backends.cudnn.fp32_precision, torch.backends.mkldnn.fp32_precision
    restored = ["none" if own == parent else own for own, parent in zip(used, general, strict=True)]
    # The older setting can be read only while the newer two agree with it, and a product raises an
    # error while they do not.
    CUDA.fp32_precision = MKLDNN.fp32_precision = "ieee"
    older = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(older)
        CUDA.fp32_precision, MKLDNN.fp32_precision = restored


@contextlib.contextmanager
def _full_accumulation() -> Iterator[None]:
    if not torch.cuda.is_available():
        yield
        return
    accumulation = CUDA.allow_fp16_accumulation
    reductions = {}
    for name in (
        "allow_fp16_reduced_precision_reduction",
        "allow_bf16_reduced_precision_reduction",
    ):
        reductions[name] = getattr(CUDA, name), getattr(CUDA, f"{name}_split_k")
        setattr(CUDA, name, (False, reductions[name][1]))
    CUDA.allow_fp16_accumulation = False
    try:
        yield
    finally:
        CUDA.allow_fp16_accumulation = accumulation
        for name, value in reductions.items():
            setattr(CUDA, name, value)
