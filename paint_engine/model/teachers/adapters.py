"""The base of teachers that are the student's module with other values of its adapters."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from paint_engine.model.forward import causal_lm
from paint_engine.model.sharding import decoder_layers
from paint_engine.model.teachers.base import Teacher, is_scoring, local, scoring_with


class OtherAdapters(Teacher):
    """The student with other values of its adapters, which start at the current ones, with B = 0 at
    the base.

    To be made after the model is sharded. `shadow` holds them, float32, in the order of the model's
    trainable parameters and sharded like them.
    """

    def __init__(self, model: nn.Module) -> None:
        assert isinstance(model, PeftModel), "there are no adapters"
        self._model = model
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self.shadow = [p.detach().to(torch.float32, copy=True) for p in self._parameters]
        in_layers = {id(p) for layer in decoder_layers(model) for p in layer.parameters()}
        self._root_trains = any(id(p) not in in_layers for p in self._parameters)

    @property
    def kept(self) -> list[Tensor]:
        """The adapters' other values."""
        return self.shadow

    def _move(self, share: float) -> None:
        """Moves the values towards the adapters, by this share of the way."""
        assert not is_scoring(self._model), "an update inside a teacher's context"
        for value, parameter in zip(self.shadow, self._parameters, strict=True):
            # value + share * (parameter - value) is exact if the two are equal; the sum of two
            # products is not.
            local(value).lerp_(local(parameter).float(), share)

    @contextmanager
    def scoring(self) -> Iterator[nn.Module]:
        """A context that yields the model with these values, in evaluation mode and without
        gradients.

        It exchanges values inside each parameter's storage, from which FSDP gathers. The student's
        values are restored bit for bit.
        """
        with scoring_with(self._model):
            students = [local(parameter).clone() for parameter in self._parameters]
            try:
                self._put([local(value) for value in self.shadow])
                yield self._model
            finally:
                self._put(students)

    def _put(self, values: list[Tensor]) -> None:
        root = causal_lm(self._model)
        if self._root_trains and isinstance(root, FSDPModule):
            # After a pass, the root's weights stay gathered, with their old values.
            root.reshard()
        for parameter, value in zip(self._parameters, values, strict=True):
            local(parameter).copy_(value)
