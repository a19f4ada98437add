"""The privileged teacher's weights, as a context in which hidden states are scored: the base's, a
running mean of the student's, or the student's own."""

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

# Set on a model while a teacher scores with it.
_SCORING = "paint_scoring"


class Teacher(Protocol):
    """What scores the student's rollouts."""

    def scoring(self) -> AbstractContextManager[nn.Module]:
        """The module to score with, in evaluation mode and without gradients; requires_grad, and
        after the context everything else, is as it was."""
        ...

    def update(self) -> None:
        """To be called after every optimizer step."""
        ...


@contextmanager
def _scoring_with(model: nn.Module) -> Iterator[None]:
    """The student's module in a teacher's hands: evaluation mode, no gradients, one teacher at a
    time."""
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
    """The base as it was before training: adapters off, or a frozen copy where no adapters are
    used.

    >>> teacher = FixedTeacher(model)
    >>> with teacher.scoring() as scorer:
    ...     hidden = hidden_states(scorer, batch.teacher)
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
        self._copy: nn.Module | None = None
        if not isinstance(model, PeftModel):
            self._copy = copy.deepcopy(model).requires_grad_(False).eval()
            if compute_dtype(model) != torch.float32:
                # Not trained, so it can take the narrower dtype.
                self._copy.to(compute_dtype(model))

    @property
    def copy(self) -> nn.Module | None:
        """The frozen copy, to be sharded like the model; None where the teacher is the model with
        its adapters off."""
        return self._copy

    @contextmanager
    def scoring(self) -> Iterator[nn.Module]:
        """The base, in evaluation mode and without gradients.

        Only the layers' own flag is flipped: peft's `disable_adapter()` would also clear
        requires_grad, which sharded training caches at its first forward.
        """
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
        """Nothing: the base does not move."""


class LiveTeacher:
    """The student itself as it is at each step, without dropout."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @contextmanager
    def scoring(self) -> Iterator[nn.Module]:
        """The student, in evaluation mode and without gradients."""
        with _scoring_with(self._model):
            yield self._model

    def update(self) -> None:
        """Nothing: the student's steps are the teacher's."""


def _local(tensor: Tensor) -> Tensor:
    """The values that this rank holds: the whole tensor, or its shard.

    Written to by way of `data`, for autograd would take a value that a pending backward pass needs
    for changed, though it is back by then.
    """
    values = tensor.data
    return values.to_local() if isinstance(values, DTensor) else values


class EmaTeacher:
    """The student with a running mean of its adapters in place of them:
    mean <- decay * mean + (1 - decay) * adapters, after each optimizer step.

    It starts from the adapters as they are when it is made, with B = 0 from the base. A and B are
    averaged apart, as OPSD's code does: the mean's update BA is not the mean of the updates BA.

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
        """Moves the mean towards the adapters as the optimizer has just left them."""
        assert not getattr(self._model, _SCORING, False), "an update inside a teacher's context"
        for mean, parameter in zip(self.shadow, self._parameters, strict=True):
            # mean + (1 - decay) * (parameter - mean): unlike the sum of two products, exact where
            # the two are equal.
            _local(mean).lerp_(_local(parameter).float(), 1.0 - self._decay)

    @contextmanager
    def scoring(self) -> Iterator[nn.Module]:
        """The model with the mean in place, in evaluation mode and without gradients.

        Values are exchanged inside each parameter's own storage, which sharded weights are gathered
        from; the student's come back bit for bit.
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
            # A pass leaves the root's weights gathered, with the values that they had.
            root.reshard()
        for parameter, value in zip(self._parameters, values, strict=True):
            _local(parameter).copy_(value)


def make_teacher(section: TeacherSection, model: nn.Module, base: FixedTeacher) -> Teacher:
    """What scores the rollouts of `model`, which is sharded already where it is to be.

    base: what "fixed" stands for.
    """
    match section.weights:
        case "fixed":
            return base
        case "ema":
            return EmaTeacher(model, section.ema_decay)
        case "live":
            return LiveTeacher(model)
