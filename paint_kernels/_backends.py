"""Chooses the modules that compute rows."""

from types import ModuleType


def row_functions(backend: str) -> ModuleType:
    """Returns the module for "torch" or "triton". Triton is imported only on demand."""
    if backend == "triton":
        from paint_kernels import _triton_backend

        return _triton_backend
    from paint_kernels import _torch_backend

    return _torch_backend


def topk_functions(backend: str) -> ModuleType:
    """Returns the module of products with a few rows of the head per token."""
    if backend == "triton":
        from paint_kernels import _triton_topk

        return _triton_topk
    from paint_kernels import _torch_topk

    return _torch_topk
