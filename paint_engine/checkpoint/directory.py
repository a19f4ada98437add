"""The directories `checkpoints/step-N` of a run: which there are, which is the best, whether one is
whole, and which may go.

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
)

# Path below the checkpoint to [size in bytes, BLAKE2b checksum].
Manifest = dict[str, list[int | str]]


def checkpoint_directory(run_dir: Path) -> Path:
    """Where a run's checkpoints are."""
    return run_dir / CHECKPOINTS_DIRECTORY


def checkpoint_step(checkpoint: Path) -> int:
    """The N of `step-N`."""
    return int(checkpoint.name.removeprefix("step-"))


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Finished checkpoints, oldest first; whether they are still intact, only their files tell."""
    # A copy that someone named step-40-old is theirs.
    found = [
        p for p in checkpoint_directory(run_dir).glob("step-*") if re.fullmatch(r"step-\d+", p.name)
    ]
    return sorted((p for p in found if p.is_dir()), key=checkpoint_step)


def split_place(text: str) -> tuple[Path, str | None]:
    """A directory, and what is chosen in it: "runs/a:best" is (runs/a, "best"), "runs/a" without a
    choice (runs/a, None). A directory with a colon in its name is one."""
    path = Path(text)
    if path.is_dir() or ":" not in text:
        return path, None
    place, _, which = text.rpartition(":")
    return Path(place), which


def mark_best(run_dir: Path, step: int) -> None:
    """Points `checkpoints/best` at `step-N`, which is then kept beside the newest ones."""
    directory = checkpoint_directory(run_dir)
    assert (directory / f"step-{step}").is_dir(), f"step-{step} is not saved"
    write_link(directory / BEST_LINK, f"step-{step}")


def best_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint marked as best; None where there is none."""
    link = checkpoint_directory(run_dir) / BEST_LINK
    return link.parent / link.readlink() if link.is_symlink() and link.is_dir() else None


def remove_checkpoint(checkpoint: Path) -> None:
    """Under another name first: a kill half way leaves nothing that looks like a checkpoint."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.removed")
    if doomed.exists():
        shutil.rmtree(doomed)
    checkpoint.rename(doomed)
    # On network storage a file that someone still reads cannot go; the next pruning takes it.
    shutil.rmtree(doomed, ignore_errors=True)


def prune(run_dir: Path, newest: Path, keep: int) -> None:
    """Leaves the best checkpoint and the newest `keep`.

    A checkpoint later than the one just written was damaged and passed over when the run was
    resumed: it counts for nothing, and goes when the run writes that step again.
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
    """All files below, as paths from there, in order."""
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())


def seal(unfinished: Path, names: list[str]) -> Manifest:
    """The manifest's entries for these files, which are on the disk when this returns."""
    for name in names:
        flush(unfinished / name)
    return {name: _fingerprint(unfinished / name) for name in names}


def find_damage(checkpoint: Path, rank: int = 0, num_ranks: int = 1) -> str | None:
    """What is wrong with a checkpoint's files; None where they are what was written.

    rank: of `num_ranks` that read a part of the files each.
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
