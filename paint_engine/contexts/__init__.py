"""Contexts, one file each: what the teacher is shown beside the problem (`teacher.context`).

Declarations and choices are made without PyTorch.
"""

from paint_engine.contexts.base import Context, ContextFailed, Shown, context_of, shown_by

__all__ = ["Context", "ContextFailed", "Shown", "context_of", "shown_by"]
