"""The choice between the modules that compute rows."""

from types import ModuleType


def row_functions(backend: str) -> ModuleType:
    """The module that computes rows; triton is imported only where it is used."""
    if backend == "triton":
        from paint_kernels import _triton_backend

        return _triton_backend
    from paint_kernels import _torch_backend

    return _torch_backend
