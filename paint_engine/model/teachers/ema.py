"""The EMA teacher: a running mean of the student's adapters."""

from torch import nn

from paint_engine.model.teachers.adapters import OtherAdapters


class EmaTeacher(OtherAdapters):
    """The student with a running mean of its adapters:
    mean <- decay * mean + (1 - decay) * adapters, after each optimizer step.

    A and B are averaged separately, as in OPSD's code, so the product of the means is not the mean
    of the products BA. `shadow` is the mean.

    >>> teacher = EmaTeacher(model, decay=0.999)
    >>> optimizer.step()
    >>> teacher.update()
    """

    stored_as = "ema"

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model)
        self._decay = decay

    def update(self) -> None:
        """Moves the mean towards the adapters after an optimizer step."""
        self._move(1.0 - self._decay)
