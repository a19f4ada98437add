"""The fixed privileged teacher: the initial model, as a context in which hidden states are
scored."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from paint_engine.model import compute_dtype


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
        """The module to score with, in evaluation mode and without gradients.

        Only the layers' own flag is flipped: peft's `disable_adapter()` would also clear
        requires_grad, which sharded training caches at its first forward.
        """
        if self._copy is not None:
            with torch.no_grad():
                yield self._copy
            return
        flags = [layer._disable_adapters for layer in self._layers]
        assert not any(flags), "the adapters are off already: a teacher's context inside another"
        was_training = self._model.training
        self._model.eval()
        for layer in self._layers:
            layer._disable_adapters = True
        try:
            with torch.no_grad():
                yield self._model
        finally:
            for layer in self._layers:
                layer._disable_adapters = False
            self._model.train(was_training)
