"""Evaluations of models before training, kept for every run and command that would repeat them.

An entry is the evaluation of one model on one benchmark. Its name ends with a digest of all that
the answers and their verdicts depend on: the weights, the engine, dtype and packages that sample
from them, how answers are sampled and judged, and the problems. Two processes that make the same
entry at once write the same header, and each file is replaced as a whole, so a reader finds a
complete evaluation whichever came last.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from paint_engine.config.plugins import is_own
from paint_engine.config.sections import BESIDE_RUN
from paint_engine.evaluation.store import (
    Evaluation,
    Header,
    read_finished,
    remove_shares,
    write_evaluation,
)
from paint_engine.files import (
    BASE_CACHE_DIRECTORY,
    BadFile,
    DirectoryLock,
    WriteFailed,
    check_links,
    package_versions,
    writing,
)

_PACKAGES = "packages"
_NUM_DIGITS = 16


def base_cache_of(setting: str | None, run_dir: Path) -> Path | None:
    """Returns the directory that `eval.base_cache` or `--base-cache` names; None = there is none.

    setting: a directory, "auto" or None. run_dir: the training run's.

    Raises BadFile where the directory beside the run is a link: an archive of runs may hold one.
    """
    if setting is None or setting != BESIDE_RUN:
        return None if setting is None else Path(setting)
    # "." and ".." have no name. A run directory that is a link is not followed.
    named = run_dir if run_dir.name not in ("", "..") else Path(os.path.abspath(run_dir))
    beside = named.parent / BASE_CACHE_DIRECTORY
    if beside.is_symlink():
        raise BadFile(
            f"{beside} is a link to {os.readlink(beside)!r}; needs a directory of its own; remove "
            "it, or name the place that it stands for with --eval.base_cache"
        )
    return beside


def cache_header(header: Header) -> Header | None:
    """Returns the header of the entry for an evaluation of a model before training; None if it is
    not kept: a reward function of the user's may change under the same name.

    header: its subject is the model's identity (`Target.identity`).
    """
    if is_own(header.reward_function):
        return None
    return replace(header, subject=header.subject | {_PACKAGES: package_versions()}, step=None)


def _name_of(header: Header) -> str:
    digest = hashlib.sha256(json.dumps(asdict(header), sort_keys=True).encode()).hexdigest()
    return f"{header.benchmark}-{digest[:_NUM_DIGITS]}"


def find_base(directory: Path, header: Header) -> tuple[Path, Evaluation] | None:
    """Returns the entry of this header (`cache_header`'s) with its file, or None if there is none.

    Raises BadFile for what no evaluation has written, and ReadFailed.
    """
    if not directory.is_dir():
        return None
    check_links(directory)
    found = read_finished(directory, _name_of(header), header)
    return None if found is None else (directory / f"{_name_of(header)}.json", found)


def copy_base(
    cache: Path,
    entry: Header,
    directory: Path,
    name: str,
    header: Header,
    lock: DirectoryLock | None,
) -> tuple[Path, Evaluation] | None:
    """Copies the entry of a header (`cache_header`'s) to `directory` under `name`, as an evaluation
    with `header` that has taken no time. Returns the entry's file and the copy; None without one.

    Raises BadFile, ReadFailed, WriteFailed and LockLost.
    """
    found = find_base(cache, entry)
    if found is None:
        return None
    file, evaluation = found
    if lock is not None:
        lock.check()
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        # Of other settings.
        (directory / f"{name}.json").unlink(missing_ok=True)
    copy = replace(evaluation, header=header, seconds=0.0)
    write_evaluation(directory, name, copy)
    remove_shares(directory, name)
    return file, copy


def keep_base(directory: Path, header: Header, evaluation: Evaluation) -> Path:
    """Writes the entry of this header (`cache_header`'s), and returns its file. Raises BadFile and
    WriteFailed."""
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    check_links(directory)
    write_evaluation(directory, _name_of(header), replace(evaluation, header=header))
    return directory / f"{_name_of(header)}.json"


def share_base(
    directory: Path,
    header: Header,
    evaluation: Evaluation,
    say: Callable[[str], object],
    setting: str,
) -> None:
    """Keeps the entry for others. Where the place cannot be written, a note says so: whoever made
    the evaluation has its own copy.

    setting: the flag that names the directory.
    """
    try:
        keep_base(directory, header, evaluation)
    except WriteFailed as failure:
        say(
            f"note: the base's evaluation is not kept for other runs: {failure}; name another "
            f"directory with {setting}, or give none"
        )
