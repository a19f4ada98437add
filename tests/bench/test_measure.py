"""The commit that results record."""

import shutil
import subprocess
from pathlib import Path

import pytest

from bench import measure

NO_GIT = shutil.which("git") is None


def git(directory: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=tester", "-c", "user.email=tester@example.org")
    command = ["git", "-C", str(directory), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a commit of code, then one of a result."""
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    git(tmp_path, "init", "--quiet")
    for name in ("code.py", "results/runs.jsonl"):
        (tmp_path / name).write_text("one")
        git(tmp_path, "add", name)
        git(tmp_path, "commit", "--quiet", "--message", name)
    return tmp_path


@pytest.mark.skipif(NO_GIT, reason="needs git")
def test_a_folder_that_does_not_count_changes_neither_commit_nor_mark(checkout: Path) -> None:
    head, code = git(checkout, "log", "--format=%H").split()
    assert measure.commit() == head and measure.commit(but=("results",)) == code
    (checkout / "results" / "runs.jsonl").write_text("two")
    assert measure.commit() == f"{head}+changes"
    assert measure.commit(but=("results",)) == code and not measure.changes(but=("results",))
    (checkout / "code.py").write_text("two")
    assert measure.commit(but=("results",)) == f"{code}+changes"
    assert measure.changes(but=("results",)) == "M code.py"


def test_without_a_checkout_the_environment_names_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    monkeypatch.setenv("BENCH_COMMIT", "abc")
    assert measure.commit() == measure.commit(but=("results",)) == "abc"
    assert measure.changes() == ""
