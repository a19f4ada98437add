"""The refreshed teacher: the base at first, then the student of every N-th step."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from paint_engine.model.forward import causal_lm
from paint_engine.model.teachers.adapters import OtherAdapters
from paint_engine.model.teachers.base import Teacher, local
from paint_engine.model.teachers.fixed import FixedTeacher

STORED_AS = "refreshed"


class RefreshedAdapters(OtherAdapters):
    """The student with its adapters of the last refresh, a copy taken after every `every` steps.
    Before the first, it is the base."""

    stored_as = STORED_AS

    def __init__(self, model: nn.Module, every: int) -> None:
        super().__init__(model)
        self._every = every

    def finish_step(self, num_steps: int) -> None:
        """Takes over the student's adapters if a refresh is due."""
        if num_steps % self._every == 0:
            self._move(1.0)


class RefreshedCopy(Teacher):
    """The frozen copy of a model without adapters, which takes the student's weights after every
    `every` steps.

    base: gives its copy away: after the first refresh, that is no longer the base.
    """

    stored_as = STORED_AS

    def __init__(self, model: nn.Module, base: FixedTeacher, every: int) -> None:
        self._copy, self._every = base.lend_copy(), every
        copies = dict(self._copy.named_parameters())
        self._pairs = [(copies[n], p) for n, p in model.named_parameters() if p.requires_grad]

    @property
    def kept(self) -> list[Tensor]:
        """The copies of the trained weights, in the compute dtype."""
        return [copied.detach() for copied, _ in self._pairs]

    @contextmanager
    def scoring(self) -> Iterator[nn.Module]:
        """A context that yields the copy, in evaluation mode and without gradients."""
        with torch.no_grad():
            yield self._copy

    def finish_step(self, num_steps: int) -> None:
        """Takes over the student's weights if a refresh is due."""
        if num_steps % self._every:
            return
        root = causal_lm(self._copy)
        if isinstance(root, FSDPModule):
            # After a pass, the root's weights stay gathered, with their old values.
            root.reshard()
        for copied, parameter in self._pairs:
            local(copied).copy_(local(parameter))
