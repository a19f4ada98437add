"""The directories `checkpoints/step-N` of a run: listing, marking the best, checking, pruning.

A checkpoint's `manifest.json` lists every other file's size and checksum, and is written last.
"""

import hashlib
import os
from pathlib import Path, PurePosixPath

from paint_engine.files import (
    BEST_LINK,
    CHECKPOINTS_DIRECTORY,
    MANIFEST_FILE,
    STATE_FILE,
    BadFile,
    FileMissing,
    check_best,
    flush,
    is_checkpoint_name,
    open_regular,
    read_json,
    reading,
    remove_at_once,
    remove_left_overs,
    write_link,
)

# Of each path below the checkpoint, [size in bytes, BLAKE2b checksum].
Manifest = dict[str, tuple[int, str]]


def checkpoint_directory(run_dir: Path) -> Path:
    """Returns the directory of a run's checkpoints."""
    return run_dir / CHECKPOINTS_DIRECTORY


def checkpoint_step(checkpoint: Path) -> int:
    """The N of `step-N`."""
    return int(checkpoint.name.removeprefix("step-"))


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Finished checkpoints, oldest first; `find_damage` tells whether one is still intact.

    Raises ReadFailed if the system refuses to list them: that there are none would be wrong.
    """
    directory = checkpoint_directory(run_dir)
    try:
        with reading(directory), os.scandir(directory) as entries:
            found = [
                directory / entry.name
                for entry in entries
                if is_checkpoint_name(entry.name) and entry.is_dir(follow_symlinks=False)
            ]
    except FileMissing:
        return []
    return sorted(found, key=checkpoint_step)


def split_place(text: str) -> tuple[Path, str | None]:
    """A directory and the part after a colon: ("runs/a", "best") for "runs/a:best", ("runs/a",
    None) for "runs/a". An existing directory is never split at a colon in its name."""
    path = Path(text)
    if path.is_dir() or ":" not in text:
        return path, None
    place, _, which = text.rpartition(":")
    return Path(place), which


def mark_best(run_dir: Path, step: int) -> None:
    """Points `checkpoints/best` at `step-N`, which is then kept in addition to the newest ones."""
    directory = checkpoint_directory(run_dir)
    assert (directory / f"step-{step}").is_dir(), f"step-{step} is not saved"
    write_link(directory / BEST_LINK, f"step-{step}")


def best_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint marked as best; None if there is none. Raises BadFile for a link to something
    else than a checkpoint beside it."""
    link = checkpoint_directory(run_dir) / BEST_LINK
    if not link.is_symlink():
        return None
    check_best(link)
    return link.parent / link.readlink() if link.is_dir() else None


def prune(run_dir: Path, newest: Path, keep: int) -> None:
    """Deletes all but the best checkpoint and the newest `keep`, and what killed processes left.

    newest: the checkpoint just written. A later one was damaged and skipped when the run was
    resumed: it is not counted, and is replaced when the run reaches that step again.

    Raises WriteFailed.
    """
    best, last = best_checkpoint(run_dir), checkpoint_step(newest)
    so_far = [path for path in list_checkpoints(run_dir) if checkpoint_step(path) <= last]
    for old in so_far[:-keep]:
        if old != best:
            remove_at_once(old)
    remove_left_overs(newest.parent)


def _fingerprint(file: Path) -> tuple[int, str]:
    with open(open_regular(file, os.O_RDONLY), "rb") as stream:
        digest = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16))
        return os.fstat(stream.fileno()).st_size, digest.hexdigest()


def file_names(directory: Path) -> list[str]:
    """All files below the directory, as sorted paths relative to it."""
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())


def seal(unfinished: Path, names: list[str]) -> Manifest:
    """The manifest's entries for these files, after flushing them to the disk."""
    for name in names:
        flush(unfinished / name)
    return {name: _fingerprint(unfinished / name) for name in names}


def _is_file_name(name: str) -> bool:
    """Whether a file below a checkpoint can have this name."""
    place = PurePosixPath(name)
    inside = not place.is_absolute() and ".." not in place.parts and str(place) == name
    # The system takes no null byte and at most 255 bytes a part; UTF-8 no lone surrogate.
    return inside and name.isprintable() and all(len(p.encode()) <= 255 for p in place.parts)


def find_damage(checkpoint: Path, rank: int = 0, num_ranks: int = 1) -> str | None:
    """Returns what is wrong with a checkpoint's files, or None if they are what was written.

    rank: this one of `num_ranks`, each of which checks its share of the files.

    Raises ReadFailed where the system refuses to read a file, which may be intact.
    """
    name = MANIFEST_FILE
    try:
        manifest = read_json(checkpoint / name, dict[str, list[int | str]])
        if STATE_FILE not in manifest:
            return f"{MANIFEST_FILE} does not list {STATE_FILE}"
        for name in sorted(manifest)[rank::num_ranks]:
            if not _is_file_name(name):
                return f"{MANIFEST_FILE} lists {name!r}, which is no file of a checkpoint"
            with reading(checkpoint / name):
                if list(_fingerprint(checkpoint / name)) != manifest[name]:
                    return f"{name} is not what was written"
    except BadFile as error:
        return str(error)
    except FileMissing:
        return f"{name} is missing"
    return None
