"""Finds the checkpoint that a user names, and the base model that it was trained from."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from paint_engine.checkpoint.directory import (
    best_checkpoint,
    find_damage,
    list_checkpoints,
)
from paint_engine.config.sections import ModelSection
from paint_engine.config.toml import flag
from paint_engine.files import (
    ADAPTER_CONFIG_FILE,
    CONFIG_FILE,
    MANIFEST_FILE,
    Record,
    check_links,
    checked,
    read_json,
    read_tables,
    recorded_commit,
)

Section = TypeVar("Section", bound=BaseModel)


def choose_checkpoint(path: Path, which: str | None, given: str | None = None) -> Path:
    """The checkpoint at `path`, or the one that `which` names in a run directory. An adapter in
    peft's format that no run has made is its own checkpoint.

    which: "last" (the default), "best" or "step-N"; only with a run directory.
    given: the flag as the user gave it, for messages; None = `--checkpoint`.

    Raises ValueError where there is no such checkpoint, where it is damaged, or where links lie in
    it or in the run directory; ReadFailed where it cannot be read.
    """
    if path.is_dir():
        check_links(path.resolve())
    checkpoints = list_checkpoints(path)
    is_checkpoint = (path / MANIFEST_FILE).is_file()
    if which is None and not is_checkpoint and (path / ADAPTER_CONFIG_FILE).is_file():
        return path.resolve()
    if is_checkpoint and which is None:
        chosen = path.resolve()
    elif not path.is_dir():
        raise ValueError(
            f"{path}: no such directory; give a run directory that holds checkpoints/step-N, or "
            "one of these checkpoints"
        )
    elif not checkpoints:
        raise ValueError(
            f"{path} has no checkpoint to choose from: give a run directory that holds "
            "checkpoints/step-N, or one of these checkpoints without --checkpoint"
        )
    elif which == "best":
        chosen = best_checkpoint(path)
    elif which is None or which == "last":
        chosen = checkpoints[-1]
    else:
        chosen = next((c for c in checkpoints if c.name == which), None)
    if chosen is None:
        there = [checkpoint.name for checkpoint in checkpoints]
        marked = ["best"] if best_checkpoint(path) is not None else []
        raise ValueError(
            f"{given or f'--checkpoint {which}'}: {path} has no {which}; it has "
            f"{', '.join(there)}; give one of these, {' or '.join([*marked, 'last'])}"
        )
    with present(chosen):
        if damage := find_damage(chosen):
            raise ValueError(
                f"{chosen} is damaged ({damage}): choose another checkpoint of its run"
            )
    return chosen


class _AdapterConfig(Record):
    base_model_name_or_path: str | None = None
    revision: str | None = None


@contextmanager
def present(checkpoint: Path | None) -> Iterator[None]:
    """Around what reads a checkpoint, if there is one: raises ValueError in place of any other
    exception if it was removed meanwhile, as by its run."""
    try:
        yield
    except Exception as error:
        if checkpoint is None or checkpoint.is_dir():
            raise
        raise ValueError(
            f"{checkpoint} was removed while it was read: its run keeps the newest checkpoints and "
            "the best one; choose one of those, or raise checkpoint.keep when the run is resumed"
        ) from error


def recorded_section(checkpoint: Path, name: str, kind: type[Section]) -> Section | None:
    """A section of the configuration of the checkpoint's run; None where the checkpoint is in no
    run directory. Raises BadFile."""
    config = checkpoint.parent.parent / CONFIG_FILE
    if not config.is_file():
        return None
    return checked(kind, read_tables(config).get(name, {}), f"{config}: [{name}]")


def recorded_base(checkpoint: Path) -> ModelSection | None:
    """The model that the checkpoint was trained from, by its run's configuration, else by the
    adapter's; None where neither names one."""
    adapter_config = checkpoint / ADAPTER_CONFIG_FILE
    if (recorded := recorded_section(checkpoint, "model", ModelSection)) is not None:
        commit = recorded_commit(checkpoint.parent.parent)
        return recorded if commit is None else recorded.model_copy(update={"revision": commit})
    if adapter_config.is_file():
        # Outside of a run directory it may be a link, as in the hub's cache.
        settings = read_json(adapter_config.resolve(), _AdapterConfig)
        name, revision = settings.base_model_name_or_path, settings.revision
        values = {"name_or_path": name, "revision": revision}
        return checked(ModelSection, values, str(adapter_config.resolve())) if name else None
    return None


def find_base(
    checkpoint: Path,
    name_or_path: str | None,
    revision: str | None = None,
    *,
    trust_remote_code: bool = False,
) -> ModelSection:
    """The model that the checkpoint was trained from: `name_or_path` if given, else
    `recorded_base`, with its commit if it is of the hub.

    revision: of the hub; None = the recorded one, if `name_or_path` is None too.
    trust_remote_code: as the command line says. What is recorded can neither allow it nor say whose
        code that is.

    Raises ValueError where neither names a model, and where the code of a recorded one would run
    that the command line does not name.
    """
    recorded = recorded_base(checkpoint) if name_or_path is None or trust_remote_code else None
    if name_or_path is None:
        if recorded is None:
            raise ValueError(
                f"{checkpoint} is in no run directory, so it does not say which model it was "
                "trained from, whose tokenizer is needed: give that with --model"
            )
        if recorded.trust_remote_code or trust_remote_code:
            raise ValueError(_ask_for_code(checkpoint, recorded))
        return recorded if revision is None else recorded.model_copy(update={"revision": revision})
    if not trust_remote_code:
        return named_model({"name_or_path": name_or_path, "revision": revision})
    # Of the record, the dtype and no more: the flags that `_ask_for_code` names change no number.
    given = {"name_or_path": name_or_path, "revision": revision, "trust_remote_code": True}
    named = named_model(given)
    return named if recorded is None else recorded.model_copy(update=given)


def named_model(values: Mapping[str, object]) -> ModelSection:
    """Returns the model that the command line names. Raises ValueError for what names none."""
    return checked(ModelSection, dict(values), "--model, --revision", "check them")


def _ask_for_code(checkpoint: Path, base: ModelSection) -> str:
    flags = ["--trust-remote-code", flag("model", base.name_or_path)]
    if base.revision is not None:
        flags.append(flag("revision", base.revision))
    return (
        f"{checkpoint} was trained from the model {base.name_or_path!r}, whose Python code would "
        f"run: needs {' '.join(flags)} on this command line: the run's own files can neither allow "
        "it nor name the model; check whose code that is, then give it"
    )
