"""The live teacher: the student itself."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from paint_engine.model.teachers.base import Teacher, scoring_with


class LiveTeacher(Teacher):
    """The student at each step, without dropout."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @contextmanager
    def scoring(self) -> Iterator[nn.Module]:
        """A context that yields the student, in evaluation mode and without gradients."""
        with scoring_with(self._model):
            yield self._model
