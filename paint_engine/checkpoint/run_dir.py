"""The run directory: finds it, locks it, and empties it for a new run."""

import datetime
import os
import shlex
import shutil
import socket
from contextlib import ExitStack
from pathlib import Path

from paint_engine.checkpoint.directory import list_checkpoints
from paint_engine.config.command_line import check_same_run, read_toml
from paint_engine.config.schema import Config
from paint_engine.config.trust import trust_flags
from paint_engine.files import (
    CONFIG_FILE,
    DATA_FILE,
    LAUNCH_FILE,
    VERSIONS_FILE,
    WANDB_ID_FILE,
    BadFile,
    DirectoryLock,
    check_links,
    finished_name,
    is_lock_file,
    read_bytes,
    reading,
    write_atomic,
    writing,
)

_UNDER_TORCHRUN = "TORCHELASTIC_RUN_ID"


def _launch_id() -> int:
    """The process that stays the same when torchrun starts its workers again; without torchrun,
    this one."""
    return os.getppid() if _UNDER_TORCHRUN in os.environ else os.getpid()


def _launch_mark() -> str:
    return f"{socket.gethostname()}:{_launch_id()}:{os.environ[_UNDER_TORCHRUN]}\n"


def _is_ours(run_dir: Path) -> bool:
    """Returns whether this launch made the directory before torchrun restarted the processes."""
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    mark = run_dir / LAUNCH_FILE
    return restarted and mark.is_file() and read_bytes(mark) == _launch_mark().encode()


def find_earlier(config: Config, name: str) -> Path | None:
    """Returns the directory of an earlier run that this command resumes without `--resume`: after a
    restart by torchrun, or with `run.auto_resume`. None if there is none.

    name: the preset's, with which the names of new directories begin.

    Raises BadFile if there are links in it, and ReadFailed if it cannot be read.
    """
    if config.run.dir is None:
        found = filter(_is_ours, sorted(Path("runs").glob(f"{name}-*-{_launch_id()}")))
        run_dir = next(found, None)
    else:
        run_dir = Path(config.run.dir)
        with reading(run_dir):
            resumes = _is_ours(run_dir) or (config.run.auto_resume and _is_run(run_dir))
        run_dir = run_dir if resumes else None
    if run_dir is not None:
        check_links(run_dir)
    return run_dir


def recorded_date(run_dir: Path) -> str | None:
    """Returns the date that the run in the directory was started with (`prompts.date`), or None."""
    path = run_dir / CONFIG_FILE
    return read_toml(path).get("prompts.date") if path.is_file() else None


def lock_run_dir(
    config: Config, name: str, *, resume: bool, allow_changed_data: bool = False
) -> DirectoryLock:
    """Returns the lock on the run's directory, which keeps every other run out of it. One rank
    calls it, before anything is read there and before a model is loaded.

    name: the preset's, with which the names of new directories begin.
    resume: the command has `--resume`; `config.run.dir` is the directory then.

    Raises ValueError if another run is in the directory, or if it exists and is neither resumed nor
    replaced; WriteFailed if nothing can be written to it.
    """
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    new = f"runs/{name}-{stamp}-{_launch_id()}" if config.run.dir is None else config.run.dir
    run_dir = find_earlier(config, name) or Path(new)
    lock = DirectoryLock(run_dir, f"run directory {run_dir}", "choose another with --run.dir")
    with ExitStack() as stack:
        stack.enter_context(lock)
        if resume:
            # Another run may have replaced the one whose settings the command line has read.
            if not (run_dir / CONFIG_FILE).is_file():
                raise ValueError(
                    f"--resume {run_dir}: {CONFIG_FILE} was removed after this command had read "
                    "it; needs the directory of an earlier run; see who replaces it"
                )
            check_same_run(run_dir, config, allow_data=allow_changed_data)
        elif find_earlier(config, name) is None:
            _check_free(run_dir, config)
        stack.pop_all()
    return lock


def prepare_run_dir(
    config: Config, name: str, run_dir: Path, *, allow_changed_data: bool = False
) -> bool:
    """Empties the locked directory for a new run, or returns whether training resumes from a
    checkpoint in it. One rank calls it, unless the command has `--resume`.

    Raises ValueError if the run in the directory was started with other settings, and WriteFailed
    if nothing can be written to it.
    """
    resumes = find_earlier(config, name) is not None
    if not resumes:
        _check_free(run_dir, config)
        _empty(run_dir)
    elif (run_dir / CONFIG_FILE).is_file():
        check_same_run(run_dir, config, allow_data=allow_changed_data)
    if _UNDER_TORCHRUN in os.environ:
        write_atomic(run_dir / LAUNCH_FILE, _launch_mark())
    # A run that stopped before its first checkpoint starts again and keeps its base evaluation.
    return resumes and bool(list_checkpoints(run_dir))


def _is_run(run_dir: Path) -> bool:
    return (run_dir / CONFIG_FILE).is_file() and (run_dir / VERSIONS_FILE).is_file()


def _is_empty(run_dir: Path) -> bool:
    """Whether no run is there. `config.toml` is the last file of a start: a start that a full disk
    ended may have left those before it."""
    before = {LAUNCH_FILE, VERSIONS_FILE, DATA_FILE, WANDB_ID_FILE}
    # A killed process may have left any of them unfinished.
    names = {path.name for path in run_dir.iterdir() if not is_lock_file(path)}
    return {name for name in names if finished_name(name) is None} <= before


def _check_free(run_dir: Path, config: Config) -> None:
    """Raises ValueError unless a new run may start in the directory."""
    replace = config.run.overwrite
    if _is_empty(run_dir):
        return
    # Only a directory that looks like a run is replaced: a mistyped path loses no files.
    if replace and not _is_run(run_dir):
        raise ValueError(
            f"run directory {run_dir} is no earlier run of PAINT, and is not deleted; choose "
            "another with --run.dir"
        )
    is_around = Path.cwd().is_relative_to(run_dir.resolve())
    if not replace or is_around:
        raise ValueError(
            f"run directory {run_dir} exists already; resume it with "
            f"{resume_again(run_dir, config)}, choose another with --run.dir, "
            "or replace an earlier run with --run.overwrite true"
        )


def _empty(run_dir: Path) -> None:
    """Deletes what is in the directory, but for the lock of this process. The files that make it a
    run's go last: after a kill in between, it can still be replaced."""
    last = (CONFIG_FILE, VERSIONS_FILE)
    with writing(run_dir):
        for path in sorted(run_dir.iterdir(), key=lambda path: path.name in last):
            if path.is_dir() and not path.is_symlink():
                _remove_directory(path)
            elif not is_lock_file(path):
                path.unlink()


def _remove_directory(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except RecursionError as error:
        raise BadFile(
            f"{path} holds directories in about a thousand others, and cannot be removed here; "
            f"needs what a run writes; remove it with: rm -r {shlex.quote(str(path))}"
        ) from error


def start_again(run_dir: Path, config: Config, *, overwrite: bool = False) -> str:
    """The flags that start a run again that has no checkpoint to resume from.

    overwrite: replace what is there; else what the evaluations have finished is kept.
    """
    path = shlex.quote(str(run_dir))
    flags = f"--config {path}/{CONFIG_FILE} --run.dir {path}"
    flags += (
        f" --run.overwrite {str(overwrite).lower()} --run.auto_resume {str(not overwrite).lower()}"
    )
    return flags + trust_flags(config)


def resume_again(run_dir: Path, config: Config) -> str:
    """The flags that resume a run."""
    return f"--resume {shlex.quote(str(run_dir))}{trust_flags(config)}"
