"""The directories `checkpoints/step-N` of a run: listing, marking the best, checking, pruning.

A checkpoint's `manifest.json` lists every other file's size and checksum, and is written last.
"""

import hashlib
import json
import re
import shutil
from pathlib import Path

from paint_engine.files import (
    BEST_LINK,
    CHECKPOINTS_DIRECTORY,
    MANIFEST_FILE,
    STATE_FILE,
    flush,
    unfinished_path,
    write_link,
    writing,
)

# Of each path below the checkpoint, [size in bytes, BLAKE2b checksum].
Manifest = dict[str, list[int | str]]


def checkpoint_directory(run_dir: Path) -> Path:
    """Returns the directory of a run's checkpoints."""
    return run_dir / CHECKPOINTS_DIRECTORY


def checkpoint_step(checkpoint: Path) -> int:
    """The N of `step-N`."""
    return int(checkpoint.name.removeprefix("step-"))


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Finished checkpoints, oldest first; `find_damage` tells whether one is still intact."""
    # A user's copy, such as step-40-old, is not one of them.
    found = [
        p for p in checkpoint_directory(run_dir).glob("step-*") if re.fullmatch(r"step-\d+", p.name)
    ]
    return sorted((p for p in found if p.is_dir()), key=checkpoint_step)


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
    """The checkpoint marked as best; None if there is none."""
    link = checkpoint_directory(run_dir) / BEST_LINK
    return link.parent / link.readlink() if link.is_symlink() and link.is_dir() else None


def remove_checkpoint(checkpoint: Path) -> None:
    """Renames the checkpoint, then deletes it, so that a kill in between leaves nothing that looks
    like a checkpoint. Raises WriteFailed."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.removed")
    with writing(checkpoint):
        if doomed.exists():
            shutil.rmtree(doomed)
        checkpoint.rename(doomed)
    # On network storage a file that another process reads cannot be deleted yet; the next pruning
    # deletes it.
    shutil.rmtree(doomed, ignore_errors=True)


def prune(run_dir: Path, newest: Path, keep: int) -> None:
    """Deletes all but the best checkpoint and the newest `keep`, and unfinished directories.

    newest: the checkpoint just written. A later one was damaged and skipped when the run was
    resumed: it is not counted, and is replaced when the run reaches that step again.
    """
    best, last = best_checkpoint(run_dir), checkpoint_step(newest)
    so_far = [path for path in list_checkpoints(run_dir) if checkpoint_step(path) <= last]
    for old in so_far[:-keep]:
        if old != best:
            remove_checkpoint(old)
    for pattern in (unfinished_path(Path("step-*")).name, ".step-*.removed"):
        for left_over in newest.parent.glob(pattern):
            shutil.rmtree(left_over, ignore_errors=True)


def _fingerprint(file: Path) -> list[int | str]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16))
    return [file.stat().st_size, digest.hexdigest()]


def file_names(directory: Path) -> list[str]:
    """All files below the directory, as sorted paths relative to it."""
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())


def seal(unfinished: Path, names: list[str]) -> Manifest:
    """The manifest's entries for these files, after flushing them to the disk."""
    for name in names:
        flush(unfinished / name)
    return {name: _fingerprint(unfinished / name) for name in names}


def find_damage(checkpoint: Path, rank: int = 0, num_ranks: int = 1) -> str | None:
    """Returns what is wrong with a checkpoint's files, or None if they are what was written.

    rank: this one of `num_ranks`, each of which checks its share of the files.
    """
    if not (checkpoint / MANIFEST_FILE).is_file():
        return f"{MANIFEST_FILE} is missing"
    try:
        manifest = json.loads((checkpoint / MANIFEST_FILE).read_bytes())
        if not isinstance(manifest, dict) or STATE_FILE not in manifest:
            return f"{MANIFEST_FILE} does not list {STATE_FILE}"
        for name in sorted(manifest)[rank::num_ranks]:
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
            if _fingerprint(checkpoint / name) != manifest[name]:
                return f"{name} is not what was written"
    except ValueError:
        return f"{MANIFEST_FILE} is not JSON"
    except OSError as error:
        return f"unreadable: {error}"
    return None
