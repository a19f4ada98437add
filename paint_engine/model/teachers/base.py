"""What every teacher is: weights to score with, how they change, and what a checkpoint keeps."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

# Attribute that is true on a model while a teacher scores with it.
_SCORING = "paint_scoring"


class Teacher:
    """Scores the student's rollouts.

    stored_as: the kind of the entries that hold `kept` in a checkpoint; "" if nothing is kept.
    weight: the factor on the loss against this teacher; the weights of several add up to 1.
    attention: of its passes; None for the student's.
    """

    stored_as: ClassVar[str] = ""
    weight: float = 1.0
    attention: str | None = None

    @property
    def members(self) -> Sequence["Teacher"]:
        """The teachers that score, each in a pass of its own: itself, or several."""
        return (self,)

    @property
    def kept(self) -> list[Tensor]:
        """What a checkpoint keeps of it, in the order of the model's trained parameters and sharded
        like them."""
        return []

    def scoring(self) -> AbstractContextManager[nn.Module]:
        """A context that yields the scoring module, in evaluation mode and without gradients.

        `requires_grad` never changes; everything else is restored when the context ends."""
        raise NotImplementedError

    def update(self) -> None:
        """Updates the teacher. The training loop calls this after every optimizer step."""

    def finish_step(self, num_steps: int) -> None:
        """Updates the teacher after a step of training, also if its optimizer step was skipped.

        num_steps: the number of finished steps.
        """


@contextmanager
def scoring_with(model: nn.Module) -> Iterator[None]:
    """Context manager in which a teacher scores with the student's module, in evaluation mode and
    without gradients. It cannot be nested."""
    assert not is_scoring(model), "a teacher's context inside another"
    was_training = model.training
    setattr(model, _SCORING, True)
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        setattr(model, _SCORING, False)
        model.train(was_training)


def is_scoring(model: nn.Module) -> bool:
    """Returns whether a teacher scores with the student's module."""
    return getattr(model, _SCORING, False)


def local(tensor: Tensor) -> Tensor:
    """Returns the values that this rank holds: the whole tensor, or its shard.

    Writes go through `data`. Otherwise autograd would report a changed value to a pending backward
    pass, although the value is restored by then.
    """
    values = tensor.data
    return values.to_local() if isinstance(values, DTensor) else values
