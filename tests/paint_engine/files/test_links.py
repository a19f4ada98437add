"""What lies in a run directory is opened as a regular file, and never through a link."""

import errno
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from paint_engine.files import (
    BadFile,
    FileMissing,
    ReadFailed,
    append_lines,
    check_links,
    open_jsonl,
    read_bytes,
    read_jsonl,
    remove_left_overs,
    remove_tree,
    truncate_jsonl,
    unfinished_path,
    write_atomic,
    write_link,
)

PLANT: dict[str, Callable[[Path, Path], None]] = {
    "a symbolic link": lambda path, victim: path.symlink_to(victim),
    "a named pipe": lambda path, victim: os.mkfifo(path),
    "a device": lambda path, victim: os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5)),
}


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    file = tmp_path / "victim"
    file.write_text('{"step": 1}\n{"step": 2}\n{"st')
    return file


def plant(kind: str, path: Path, victim: Path) -> None:
    if kind == "a device" and os.geteuid() != 0:
        pytest.skip("only root makes devices")
    PLANT[kind](path, victim)


@pytest.mark.parametrize("kind", PLANT)
def test_neither_read_nor_appended_to_nor_cut(kind: str, tmp_path: Path, victim: Path) -> None:
    path, before = tmp_path / "metrics.jsonl", victim.read_bytes()
    plant(kind, path, victim)
    for use in (read_bytes, read_jsonl, open_jsonl, lambda p: truncate_jsonl(p, 1)):
        with pytest.raises(BadFile, match=rf"metrics\.jsonl is {kind}.*needs a regular file"):
            use(path)
    assert victim.read_bytes() == before


def test_a_link_that_leads_nowhere_makes_no_file(tmp_path: Path) -> None:
    path, target = tmp_path / "metrics.jsonl", tmp_path / "new"
    path.symlink_to(target)
    with pytest.raises(BadFile, match="symbolic link"):
        open_jsonl(path)
    write_atomic(path, "x")
    assert not target.exists() and not path.is_symlink() and path.read_text() == "x"


def test_a_hard_link_is_replaced_but_not_appended_to(tmp_path: Path, victim: Path) -> None:
    path, before = tmp_path / "metrics.jsonl", victim.read_bytes()
    path.hardlink_to(victim)
    with pytest.raises(BadFile, match=r"another name too.*needs a file of its own; .*cp .*mv"):
        open_jsonl(path)
    write_atomic(path, "mine")
    assert (victim.read_bytes(), path.read_text()) == (before, "mine")


def test_the_name_before_the_rename_cannot_be_waited_for(tmp_path: Path, victim: Path) -> None:
    names, before = {unfinished_path(tmp_path / "x").name for _ in range(100)}, victim.read_bytes()
    assert len(names) == 100
    (tmp_path / ".x.unfinished").symlink_to(victim)
    write_atomic(tmp_path / "x", "content")
    (tmp_path / ".best.unfinished").symlink_to(victim)
    write_link(tmp_path / "best", "step-1")
    assert victim.read_bytes() == before


def test_left_overs_are_removed_without_what_they_link_to(tmp_path: Path) -> None:
    outside, work = tmp_path / "outside", tmp_path / "work"
    for directory in (outside, work):
        directory.mkdir()
    (outside / "file").write_text("kept")
    unfinished_path(work / "step-1").symlink_to(outside)
    left = unfinished_path(work / "step-2")
    left.mkdir()
    (left / "trainer").symlink_to(outside)
    unfinished_path(work / "summary.json").write_text("x")
    (work / ".mine.unfinished").write_text("not of ours")
    remove_left_overs(work, "summary.json")
    assert len(list(work.iterdir())) == 3
    remove_left_overs(work)
    assert [path.name for path in work.iterdir()] == [".mine.unfinished"]
    assert (outside / "file").read_text() == "kept"


def test_the_own_link_and_a_users_files_are_left_alone(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints/step-3").mkdir(parents=True)
    (run_dir / "wandb").mkdir()
    (run_dir / "wandb/latest-run").symlink_to("run-1")
    (run_dir / "thesis").symlink_to(tmp_path)
    write_link(run_dir / "checkpoints/best", "step-3")
    (tmp_path / "link").symlink_to(run_dir)
    for directory in (run_dir, tmp_path / "link", run_dir / "checkpoints/step-3"):
        check_links(directory)
    for target in ("../../home", "step-3/trainer", "/step-3", "."):
        (run_dir / "checkpoints/best").unlink()
        (run_dir / "checkpoints/best").symlink_to(target)
        with pytest.raises(BadFile, match="needs the name of a checkpoint beside it"):
            check_links(run_dir)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_are_the_umasks(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write_atomic(tmp_path / "file", "x")
        with open_jsonl(tmp_path / "lines.jsonl"):
            pass
    finally:
        os.umask(before)
    for name in ("file", "lines.jsonl"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.write
    monkeypatch.setattr(os, "write", lambda file, data: original(file, bytes(data[:3])))
    write_atomic(tmp_path / "file", "twelve bytes")
    assert (tmp_path / "file").read_text() == "twelve bytes"


@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE, errno.EIO])
def test_what_the_system_refuses_is_not_absent(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, original = tmp_path / "versions.json", os.open
    path.write_text("{}")
    with pytest.raises(FileMissing, match=r"other could not be read.*restore it"):
        read_bytes(tmp_path / "other")

    def refuse(name: str | Path, *arguments: int) -> int:
        if Path(name) == path:
            raise OSError(number, os.strerror(number))
        return original(name, *arguments)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ReadFailed, match=os.strerror(number)) as refused:
        read_bytes(path)
    assert not isinstance(refused.value, FileMissing)


def test_lines_are_appended_where_they_were(tmp_path: Path) -> None:
    with open_jsonl(tmp_path / "lines.jsonl") as file:
        append_lines(file, b"{}\n")
    assert read_jsonl(tmp_path / "lines.jsonl") == [{}]


@pytest.fixture
def nest(tmp_path: Path) -> Iterator[Callable[[str, int], Path]]:
    """Makes so many directories in each other, and removes them as Python would not."""
    made = []

    def make(name: str, depth: int) -> Path:
        made.append(tmp_path / name)
        os.makedirs(path := tmp_path / name)
        for _ in range(depth):
            path /= "d"
            path.mkdir()
        return tmp_path / name

    yield make
    subprocess.run(["rm", "-rf", *made], check=True)


def test_directories_in_too_many_others_are_refused(
    tmp_path: Path, nest: Callable[[str, int], Path]
) -> None:
    nest("tensorboard", 9)
    check_links(tmp_path)
    nest("evaluations", 900)
    with pytest.raises(BadFile, match=r"in more than 10 others below .*; move .*/evaluations else"):
        check_links(tmp_path)


def test_a_left_over_that_is_too_deep_to_remove_stays(
    tmp_path: Path, nest: Callable[[str, int], Path]
) -> None:
    left = nest(".step-1.0123456789abcdef.unfinished", 1500)
    remove_tree(left)
    assert left.is_dir()
