"""Data that changes on disk between a run and its resume is refused, unless the user accepts it."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

Main = Callable[[Sequence[str]], int]


@pytest.fixture
def trained(
    command: list[str], run_main: Main, tmp_path: Path, write_rows: Callable[..., Path]
) -> Path:
    write_rows(tmp_path / "train.jsonl", 64)
    assert run_main([*command, "--train.num_steps", "1", "--eval.at_start", "false"]) == 0
    return tmp_path / "run"


def edit(file: Path, number: int) -> None:
    """Changes one number of a row's solution and answer."""
    lines = file.read_text().splitlines(keepends=True)
    row = json.loads(lines[number - 1])
    row["answer"] = row["answer"].rpartition("####")[0] + "#### 8"
    lines[number - 1] = json.dumps(row) + "\n"
    file.write_text("".join(lines))


def test_an_edited_file_is_refused_and_can_be_accepted(
    trained: Path, run_main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(tmp_path / "train.jsonl", 17)
    resume = ["--resume", str(trained), "--train.num_steps", "2"]
    for argv in (resume, [*resume, "--dry-run"]):
        capsys.readouterr()
        assert run_main(argv) == 2
        printed = capsys.readouterr().out
        assert "has 64 rows for its resume and had 64 for the run" in printed
        assert "number 17 (train.jsonl:17)" in printed and "--allow-changed-data" in printed
    assert run_main([*resume, "--allow-changed-data"]) == 0
    assert "note: resuming with changed data" in capsys.readouterr().out
    # The option is not recorded; the changed data is.
    assert run_main([*resume, "--train.num_steps", "3"]) == 0
    edit(tmp_path / "test.jsonl", 2)
    assert run_main([*resume, "--train.num_steps", "4"]) == 2
    assert "evaluation data" in capsys.readouterr().out


def test_an_unused_change_and_a_moved_file_are_no_change(
    trained: Path, run_main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "train.jsonl"
    # Another order of the columns, and a line end of another system.
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    (tmp_path / "moved").mkdir()
    moved = file.rename(tmp_path / "moved" / "train.jsonl")
    moved.write_text("".join(json.dumps(dict(reversed(row.items()))) + "\r\n" for row in rows))
    argv = ["--resume", str(trained), "--data.path", str(moved), "--train.num_steps", "2"]
    assert run_main(argv) == 0
    assert run_main([*argv, "--data.max_rows", "3"]) == 2
    printed = capsys.readouterr().out
    assert "--data.max_rows with --resume: got 3" in printed and "--allow-changed-data" in printed


def test_auto_resume_takes_the_option_and_a_new_run_does_not(
    trained: Path,
    command: list[str],
    run_main: Main,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    edit(tmp_path / "train.jsonl", 3)
    argv = [*command, "--eval.at_start", "false", "--run.auto_resume", "true"]
    assert run_main([*argv, "--train.num_steps", "2"]) == 2
    more = [*argv, "--train.num_steps", "2", "--data.max_rows", "60", "--allow-changed-data"]
    assert run_main(more) == 0
    assert "had 64 for the run" in capsys.readouterr().out
    new = [*command, "--run.dir", str(tmp_path / "new"), "--allow-changed-data"]
    assert run_main(new) == 2
    assert "--allow-changed-data: got it for a new run" in capsys.readouterr().out
