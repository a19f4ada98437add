"""Chooses the modules that compute rows."""

from __future__ import annotations

from types import ModuleType

from paint_kernels._sharded_rows import ShardedRows
from paint_kernels._shards import Shard


def row_functions(backend: str, shard: Shard) -> ModuleType | ShardedRows:
    """Returns the module for "torch" or "triton", or what has the same functions for rows of which
    a rank has a shard. Triton is imported only on demand."""
    if not shard.is_whole:
        return ShardedRows(_shard_functions(backend), shard)
    if backend == "triton":
        from paint_kernels import _triton_backend

        return _triton_backend
    from paint_kernels import _torch_backend

    return _torch_backend


def _shard_functions(backend: str) -> ModuleType:
    """Returns the module of sums over one rank's columns."""
    if backend == "triton":
        from paint_kernels import _triton_shards

        return _triton_shards
    from paint_kernels import _torch_shards

    return _torch_shards


def topk_functions(backend: str) -> ModuleType:
    """Returns the module of products with a few rows of the head per token."""
    if backend == "triton":
        from paint_kernels import _triton_topk

        return _triton_topk
    from paint_kernels import _torch_topk

    return _torch_topk
