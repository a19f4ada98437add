"""The teacher's weights: the base's, a running mean of the student's, or the student's own."""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from paint_engine.config.sections import TeacherSection
from paint_engine.model.forward import causal_lm, compute_dtype
from paint_engine.model.sharding import decoder_layers

# Attribute that is true on a model while a teacher scores with it.
_SCORING = "paint_scoring"


class Teacher(Protocol):
    """Scores the student's rollouts."""

    def scoring(self) -> AbstractContextManager[nn.Module]:
        """A context that yields the scoring module, in evaluation mode and without gradients.

        `requires_grad` never changes; everything else is restored when the context ends."""
        ...

    def update(self) -> None:
        """Updates the teacher. The training loop calls this after every optimizer step."""
        ...


@contextmanager
def _scoring_with(model: nn.Module) -> Iterator[None]:
    """Context manager in which a teacher scores with the student's module, in evaluation mode and
    without gradients. It cannot be nested."""
    assert not getattr(model, _SCORING, False), "a teacher's context inside another"
    was_training = model.training
    setattr(model, _SCORING, True)
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        setattr(model, _SCORING, False)
        model.train(was_training)


class FixedTeacher:
    """The base before training: the model with its adapters off, or a frozen copy of a model
    without adapters.

    copies: make that copy. Without it, a model without adapters has no base to score with.

    >>> teacher = FixedTeacher(model)
    >>> with teacher.scoring() as scorer:
    ...     hidden = hidden_states(scorer, batch.teacher)
    """

    def __init__(self, model: nn.Module, *, copies: bool = True) -> None:
        self._model = model
        self._layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
        self._copy: nn.Module | None = None
        if copies and not isinstance(model, PeftModel):
            self._copy = copy.deepcopy(model).requires_grad_(False).eval()
            if compute_dtype(model) != torch.float32:
                # The copy is not trained, so the narrower dtype loses nothing.
                self._copy.to(compute_dtype(model))

    @property
    def copy(self) -> nn.Module | None:
        """The frozen copy, which is sharded like the model; None if the teacher is the model with
        its adapters off."""
        return self._copy

    @property
    def exists(self) -> bool:
        """Whether there is a base to score with."""
        return self._copy is not None or isinstance(self._model, PeftModel)

    @contextmanager
    def scoring(self) -> Iterator[nn.Module]:
        """A context that yields the base, in evaluation mode and without gradients.

        It sets the layers' own flag only. peft's `disable_adapter()` also clears `requires_grad`,
        which sharded training caches at its first forward pass.
        """
        assert self.exists, "all weights are trained, and no copy of the base was made"
        if self._copy is not None:
            with torch.no_grad():
                yield self._copy
            return
        with _scoring_with(self._model):
            assert not any(layer._disable_adapters for layer in self._layers), "adapters are off"
            for layer in self._layers:
                layer._disable_adapters = True
            try:
                yield self._model
            finally:
                for layer in self._layers:
                    layer._disable_adapters = False

    def update(self) -> None:
        """Does nothing: the base does not change."""


class LiveTeacher:
    """The student at each step, without dropout."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @contextmanager
    def scoring(self) -> Iterator[nn.Module]:
        """A context that yields the student, in evaluation mode and without gradients."""
        with _scoring_with(self._model):
            yield self._model

    def update(self) -> None:
        """Does nothing: the teacher is the student."""


def _local(tensor: Tensor) -> Tensor:
    """Returns the values that this rank holds: the whole tensor, or its shard.

    Writes go through `data`. Otherwise autograd would report a changed value to a pending backward
    pass, although the value is restored by then.
    """
    values = tensor.data
    return values.to_local() if isinstance(values, DTensor) else values


class EmaTeacher:
    """The student with a running mean of its adapters:
    mean <- decay * mean + (1 - decay) * adapters, after each optimizer step.

    The mean starts at the current adapters, with B = 0 at the base. A and B are averaged
    separately, as in OPSD's code, so the product of the means is not the mean of the products BA.

    To be made after the model is sharded. `shadow` is the mean, float32, in the order of the
    model's trainable parameters and sharded like them.

    >>> teacher = EmaTeacher(model, decay=0.999)
    >>> optimizer.step()
    >>> teacher.update()
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        assert isinstance(model, PeftModel), "a running mean is of adapters"
        self._model = model
        self._decay = decay
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self.shadow = [p.detach().to(torch.float32, copy=True) for p in self._parameters]
        in_layers = {id(p) for layer in decoder_layers(model) for p in layer.parameters()}
        self._root_trains = any(id(p) not in in_layers for p in self._parameters)

    def update(self) -> None:
        """Moves the mean towards the adapters after an optimizer step."""
        assert not getattr(self._model, _SCORING, False), "an update inside a teacher's context"
        for mean, parameter in zip(self.shadow, self._parameters, strict=True):
            # mean + (1 - decay) * (parameter - mean) is exact if the two are equal; the sum of two
            # products is not.
            _local(mean).lerp_(_local(parameter).float(), 1.0 - self._decay)

    @contextmanager
    def scoring(self) -> Iterator[nn.Module]:
        """A context that yields the model with the mean, in evaluation mode and without gradients.

        It exchanges values inside each parameter's storage, from which FSDP gathers. The student's
        values are restored bit for bit.
        """
        with _scoring_with(self._model):
            students = [_local(parameter).clone() for parameter in self._parameters]
            try:
                self._put([_local(mean) for mean in self.shadow])
                yield self._model
            finally:
                self._put(students)

    def _put(self, values: list[Tensor]) -> None:
        root = causal_lm(self._model)
        if self._root_trains and isinstance(root, FSDPModule):
            # After a pass, the root's weights stay gathered, with their old values.
            root.reshard()
        for parameter, value in zip(self._parameters, values, strict=True):
            _local(parameter).copy_(value)


def make_teacher(section: TeacherSection, model: nn.Module, base: FixedTeacher) -> Teacher:
    """Builds the teacher that scores the rollouts of `model`. Sharding comes before this.

    base: the teacher of `weights = "fixed"`.
    """
    match section.weights:
        case "fixed":
            return base
        case "ema":
            return EmaTeacher(model, section.ema_decay)
        case "live":
            return LiveTeacher(model)
