"""One writer at a time in a directory, on one machine or on several that share a file system.

While a directory is in use it holds a file `.lock-N`, which says by whom. Nobody changes or removes
the file of a living holder. Whoever finds that the holder is dead creates the next number, which
the system grants to one process alone, and the highest number holds the directory.

Whether a holder lives, in this order:

1. On the same machine, in the same process namespace: its process tells.
2. It holds a `flock` on its file, which ends with the process.
3. It sets the file's time every few seconds. Who waits sees the time change, or sees it unchanged
   for so long that the holder is dead. No two clocks are compared. File systems have this alone if
   they have no `flock`, or one that does not reach other machines (some mounts of NFS and Lustre).

`flock` and not `lockf`: a lock of `lockf` ends when its process closes any descriptor of the file,
and does not keep out the same process. A lock of `flock` is inherited by forked children instead,
which therefore close the file.
"""

import errno
import fcntl
import json
import os
import random
import re
import shlex
import socket
import stat
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any, Self

from paint_engine.files.failures import BadFile, LockLost, writing
from paint_engine.files.names import LOCK_FILE
from paint_engine.files.printable import one_line
from paint_engine.files.processes import is_alive, machine, start_of

# Interval at which a holder sets its file's time, and how long it may fail to do so. Network file
# systems keep a file's attributes in a cache for some seconds.
_RENEW_S = 5.0
_DEAD_AFTER_S = 25.0
_POLL_S = 0.1
_LOOKS_IN_SILENCE = 10
# A killed process with much memory takes a while to end.
_PATIENCE_S = 3.0
# Whoever looks at a lock file holds its flock for a moment.
_FLOCK_ATTEMPTS = 50

# A number goes up by one where a holder has died. A file with more digits is no lock.
_MAX_NUMBER = 10**9 - 1
_NAME = re.compile(re.escape(LOCK_FILE) + r"-([1-9][0-9]{0,8})")
_MAX_RECORD_BYTES = 4096
_MAX_COMMAND_CHARS = 200
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True)
class Holder:
    """The process that a lock file names.

    Holder("node7", 4711, "812345", "node7 5e1c... pid:[4026531836]", "2026-11-29 12:00:03",
           "train.py --preset tiny", locked=True)

    started: as `start_of` tells.
    place: where the process id is this process's, as `machine` tells.
    since: UTC.
    locked: whether it holds a flock on the file.
    """

    host: str
    pid: int
    started: str
    place: str
    since: str
    command: str
    locked: bool

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since} UTC ({self.command})"


@dataclass(frozen=True)
class _Observation:
    """What a lock file shows at one moment.

    holder: None if the file does not tell, as in the moment after its creation or on a full disk.
    flocked: whether a process holds a flock on it; None if the file system has none.
    time_ns: the file's time, by the clock of whoever keeps the file.
    """

    holder: Holder | None
    flocked: bool | None
    time_ns: int

    def is_alive(self) -> bool | None:
        """Whether the holder lives; None if only time can tell."""
        neighbour = self.holder if self.holder and self.holder.place == machine() else None
        if neighbour and not is_alive(neighbour.pid, neighbour.started):
            return False
        if self.flocked:
            return True
        # The holder's own file is flocked: this is a copy of it.
        is_copy = neighbour and neighbour.locked and self.flocked is False
        return False if is_copy else None

    def renews(self, before: "_Observation") -> bool:
        """Whether the holder of an earlier observation has set the file's time since."""
        return self.holder == before.holder and self.time_ns != before.time_ns


class DirectoryLock:
    """Keeps other writers out of a directory, which is made if needed, until `release`. A dead
    holder's place is taken.

    with DirectoryLock(Path("runs/a"), "run directory runs/a", "choose another with --run.dir"):
        ...

    name, remedy: of the messages.
    say: called with a line if the holder is on another machine and it takes time to see whether it
        lives.

    It ends with the object or the process too. A directory that it has made and that is still empty
    goes with it.

    Raises ValueError if another writer lives or the directory cannot be made, WriteFailed if no
    file can be created in it.
    """

    def __init__(
        self, directory: Path, name: str, remedy: str, say: Callable[[str], object] = print
    ) -> None:
        self.directory = directory
        self._name = name
        # The directory of the process may change until the release.
        path = directory.absolute()
        made = [p for p in (path, *path.parents) if not p.exists()]
        with writing(directory):
            try:
                got = _acquire(path, lambda holder: say(_waiting(name, holder)))
            except OSError as error:
                if path.is_dir():
                    raise
                raise ValueError(f"{name} cannot be made ({error}); {remedy}") from error
        if isinstance(got, _Observation):
            raise ValueError(
                f"{name} is in use by {got.holder or 'another process'}; wait for it, stop it, or "
                f"{remedy}"
            )
        self._file = got
        over = threading.Event()
        renewing = threading.Thread(target=_renew, args=(got.fileno(), over), daemon=True)
        renewing.start()
        self._release = weakref.finalize(self, _release, os.getpid(), got, made, over, renewing)
        _held.add(self)

    def check(self) -> None:
        """Call it before a write. Raises LockLost if another process has taken the directory, or
        if the directory is no longer at its path, and WriteFailed if that cannot be told."""
        path = Path(os.fsdecode(self._file.name))
        with writing(self.directory):
            files = _lock_files(path.parent)
            newest = max(files, default=0)
            if newest == _number(path) and _is_at(path, self._file):
                return
        if newest <= _number(path):
            raise LockLost(
                f"{self._name} was removed, moved or replaced while this process used it: its lock "
                f"file {path.name} is gone; this process writes nothing more there"
            )
        observation = _observe(files[newest])
        holder = observation.holder if observation else None
        raise LockLost(
            f"{self._name} was taken by {holder or 'another process'}; this "
            f"process had not renewed its lock for {_DEAD_AFTER_S:.0f} s, because it was suspended "
            "or the file system did not answer; it writes nothing more there"
        )

    def release(self) -> None:
        """Lets the next writer in. Only the first call has an effect."""
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


_held: weakref.WeakSet[DirectoryLock] = weakref.WeakSet()


def _leave_to_parent() -> None:
    for lock in list(_held):
        lock._release.detach()
        lock._file.close()


os.register_at_fork(after_in_child=_leave_to_parent)


def _waiting(name: str, holder: Holder | None) -> str:
    return (
        f"{name} has a lock of {holder or 'an unknown process'}: waiting up to "
        f"{_DEAD_AFTER_S:.0f} s to see whether that process still renews it"
    )


# ---- taking the lock -----------------------------------------------------------------------------


def _acquire(directory: Path, on_wait: Callable[[Holder | None], object]) -> FileIO | _Observation:
    """This process's lock file, or that of another one, which lives."""
    patient_until = time.monotonic() + _PATIENCE_S
    while True:
        # Again each time: a start that failed may have removed what it had made.
        directory.mkdir(parents=True, exist_ok=True)
        files = _lock_files(directory)
        last = max(files, default=0)
        if last == _MAX_NUMBER:
            raise BadFile(
                f"{files[last]} has the last number that a lock may have, which no run reaches; "
                "needs a lower one; see that no run is in the directory, then remove that file"
            )
        if last and (observation := _find_living(files[last], on_wait)) is not None:
            if time.monotonic() > patient_until:
                return observation
            time.sleep(_POLL_S)
            continue
        if last and not os.path.lexists(files[last]):
            # Released, and the next holder may have begun with another number.
            time.sleep(_POLL_S)
            continue
        path = directory / f"{LOCK_FILE}-{last + 1}"
        try:
            # Fails if there is a file or a link of this name, and follows none.
            file = path.open("xb", buffering=0)
        except (FileExistsError, FileNotFoundError):
            # Another process came first, and NFS may not list its file yet; or the directory went.
            time.sleep(_POLL_S)
            continue
        _sign(file)
        # This process may have waited here while others have come and gone, and one has come whose
        # number may be lower. Of two processes that create files, the later one to do so sees both.
        if _lock_files(directory).keys() - files.keys() == {last + 1}:
            for number in files:
                with suppress(OSError):
                    files[number].unlink()
            return file
        path.unlink(missing_ok=True)
        file.close()
        # Both of two processes may have retreated.
        time.sleep(random.uniform(0.0, _POLL_S))


def _sign(file: FileIO) -> None:
    """Writes who holds the lock, after the flock: a record that says so is flocked or a copy."""
    command = one_line(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]))
    holder = Holder(
        host=socket.gethostname(),
        pid=os.getpid(),
        started=start_of(os.getpid()),
        place=machine(),
        since=f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}",
        command=command[:_MAX_COMMAND_CHARS],
        locked=_flock(file),
    )
    # On a full disk the lock holds all the same.
    with suppress(OSError):
        file.write(json.dumps(asdict(holder)).encode())
    _touch(file.fileno())


def _flock(file: FileIO) -> bool:
    for _ in range(_FLOCK_ATTEMPTS):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.01)
        except OSError:
            return False
        else:
            return True
    return False


def _touch(descriptor: int) -> None:
    # NFS also sends what was written to the file, before its time.
    with suppress(OSError):
        os.utime(descriptor)


def _renew(descriptor: int, over: threading.Event) -> None:
    while not over.wait(_RENEW_S):
        _touch(descriptor)


def _release(
    owner: int,
    file: FileIO,
    made: list[Path],
    over: threading.Event,
    renewing: threading.Thread,
) -> None:
    if os.getpid() != owner:
        return
    over.set()
    # The garbage collector may call this in that thread.
    if threading.current_thread() is not renewing:
        renewing.join()
    path = Path(os.fsdecode(file.name))
    with suppress(OSError):
        # Before the file is closed: nobody can have taken the lock, and the name may have become
        # that of another run's file.
        if _is_at(path, file):
            path.unlink()
    file.close()
    with suppress(OSError):
        for directory in made:
            directory.rmdir()


# ---- looking at lock files -----------------------------------------------------------------------


def _number(path: Path) -> int:
    found = _NAME.fullmatch(path.name)
    return int(found[1]) if found else 0


def is_lock_file(path: Path) -> bool:
    """Whether the path has the name of a lock file."""
    return _number(path) > 0


def _lock_files(directory: Path) -> dict[int, Path]:
    """The lock files by number; none where the directory is gone."""
    try:
        return {_number(path): path for path in directory.iterdir() if is_lock_file(path)}
    except FileNotFoundError:
        return {}


def _is_at(path: Path, file: FileIO) -> bool:
    """Whether the open file is the one at the path. Opened and not only listed, since NFS asks the
    server then."""
    try:
        descriptor = os.open(path, _READ)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE, errno.ELOOP, errno.ENOTDIR):
            return False
        raise
    try:
        return os.path.samestat(os.fstat(descriptor), os.fstat(file.fileno()))
    finally:
        os.close(descriptor)


def _find_living(path: Path, on_wait: Callable[[Holder | None], object]) -> _Observation | None:
    """What shows that the file's holder lives; None if it does not, or if the file is gone."""
    before = None
    # Looks are counted, not seconds: both processes may have been suspended together.
    for num_looks in range(round(_DEAD_AFTER_S / _POLL_S)):
        observation = _observe(path)
        if observation is None or (alive := observation.is_alive()) is False:
            return None
        if alive or (before is not None and observation.renews(before)):
            return observation
        before = observation
        if num_looks == _LOOKS_IN_SILENCE:
            on_wait(observation.holder)
        time.sleep(_POLL_S)
    return None


def _observe(path: Path) -> _Observation | None:
    """Returns None for what is no regular file, or is gone."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    try:
        descriptor = os.open(path, _READ)
    except FileNotFoundError:
        return None
    except OSError:
        # Another user's, which this one may not read.
        return _Observation(None, None, status.st_mtime_ns)
    with open(descriptor, "rb") as file:
        holder = _parse(file.read(_MAX_RECORD_BYTES))
        return _Observation(holder, _is_flocked(file.fileno()), os.fstat(descriptor).st_mtime_ns)


def _is_flocked(descriptor: int) -> bool | None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


def _parse(record: bytes) -> Holder | None:
    """The holder, with texts that can be printed; None for what this module has not written."""
    try:
        fields: dict[str, Any] = json.loads(record)
        holder = Holder(**fields)
    except (ValueError, TypeError, RecursionError):
        return None
    texts = (holder.host, holder.started, holder.place, holder.since, holder.command)
    if not all(isinstance(text, str) and text == one_line(text) for text in texts):
        return None
    is_pid = type(holder.pid) is int and 0 < holder.pid < 2**31
    return holder if is_pid and type(holder.locked) is bool else None
