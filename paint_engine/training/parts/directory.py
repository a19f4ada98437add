"""The directory of a run: found and locked, resumed from, and the files that a run starts with."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from paint_engine.checkpoint.load import load_checkpoint
from paint_engine.checkpoint.run_dir import lock_run_dir, prepare_run_dir, start_again
from paint_engine.config.command_line import CommandLine
from paint_engine.config.schema import Config
from paint_engine.config.toml import to_toml
from paint_engine.data import write_data_record
from paint_engine.distributed import World, gather_objects, together
from paint_engine.files import (
    CONFIG_FILE,
    FILE_FAILURES,
    STATE_FILE,
    DirectoryLock,
    checked,
    read_bytes,
    write_atomic,
    write_versions,
)
from paint_engine.model import Teacher
from paint_engine.monitor import wandb_id
from paint_engine.training.run import Run, SavedProgress


def lock_for_run(command: CommandLine, world: World) -> DirectoryLock | None:
    """Returns the main rank's lock on the run's directory; None on the others. A collective call.

    Raises ValueError on every rank if another run is in the directory.
    """
    name, resume, allow = (
        command.preset or "run",
        command.resume is not None,
        command.allow_changed_data,
    )

    def take() -> DirectoryLock | None:
        if not world.is_main:
            return None
        return lock_run_dir(command.config, name, resume=resume, allow_changed_data=allow)

    return together(take, (ValueError, *FILE_FAILURES))


def find_run_dir(
    command: CommandLine, world: World, lock: DirectoryLock | None
) -> tuple[Path, bool]:
    """Returns the run's directory, the same on every rank, and whether training resumes there.

    lock: the main rank's.

    Training resumes with `--resume`. If there is a checkpoint, it also resumes with
    `run.auto_resume` and after torchrun has restarted the processes.
    """

    def prepare() -> tuple[Path, bool] | None:
        if lock is None:
            return None
        # Loading the model takes minutes.
        lock.check()
        if command.resume is not None:
            return lock.directory, True
        name, allow = command.preset or "run", command.allow_changed_data
        run_dir = lock.directory
        return run_dir, prepare_run_dir(command.config, name, run_dir, allow_changed_data=allow)

    choice = gather_objects(together(prepare, (ValueError, *FILE_FAILURES)))[0]
    assert choice is not None
    return choice


def load_progress(
    config: Config,
    run_dir: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    teacher: Teacher,
    world: World,
    say: Callable[[str], object],
) -> SavedProgress:
    """Loads the newest intact checkpoint and returns its state."""
    replace_it = start_again(run_dir, config, overwrite=True)
    state = load_checkpoint(
        run_dir, model, optimizer, world=world, warn=say, teacher=teacher, replace_it=replace_it
    )
    num_steps = config.train.num_steps
    if state is None:
        raise ValueError(
            f"{run_dir} has no complete checkpoint under checkpoints/: the run stopped before its "
            f"first; start it again with {start_again(run_dir, config)}"
        )
    progress = checked(SavedProgress, state, f"{STATE_FILE} of step {state['step']}")
    if num_steps < progress.step:
        raise ValueError(
            f"train.num_steps is {num_steps}, but {run_dir} has already done {progress.step}: "
            "give at least as many with --train.num_steps"
        )
    return progress


def write_start(
    run: Run,
    data: dict[str, Any],
    commit: str | None,
    teacher_commits: Mapping[str, str],
    *,
    new: bool,
) -> None:
    """Writes what the run is started with. The configuration comes last: it makes the directory a
    run's. It is written after a resume too, so that the next resume uses this command's settings.
    """
    if run.lock is not None:
        run.lock.check()
    if new:
        write_versions(run.run_dir, run.name, run.world.size, commit, teacher_commits)
    write_data_record(run.run_dir, data)
    if run.config.run.wandb_project is not None:
        wandb_id(run.run_dir)
    path, settings = run.run_dir / CONFIG_FILE, to_toml(run.config)
    # A full disk must not keep a run from being resumed.
    if new or read_bytes(path) != settings.encode():
        write_atomic(path, settings)
