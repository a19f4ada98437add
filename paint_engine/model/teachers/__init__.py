"""The teachers, one file for each kind; `teacher.weights` names the kind."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from paint_engine.config.sections import TeacherSection
from paint_engine.model.teachers.base import Teacher
from paint_engine.model.teachers.ema import EmaTeacher
from paint_engine.model.teachers.external import ExternalTeacher, Panel
from paint_engine.model.teachers.fixed import FixedTeacher
from paint_engine.model.teachers.live import LiveTeacher
from paint_engine.model.teachers.refreshed import RefreshedAdapters, RefreshedCopy

STORED_AS: Mapping[str, str] = {
    EmaTeacher.stored_as: "running mean of the adapters",
    RefreshedAdapters.stored_as: "weights of the last refresh",
}
"""what teachers keep in a checkpoint, by the kind of its entries"""


@dataclass(frozen=True)
class _Parts:
    """What a teacher is made of. base: the teacher of `weights = "fixed"`."""

    section: TeacherSection
    model: nn.Module
    base: FixedTeacher
    external: Sequence[ExternalTeacher]


def _fixed(parts: _Parts) -> Teacher:
    every = parts.section.refresh_every
    if every is None:
        return parts.base
    if parts.base.copy is None:
        return RefreshedAdapters(parts.model, every)
    return RefreshedCopy(parts.model, parts.base, every)


_KINDS: Mapping[str, Callable[[_Parts], Teacher]] = {
    "fixed": _fixed,
    "ema": lambda parts: EmaTeacher(parts.model, parts.section.ema_decay),
    "live": lambda parts: LiveTeacher(parts.model),
    "external": lambda parts: Panel(parts.external),
}


def make_teacher(
    section: TeacherSection,
    model: nn.Module,
    base: FixedTeacher,
    external: Sequence[ExternalTeacher] = (),
) -> Teacher:
    """Builds the teacher that scores the rollouts of `model`. Sharding comes before this.

    base: the teacher of `weights = "fixed"`.
    external: the models of `weights = "external"`.
    """
    return _KINDS[section.weights](_Parts(section, model, base, external))


__all__ = [
    "STORED_AS",
    "EmaTeacher",
    "ExternalTeacher",
    "FixedTeacher",
    "LiveTeacher",
    "Panel",
    "RefreshedAdapters",
    "RefreshedCopy",
    "Teacher",
    "make_teacher",
]
