"""Which keys of [teacher] each kind of teacher reads, in the process or on a server, and the checks
on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from paint_engine.config.schema import Config
from paint_engine.config.toml import LEAVES, flag, value_of
from paint_engine.recipes.base import as_given

_SERVER_KEYS = ("teacher.served_model", "teacher.served_top_k", "teacher.tail")


@dataclass(frozen=True)
class _Kind:
    """keys: those that it reads and other kinds do not. lacking: what is said of the others.
    check: of settings that contradict each other."""

    keys: tuple[str, ...] = ()
    lacking: str = ""
    check: Callable[[Config], None] = lambda config: None


def check_teacher(config: Config) -> None:
    """Raises ValueError for settings of the teacher that nothing reads or that contradict each
    other."""
    if config.teacher.url is not None:
        _check_server(config)
        return
    _refuse(
        config,
        _SERVER_KEYS,
        "teacher.url none, so that no server is asked; leave it out, or "
        "name a server with --teacher.url",
    )
    weights = config.teacher.weights
    for name, kind in _KINDS.items():
        if name != weights:
            _refuse(
                config,
                kind.keys,
                f"teacher.weights {weights!r}, which {kind.lacking}; leave "
                f"it out, or use --teacher.weights {name}",
            )
    _KINDS[weights].check(config)


def check_served_temperature(config: Config, remedy: str = "") -> None:
    """Raises ValueError for a temperature of the loss at which a server has no log-probabilities.

    remedy: another one than the temperature 1, as ", or ...".
    """
    temperature = config.objective.temperature
    if temperature != 1.0:
        raise ValueError(
            f"objective.temperature: got {temperature} with teacher.url {config.teacher.url}; a "
            "server's log-probabilities are those at temperature 1, and another temperature needs "
            f"all logits, also of the tokens that it does not list; use --objective.temperature "
            f"1.0{remedy}"
        )


def _refuse(config: Config, keys: Sequence[str], why: str) -> None:
    """Raises ValueError for the first of the keys that is not at its default.

    why: what it was given with, and what to do.
    """
    for key in keys:
        value = value_of(config, key)
        if value != LEAVES[key].default:
            raise ValueError(f"{key}: got {as_given(value)} with {why}")


def _check_server(config: Config) -> None:
    """Raises ValueError for settings of a teacher in this process beside a server."""
    url = config.teacher.url
    either = f"teacher.url {url}; a server has weights of its own, and no other teacher scores; "
    either += "leave out one of the two"
    _refuse(config, ("teacher.weights",), either)
    for kind in _KINDS.values():
        _refuse(config, kind.keys, either)
    if config.teacher.reason_first:
        raise ValueError(
            f"teacher.reason_first: got true with teacher.url {url}, which scores tokens and "
            "writes no rationales; leave out one of the two"
        )


def _check_ema(config: Config) -> None:
    if not config.lora.enabled:
        raise ValueError(
            "teacher.weights: got 'ema' with lora.enabled false; the running mean needs "
            "adapters; set --lora.enabled true, or use --teacher.weights fixed or live"
        )


def _check_external(config: Config) -> None:
    section = config.teacher
    if (section.model is None) == (not section.models):
        got = (
            "neither teacher.model nor teacher.models"
            if section.model is None
            else (f"teacher.model {section.model!r} and teacher.models {as_given(section.models)}")
        )
        raise ValueError(
            f"teacher.weights: got 'external' with {got}; needs one of the two: name another "
            "model of the student's vocabulary with --teacher.model, or several with "
            "--teacher.models (and --teacher.model none if a preset names one)"
        )
    if section.revision is not None and section.model is None:
        raise ValueError(
            f"teacher.revision: got {section.revision!r} with teacher.models; needs one model, to "
            "which a version belongs; leave it out, and name the directory of each version"
        )
    if section.reason_first:
        raise ValueError(
            "teacher.reason_first: got true with teacher.weights 'external'; the engine that "
            "writes rationales has the student's and the base's weights alone; leave it out, or "
            "use --teacher.weights fixed or live"
        )
    _check_mixture(config)
    _check_routes(config)


def _check_mixture(config: Config) -> None:
    section = config.teacher
    given = section.model_weights
    if given and section.route_column is not None:
        raise ValueError(
            f"teacher.model_weights: got {as_given(given)} with teacher.route_column "
            f"{section.route_column!r}, by which one teacher scores each rollout, with weight 1; "
            "leave out one of the two"
        )
    if given and len(given) != len(section.models):
        raise ValueError(
            f"teacher.model_weights: got {len(given)} numbers for {len(section.models)} "
            "teacher.models; needs one for each; add or remove some, or leave it out for equal "
            "weights"
        )


def _check_routes(config: Config) -> None:
    section = config.teacher
    names = section.model_names or section.models
    if section.model_names and section.route_column is None:
        raise ValueError(
            f"teacher.model_names: got {as_given(names)} without teacher.route_column; needs the "
            "column whose values they are; leave it out, or add --teacher.route_column NAME"
        )
    if section.route_column is None:
        return
    if len(section.models) < 2:
        raise ValueError(
            f"teacher.route_column: got {section.route_column!r} with {len(section.models)} "
            "teacher.models; needs two or more to choose from; leave it out, or add models"
        )
    if len(names) != len(section.models) or len(set(names)) < len(names):
        raise ValueError(
            f"teacher.model_names: got {as_given(names)} for {len(section.models)} teacher.models; "
            "needs one name for each, no two alike; give "
            + flag("teacher.model_names", tuple(f"name{i}" for i in range(len(section.models))))
        )


_KINDS: Mapping[str, _Kind] = {
    "fixed": _Kind(("teacher.refresh_every",), "is never refreshed"),
    "ema": _Kind(("teacher.ema_decay",), "has no running mean", _check_ema),
    "live": _Kind(),
    "external": _Kind(
        (
            "teacher.model",
            "teacher.revision",
            "teacher.models",
            "teacher.model_weights",
            "teacher.route_column",
            "teacher.model_names",
        ),
        "is the student's own model",
        _check_external,
    ),
}
