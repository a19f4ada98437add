"""Checkpoints of a run: saved and restored on any number of ranks, chosen, checked and merged.

What is exported here finds a checkpoint and imports no PyTorch; `save`, `load`, `weights` and
`merge` do.
"""

from paint_engine.checkpoint.choose import choose_checkpoint, find_base, present
from paint_engine.checkpoint.directory import best_checkpoint, list_checkpoints, mark_best

__all__ = [
    "best_checkpoint",
    "choose_checkpoint",
    "find_base",
    "list_checkpoints",
    "mark_best",
    "present",
]
