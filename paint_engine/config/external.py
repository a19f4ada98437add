"""The models of `teacher.weights = "external"`, and which of them score a problem's rollouts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from paint_engine.config.schema import Config
from paint_engine.config.sections import ModelSection


@dataclass(frozen=True)
class TeacherModel:
    """One of the teachers: TeacherModel("math", ModelSection(...), weight=0.5)

    name: its value in the routing column, and what messages call it.
    section: names its files. All else is as for the student: dtype, attention, trust.
    weight: factor on the loss against it. The weights of a mixture add up to 1.
    """

    name: str
    section: ModelSection
    weight: float


def teacher_models(config: Config) -> tuple[TeacherModel, ...]:
    """Returns the models that are teachers, in order; none if the teacher is the student's own
    model."""
    section = config.teacher
    if section.weights != "external":
        return ()
    listed = section.models if section.model is None else (section.model,)
    weights = section.model_weights or (1.0,) * len(listed)
    total = math.fsum(weights)
    routed = section.route_column is not None
    return tuple(
        TeacherModel(
            name,
            config.model.model_copy(
                update={"name_or_path": model, "revision": section.revision},
            ),
            1.0 if routed else weight / total,
        )
        for name, model, weight in zip(section.model_names or listed, listed, weights, strict=True)
    )


def scorers(config: Config, route: str) -> tuple[int, ...]:
    """Returns the places, among the run's teachers, of those that score a problem's rollouts.

    route: the problem's value in the routing column; "" without one.
    """
    models = teacher_models(config)
    if config.teacher.route_column is None:
        return tuple(range(max(1, len(models))))
    return ([model.name for model in models].index(route),)


def scorer_names(config: Config, places: Sequence[int]) -> tuple[str, ...]:
    """Returns the names of the models at these places among the run's teachers: those of
    `teacher.model_names`, else what names their files, or the served model's. Empty if the teacher
    is the student's own model."""
    if config.teacher.url is not None:
        return tuple(filter(None, (config.teacher.served_model,)))
    models = teacher_models(config)
    return tuple(models[place].name for place in places) if models else ()
