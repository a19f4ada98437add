"""The fixed teacher: the base before training."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from paint_engine.model.forward import compute_dtype
from paint_engine.model.teachers.base import Teacher, scoring_with


def _frozen_copy(model: nn.Module) -> nn.Module:
    """Returns a copy of a model in evaluation mode, with its weights in the compute dtype if that
    is narrower: it is not trained, so that loses nothing.

    Buffers keep their dtype. In bfloat16, the frequencies of rotary embeddings would be wrong by up
    to 0.4%, and the angles at the position 1,000 by radians.
    """
    narrow = compute_dtype(model) if compute_dtype(model) != torch.float32 else None
    weights = {
        id(weight): nn.Parameter(weight.detach().to(narrow, copy=True), requires_grad=False)
        for weight in model.parameters()
    }
    # deepcopy takes what its memo has. So no second copy in the wider dtype is made.
    return copy.deepcopy(model, weights).eval()


class FixedTeacher(Teacher):
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
        self._is_lent = False
        if not isinstance(model, PeftModel) and copies:
            self._copy = _frozen_copy(model)

    @property
    def copy(self) -> nn.Module | None:
        """The frozen copy, which is sharded like the model; None if the teacher is the model with
        its adapters off."""
        return self._copy

    @property
    def exists(self) -> bool:
        """Whether there is a base to score with."""
        has_one = self._copy is not None or isinstance(self._model, PeftModel)
        return has_one and not self._is_lent

    def lend_copy(self) -> nn.Module:
        """Returns the copy for another use, which may change its weights. There is no base to score
        with from then on."""
        assert self._copy is not None, "the model has adapters, or no copy was made"
        self._is_lent = True
        return self._copy

    @contextmanager
    def scoring(self) -> Iterator[nn.Module]:
        """A context that yields the base, in evaluation mode and without gradients.

        It sets the layers' own flag only. peft's `disable_adapter()` also clears `requires_grad`,
        which sharded training caches at its first forward pass.
        """
        assert self.exists, "all weights are trained, and no copy of the base was made or is left"
        if self._copy is not None:
            with torch.no_grad():
                yield self._copy
            return
        with scoring_with(self._model):
            assert not any(layer._disable_adapters for layer in self._layers), "adapters are off"
            for layer in self._layers:
                layer._disable_adapters = True
            try:
                yield self._model
            finally:
                for layer in self._layers:
                    layer._disable_adapters = False
