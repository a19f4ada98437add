"""One writer at a time in a directory: who holds it, who is dead, and who takes it over."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from paint_engine.files import BadFile, DirectoryLock, LockLost, WriteFailed, lock

_HOLD = """
import os, sys, time
from pathlib import Path
from paint_engine.files import DirectoryLock
held = DirectoryLock(Path(sys.argv[1]), "it", "go")
"""
_REST = "print('in', flush=True); sys.stdin.read()"
# A child that ends at once, and one that lives.
_FORK = """
if not (child := os.fork()): sys.exit()
os.waitpid(child, 0)
held.check()
if not os.fork():
    print(os.getpid(), flush=True)
    time.sleep(60)
sys.stdin.read()
"""


def take(directory: Path) -> DirectoryLock:
    return DirectoryLock(directory, f"directory {directory}", "choose another")


def lock_files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if lock.is_lock_file(path))


@contextmanager
def process(directory: Path, then: str = _REST) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that holds the directory, and the line that it prints then."""
    command = [sys.executable, "-c", _HOLD + then, str(directory)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        yield other, other.stdout.readline()
        other.kill()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times so short that the tests take none."""
    monkeypatch.setattr(lock, "_PATIENCE_S", 0.0)
    monkeypatch.setattr(lock, "_POLL_S", 0.01)
    monkeypatch.setattr(lock, "_RENEW_S", 0.01)
    monkeypatch.setattr(lock, "_DEAD_AFTER_S", 0.4)


@pytest.fixture
def without_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)


def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on this process is on another machine, which the process ids mean nothing to."""
    monkeypatch.setattr(lock, "machine", lambda: "another machine")


def suspended_holder(directory: Path, monkeypatch: pytest.MonkeyPatch) -> DirectoryLock:
    with monkeypatch.context() as patch:
        patch.setattr(lock, "_RENEW_S", 1000.0)
        return take(directory)


def test_the_second_is_told_who_holds_the_directory_until_it_is_released(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "run"
    with process(directory) as (other, _):
        with pytest.raises(ValueError) as refused:
            take(directory)
        text = str(refused.value)
        assert text.startswith(f"directory {directory} is in use by process {other.pid} on ")
        assert f" since {time.strftime('%Y-%m-%d', time.gmtime())} " in text
        assert text.endswith(f" UTC (-c {directory}); wait for it, stop it, or choose another")
        assert other.communicate()[0] == ""
    # It has made the directories, has left nothing in them, and so removed them.
    assert not (tmp_path / "new").exists()
    with take(directory) as mine:
        mine.check()
        with pytest.raises(ValueError, match=f"process {os.getpid()} on "):
            take(directory)
        (directory / "metrics.jsonl").touch()
    assert [path.name for path in directory.iterdir()] == ["metrics.jsonl"]
    mine.release()


@pytest.mark.parametrize("flock", [True, False], ids=["flock", "no flock"])
def test_a_killed_holder_is_replaced_at_once(
    flock: bool, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_DEAD_AFTER_S", 1e6)
    with process(tmp_path) as (other, _):
        other.kill()
        # Not waited for yet: its process id is still there.
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        if not flock:
            request.getfixturevalue("without_flock")
        with take(tmp_path) as mine:
            mine.check()
            assert lock_files(tmp_path) == [".lock-2"]
    assert lock_files(tmp_path) == []


def test_a_process_that_has_got_the_id_of_a_dead_one_holds_nothing(
    tmp_path: Path, without_flock: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_DEAD_AFTER_S", 1e6)
    held = take(tmp_path)
    record = json.loads((tmp_path / ".lock-1").read_text())
    (tmp_path / ".lock-1").write_text(json.dumps(record | {"started": "1"}))
    with take(tmp_path), pytest.raises(LockLost):
        held.check()


def test_other_names_of_the_directory_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    link = tmp_path / "link"
    link.symlink_to("run")
    with take(Path("run")) as mine:
        monkeypatch.chdir("/")
        for name in (tmp_path / "run", link, link / ".." / "run"):
            with pytest.raises(ValueError, match="is in use by"):
                take(name)
        mine.check()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flock", [True, False], ids=["flock", "no flock"])
@pytest.mark.parametrize("here", [True, False], ids=["here", "another machine"])
def test_a_copy_of_a_directory_that_is_in_use_is_in_nobodys(
    here: bool,
    flock: bool,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not flock:
        request.getfixturevalue("without_flock")
    if here and flock:
        # Neither does it wait.
        monkeypatch.setattr(lock, "_DEAD_AFTER_S", 1e6)
    with take(tmp_path / "run"):
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        assert lock_files(tmp_path / "copy") == [".lock-1"]
        if not here:
            elsewhere(monkeypatch)
        with take(tmp_path / "copy") as mine:
            mine.check()


@pytest.mark.parametrize("flock", [True, False], ids=["flock there only", "no flock"])
def test_a_holder_on_another_machine_is_seen_by_its_renewals(
    flock: bool,
    tmp_path: Path,
    without_flock: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    with monkeypatch.context() as patch:
        if flock:
            patch.setattr(fcntl, "flock", lambda *_: None)
        held = suspended_holder(tmp_path, monkeypatch)
        renewals = threading.Event()
        renewing = threading.Thread(target=lock._renew, args=(held._file.fileno(), renewals))
        renewing.start()
        elsewhere(patch)
        try:
            with pytest.raises(ValueError, match=f"process {os.getpid()} on "):
                take(tmp_path)
        finally:
            renewals.set()
            renewing.join()
        held.check()
        # From now on it is dead, or suspended.
        with DirectoryLock(tmp_path, "it", "go", said.append) as mine:
            mine.check()
    assert len(said) == 1
    assert said[0].startswith(f"it has a lock of process {os.getpid()} on ")
    assert "waiting up to 0 s to see whether that process still renews it" in said[0]


def test_a_suspended_holder_finds_that_its_lock_was_taken(
    tmp_path: Path, without_flock: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = suspended_holder(tmp_path, monkeypatch)
    held.check()
    elsewhere(monkeypatch)
    with take(tmp_path) as mine:
        with pytest.raises(LockLost, match=f"was taken by process {os.getpid()} on .* suspended"):
            held.check()
        held.release()
        mine.check()
        assert lock_files(tmp_path) == [".lock-2"]


def test_a_flock_outlasts_a_suspension(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = suspended_holder(tmp_path, monkeypatch)
    elsewhere(monkeypatch)
    with pytest.raises(ValueError, match="is in use by"):
        take(tmp_path)
    held.check()


@pytest.mark.parametrize("replaced", [True, False])
def test_a_holder_finds_that_its_directory_is_gone(replaced: bool, tmp_path: Path) -> None:
    held = take(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    if replaced:
        mine = take(tmp_path / "run")
    with pytest.raises(LockLost, match=r"was removed, moved or replaced .* \.lock-1 is gone"):
        held.check()
    held.release()
    if replaced:
        mine.check()


@pytest.mark.parametrize("flock", [True, False], ids=["flock", "no flock"])
@pytest.mark.parametrize("killed", [True, False], ids=["after a kill", "new"])
def test_of_many_that_come_at_once_one_gets_it(
    killed: bool, flock: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not flock:
        request.getfixturevalue("without_flock")
    for attempt in range(20):
        directory = tmp_path / str(attempt)
        if killed:
            directory.mkdir()
            record = lock.Holder("here", 2**31 - 1, "1", lock.machine(), "then", "it", True)
            (directory / ".lock-7").write_text(json.dumps(vars(record)))
        gate, got = threading.Barrier(6), []

        def come(directory: Path = directory, gate=gate, got=got) -> None:
            gate.wait()
            try:
                got.append(take(directory))
            except ValueError as refused:
                assert "is in use by" in str(refused)

        threads = [threading.Thread(target=come) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (winner,) = got
        winner.check()
        assert lock_files(directory) == [".lock-8" if killed else ".lock-1"]
        winner.release()


@pytest.mark.parametrize("gap", ["before the next number is chosen", "after it was chosen"])
def test_a_holder_that_comes_while_another_one_looks_is_alone(
    gap: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{lock.LOCK_FILE}-3").touch()
    first = take(tmp_path)
    assert lock_files(tmp_path) == [f"{lock.LOCK_FILE}-4"]
    come = []

    def look(*arguments: object) -> bool | None:
        monkeypatch.undo()
        first.release()
        come.append(take(tmp_path))
        return True if gap == "after it was chosen" else None

    if gap == "after it was chosen":
        monkeypatch.setattr(lock, "_find_living", lambda *arguments: None)
        monkeypatch.setattr(os.path, "lexists", look)
    else:
        monkeypatch.setattr(lock, "_find_living", look)
    with pytest.raises(ValueError, match=r"is in use by process \d+ "):
        take(tmp_path)
    come[0].check()
    assert lock_files(tmp_path) == [f"{lock.LOCK_FILE}-1"]
    come[0].release()


def test_a_forked_child_keeps_nothing_and_removes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with process(tmp_path, _FORK) as (other, line):
        child = int(line)
        try:
            with pytest.raises(ValueError, match=f"process {other.pid} on "):
                take(tmp_path)
            os.kill(other.pid, signal.SIGKILL)
            other.wait()
            # The child lives. Not by the process id of its parent: by the flock alone.
            elsewhere(monkeypatch)
            with take(tmp_path) as mine:
                mine.check()
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_program_that_the_holder_has_started_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = (
        "import subprocess\n"
        "child = subprocess.Popen(['sleep', '60'], close_fds=False, stdin=subprocess.DEVNULL)\n"
        "print(child.pid, flush=True); sys.stdin.read()"
    )
    with process(tmp_path, starts) as (other, line):
        try:
            os.kill(other.pid, signal.SIGKILL)
            other.wait()
            elsewhere(monkeypatch)
            with take(tmp_path) as mine:
                mine.check()
                assert Path(f"/proc/{line.strip()}").exists()
        finally:
            os.kill(int(line), signal.SIGKILL)


def plant_link(path: Path) -> None:
    path.symlink_to(path.parent.parent / "precious")


@pytest.mark.parametrize(
    "plant",
    [
        plant_link,
        os.mkfifo,
        Path.mkdir,
        Path.touch,
        lambda path: path.write_bytes(b"\xff{"),
        lambda path: path.write_text("[" * 100_000),
        lambda path: path.write_text('{"host": "a"}'),
        lambda path: path.write_text("1" * 5000),
    ],
    ids=["link", "pipe", "directory", "empty", "bytes", "deep", "few keys", "number"],
)
def test_a_planted_lock_file_holds_nothing_and_is_not_followed(
    plant: Callable[[Path], object], tmp_path: Path
) -> None:
    precious = tmp_path / "precious"
    precious.write_text("x")
    (tmp_path / "run").mkdir()
    plant(tmp_path / "run" / ".lock-41")
    with take(tmp_path / "run") as mine:
        mine.check()
        assert ".lock-42" in lock_files(tmp_path / "run")
    assert precious.read_text() == "x"


def test_a_number_that_no_run_reaches_is_no_lock_or_is_refused(tmp_path: Path) -> None:
    (tmp_path / f".lock-{249 * '9'}").touch()
    with take(tmp_path):
        assert lock_files(tmp_path) == [".lock-1"]
    (tmp_path / ".lock-999999999").touch()
    with pytest.raises(BadFile, match=r"lock-999999999 has the last number .*; needs .*; see that"):
        take(tmp_path)


def test_a_link_in_the_place_of_the_next_lock_file_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It appears after the directory was listed."""
    original, planted = lock._lock_files, []

    def listed(directory: Path) -> dict[int, Path]:
        found = original(directory)
        if not planted:
            planted.append(plant_link(directory / ".lock-1"))
        return found

    monkeypatch.setattr(lock, "_lock_files", listed)
    with take(tmp_path / "run") as mine:
        mine.check()
    assert planted and not (tmp_path / "precious").exists()


@pytest.mark.parametrize(
    "change",
    [{"command": "\x1b[2J"}, {"host": "a\nb"}, {"pid": -1}, {"pid": True}, {"locked": "no"}],
)
def test_a_record_with_other_values_is_not_shown(change: dict[str, object], tmp_path: Path) -> None:
    with take(tmp_path):
        record = json.loads((tmp_path / ".lock-1").read_text())
        (tmp_path / ".lock-1").write_text(json.dumps(record | change))
        with pytest.raises(ValueError, match="is in use by another process; wait for it"):
            take(tmp_path)


def test_the_command_of_the_holder_is_shown_without_control_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/a/train.py", "--x", "\x1b[2J\n" + 500 * "y"])
    with take(tmp_path), pytest.raises(ValueError) as refused:
        take(tmp_path)
    text = str(refused.value)
    assert r"(train.py --x '\x1b[2J\nyyy" in text and text.isprintable() and len(text) < 500


@pytest.mark.parametrize("flock", [True, False], ids=["flock", "no flock"])
def test_a_full_disk_does_not_let_two_in(
    flock: bool,
    small_disk: Path,
    fill: Callable[[int | None], None],
    request: pytest.FixtureRequest,
) -> None:
    if not flock:
        request.getfixturevalue("without_flock")
    directory = small_disk / "run"
    directory.mkdir()
    fill(0)
    with take(directory) as mine:
        assert (directory / ".lock-1").stat().st_size == 0
        with pytest.raises(ValueError, match="is in use by another process"):
            take(directory)
        mine.check()


def test_a_directory_that_cannot_be_made_or_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for place in ("file", "file/run"):
        with pytest.raises(ValueError, match=r"cannot be made \(.*; choose another"):
            take(tmp_path / place)

    def open_file(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "open", open_file)
    with pytest.raises(WriteFailed, match=r"could not be written .*make it writable"):
        take(tmp_path)
