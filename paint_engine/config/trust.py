"""Settings that widen trust: the code that a run imports, the servers that it talks to, the places
that it writes to besides its own directory.

A run directory is what colleagues hand to each other. So its own file cannot allow these settings:
the command line of the command that uses them gives them again. Everything else in that file is
data. Nothing of a recorded configuration may be imported before `check_granted`, hence
`toml.recorded_config`.

A file given with `--config` is the user's own and may set everything, unless it is a run's
(`run_directory_of`). The rule goes by names and places, not by what a file says of itself: what a
run directory needs, to be one for any command, cannot be left out of it to pass for a user's file.
Refusing these settings in every file would have been simpler, and would have made each user of an
own reward, a server or W&B repeat them with every command.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from paint_engine.config.plugins import is_own
from paint_engine.config.schema import Config
from paint_engine.config.sections import BESIDE_RUN
from paint_engine.config.toml import LEAVES, flag, toml_value, value_of
from paint_engine.files import CHECKPOINTS_DIRECTORY, CONFIG_FILE
from paint_engine.keys import SERVER_KEY


@dataclass(frozen=True)
class _Widening:
    """does: what the value makes the run do, for messages. when: whether it widens trust."""

    does: str
    when: Callable[[Config], bool]


# With trust_remote_code, the names and revisions of the model and of its teachers say whose code
# runs. Of the other keys, none names a module, a server or a place to write: data.* and eval.* name
# rows to read, model.* and teacher.* without trust_remote_code name weights to read, and --resume
# sets run.dir itself.
_WIDENING: Mapping[str, _Widening] = {
    "model.trust_remote_code": _Widening(
        "runs Python code that comes with the model", lambda c: c.model.trust_remote_code
    ),
    "model.name_or_path": _Widening(
        "the model whose code runs", lambda c: c.model.trust_remote_code
    ),
    "model.revision": _Widening(
        "the version of that code",
        lambda c: c.model.trust_remote_code and c.model.revision is not None,
    ),
    "teacher.model": _Widening(
        "the teacher whose code runs too",
        lambda c: c.model.trust_remote_code and c.teacher.model is not None,
    ),
    "teacher.models": _Widening(
        "the teachers whose code runs too",
        lambda c: c.model.trust_remote_code and len(c.teacher.models) > 0,
    ),
    "teacher.revision": _Widening(
        "the version of the teacher's code",
        lambda c: c.model.trust_remote_code and c.teacher.revision is not None,
    ),
    "objective.name": _Widening("imports this module", lambda c: is_own(c.objective.name)),
    "objective.token_weights": _Widening(
        "imports this module", lambda c: is_own(c.objective.token_weights)
    ),
    "teacher.context": _Widening("imports this module", lambda c: is_own(c.teacher.context)),
    "reward.function": _Widening("imports this module", lambda c: is_own(c.reward.function)),
    "rollout.url": _Widening(
        f"sends prompts and {SERVER_KEY} there; none = no server",
        lambda c: c.rollout.url is not None,
    ),
    "rollout.adapter_dir": _Widening(
        "writes and deletes there; none = shared memory",
        lambda c: c.rollout.adapter_dir is not None,
    ),
    "teacher.url": _Widening(
        f"sends prompts, completions and {SERVER_KEY} there", lambda c: c.teacher.url is not None
    ),
    "eval.base_cache": _Widening(
        "writes there; auto = beside the run directory, none = nowhere",
        lambda c: c.eval.base_cache not in (None, BESIDE_RUN),
    ),
    "run.wandb_project": _Widening(
        "sends the run to W&B with your key; none = does not",
        lambda c: c.run.wandb_project is not None,
    ),
    "run.push_to_hub": _Widening(
        "pushes the adapter to the hub with your token; none = does not",
        lambda c: c.run.push_to_hub is not None,
    ),
}
# Of a run's file that --config names. --resume does neither.
_PLACES: Mapping[str, _Widening] = {
    "run.dir": _Widening("writes there; none = a new directory", lambda c: c.run.dir is not None),
    "run.overwrite": _Widening("deletes the run that is there", lambda c: c.run.overwrite),
}
_OWN_FILE = (
    "; a file of your own may set all of this, if it is not named config.toml and lies in no run "
    "directory"
)


def trust_flags(config: Config, *, but: str = "") -> str:
    """Returns the flags with which a command resumes or repeats this run from its recorded file,
    each after a space: " --reward.function my_module:my_reward"; "" if it needs none.

    but: a key that is left out.
    """
    return "".join(
        f" {flag(key, value_of(config, key))}"
        for key, rule in _WIDENING.items()
        if rule.when(config) and key != but
    )


def run_directory_of(path: Path) -> Path | None:
    """Returns the run directory that a configuration file belongs to; None for a user's own file.

    A run's file is named config.toml, or lies somewhere below a directory that holds a config.toml
    or checkpoints: what makes a directory a run's for every command.
    """
    for place in (path.absolute(), path.resolve()):
        if place.name.casefold() == CONFIG_FILE:
            return place.parent
        for parent in place.parents:
            if (parent / CONFIG_FILE).is_file() or any(
                (parent / CHECKPOINTS_DIRECTORY).glob("step-*")
            ):
                return parent
    return None


def check_granted(config: Config, given: Collection[str], source: str, *, resumes: bool) -> None:
    """Raises ValueError with every setting that widens trust and is not on the command line, and
    with the flags that allow them.

    config: what the command would run, with the values of a run directory's file.
    given: the keys of the command line.
    source: that file, for the message.
    resumes: with `--resume`, the run stays in its directory.
    """
    rules = _WIDENING if resumes else {**_WIDENING, **_PLACES}
    missing = {k: r for k, r in rules.items() if k not in given and r.when(config)}
    if not missing:
        return
    values = {key: value_of(config, key) for key in missing}
    asked = ", ".join(
        f"{key} {toml_value(value) if isinstance(value, tuple) else repr(value)} "
        f"({missing[key].does})"
        for key, value in values.items()
    )
    # A place is rarely the one that is meant.
    safe = {key: LEAVES[key].default for key in _PLACES}
    flags = " ".join(
        flag(key, value) for key, value in {**values, **safe}.items() if key in missing
    )
    raise ValueError(
        f"{source}: needs {flags} on this command line: the run directory's own file asks for "
        f"{asked}, and cannot allow it; check each value, then give it"
        + ("" if resumes else _OWN_FILE)
    )
