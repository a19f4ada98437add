"""The run directory: creates it, or finds the one to resume in."""

import datetime
import os
import shlex
import shutil
import socket
from pathlib import Path

from paint_engine.checkpoint.save import list_checkpoints
from paint_engine.config.command_line import check_same_run, read_toml
from paint_engine.config.schema import Config
from paint_engine.config.trust import trust_flags
from paint_engine.files import (
    CONFIG_FILE,
    DATA_FILE,
    LAUNCH_FILE,
    VERSIONS_FILE,
    WANDB_ID_FILE,
    unfinished_path,
    write_atomic,
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
    return restarted and mark.is_file() and mark.read_text() == _launch_mark()


def find_earlier(config: Config, name: str) -> Path | None:
    """Returns the directory of an earlier run that this command resumes without `--resume`: after a
    restart by torchrun, or with `run.auto_resume`. None if there is none.

    name: the preset's, with which the names of new directories begin.
    """
    if config.run.dir is None:
        found = filter(_is_ours, sorted(Path("runs").glob(f"{name}-*-{_launch_id()}")))
        return next(found, None)
    run_dir = Path(config.run.dir)
    resumes = _is_ours(run_dir) or (config.run.auto_resume and _is_run(run_dir))
    return run_dir if resumes else None


def recorded_date(run_dir: Path) -> str | None:
    """Returns the date that the run in the directory was started with (`prompts.date`), or None."""
    path = run_dir / CONFIG_FILE
    return read_toml(path).get("prompts.date") if path.is_file() else None


def choose_run_dir(
    config: Config, name: str, *, allow_changed_data: bool = False
) -> tuple[Path, bool]:
    """Returns the run's directory, created if it is new, and whether training resumes from a
    checkpoint in it. One rank calls it.

    Raises ValueError if the directory exists and is neither resumed nor replaced, or if the run in
    it was started with other settings; WriteFailed if nothing can be written to it.
    """
    earlier = find_earlier(config, name)
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    new = f"runs/{name}-{stamp}-{_launch_id()}" if config.run.dir is None else config.run.dir
    run_dir, resumes = earlier or Path(new), earlier is not None
    if not resumes:
        _make_run_dir(run_dir, config)
    elif (run_dir / CONFIG_FILE).is_file():
        check_same_run(run_dir, config, allow_data=allow_changed_data)
    if _UNDER_TORCHRUN in os.environ:
        write_atomic(run_dir / LAUNCH_FILE, _launch_mark())
    # A run that stopped before its first checkpoint starts again and keeps its base evaluation.
    return run_dir, resumes and bool(list_checkpoints(run_dir))


def _is_run(run_dir: Path) -> bool:
    return (run_dir / CONFIG_FILE).is_file() and (run_dir / VERSIONS_FILE).is_file()


def _is_empty(run_dir: Path) -> bool:
    """Whether no run is there. `config.toml` is the last file of a start: a start that a full disk
    ended may have left those before it."""
    before = {LAUNCH_FILE, VERSIONS_FILE, DATA_FILE, WANDB_ID_FILE}
    before |= {unfinished_path(run_dir / name).name for name in (*before, CONFIG_FILE)}
    return run_dir.is_dir() and {path.name for path in run_dir.iterdir()} <= before


def _make_run_dir(run_dir: Path, config: Config) -> None:
    replace = config.run.overwrite
    if run_dir.exists() and not _is_empty(run_dir):
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
                f"{resume_again(run_dir, config)}, "
                "choose another with --run.dir, or replace an earlier run with --run.overwrite true"
            )
        shutil.rmtree(run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"run directory {run_dir} cannot be made ({error}): choose another with --run.dir"
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
