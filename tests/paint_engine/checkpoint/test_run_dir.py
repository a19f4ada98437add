"""Which directory a start trains in: new, its own after a restart, or one that it was told of."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from paint_engine.checkpoint.run_dir import lock_run_dir, prepare_run_dir
from paint_engine.config.command_line import load_config
from paint_engine.config.schema import Config
from paint_engine.config.toml import to_toml
from paint_engine.files import CONFIG_FILE, BadFile, recorded_name, write_versions


def config_of(run_dir: Path | None, *extra: str) -> Config:
    directory: Sequence[str] = () if run_dir is None else ("--run.dir", str(run_dir))
    return load_config([*directory, *extra]).config


def start(config: Config) -> tuple[Path, bool]:
    """What a run does with its directory up to its first step."""
    with lock_run_dir(config, "tiny", resume=False) as lock:
        run_dir = lock.directory
        resumes = prepare_run_dir(config, "tiny", run_dir)
        if not resumes:
            write_versions(run_dir, "tiny", 1)
        (run_dir / CONFIG_FILE).write_text(to_toml(config))
    return run_dir, resumes


def save_step(run_dir: Path, step: int = 3) -> None:
    (run_dir / "checkpoints" / f"step-{step}").mkdir(parents=True)


@pytest.fixture
def restart(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun's workers are started for the second time."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")


@pytest.fixture
def under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")


@pytest.mark.usefixtures("under_torchrun")
@pytest.mark.parametrize("named", [True, False], ids=["run.dir", "made up"])
def test_a_restart_resumes_in_the_directory_of_its_own_launch(
    named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = config_of(tmp_path / "run" if named else None, "--run.overwrite", "true")
    run_dir, resumes = start(config)
    assert not resumes
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    # Nothing is saved yet: the run begins again, and keeps what it has finished.
    finished = run_dir / "evaluations" / "step-0.json"
    finished.parent.mkdir()
    finished.write_text("{}")
    assert start(config) == (run_dir, False)
    assert finished.exists()
    save_step(run_dir)
    assert start(config) == (run_dir, True)
    # Another launch of the same command made another directory, or is refused this one.
    another = os.getppid() + 1
    monkeypatch.setattr(os, "getppid", lambda: another)
    again = config_of(tmp_path / "run") if named else config
    if named:
        with pytest.raises(ValueError, match="exists already"):
            start(again)
    else:
        assert start(again)[0] != run_dir


@pytest.mark.usefixtures("restart")
@pytest.mark.parametrize("saved", [True, False], ids=["with a checkpoint", "without"])
def test_a_restart_leaves_the_run_of_another_launch_alone(saved: bool, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    config = config_of(other)
    write_versions(other, "tiny", 1)
    (other / CONFIG_FILE).write_text(to_toml(config))
    (other / "metrics.jsonl").write_text("kept")
    if saved:
        save_step(other)
    with pytest.raises(ValueError, match="exists already"):
        start(config)
    assert (other / "metrics.jsonl").read_text() == "kept"


def test_auto_resume_starts_resumes_and_refuses_other_settings(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", "--run.auto_resume", "true")
    assert start(config) == (tmp_path / "run", False)
    assert start(config) == (tmp_path / "run", False)
    save_step(tmp_path / "run")
    assert start(config) == (tmp_path / "run", True)
    other = config_of(tmp_path / "run", "--run.auto_resume", "true", "--train.seed", "7")
    with pytest.raises(ValueError, match=r"--train\.seed"):
        start(other)
    assert recorded_name(tmp_path / "run") == "tiny"


def test_auto_resume_does_not_take_a_directory_that_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("kept")
    with pytest.raises(ValueError, match="exists already"):
        start(config_of(tmp_path / "run", "--run.auto_resume", "true"))
    assert (tmp_path / "run" / "thesis.tex").exists()


def test_a_run_with_directories_that_are_too_deep_is_not_replaced(tmp_path: Path) -> None:
    run_dir, _ = start(config_of(tmp_path / "run"))
    path = run_dir
    for _ in range(1500):
        path /= "d"
        path.mkdir()
    with pytest.raises(BadFile, match=r"remove it with: rm -r .*/run/d$"):
        start(config_of(run_dir, "--run.overwrite", "true"))
    subprocess.run(["rm", "-r", run_dir / "d"], check=True)
    start(config_of(run_dir, "--run.overwrite", "true"))
