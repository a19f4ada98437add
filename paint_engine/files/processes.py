"""Whether the process lives that a file names, by its id, its machine and its start: the system
gives the id of a dead process to another one."""

import os
import socket
from functools import cache
from pathlib import Path


@cache
def machine() -> str:
    """Where a process id is this process's: the host, the kernel since its start and the namespace
    of process ids. Where the system does not tell the last two, the host alone."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def start_of(pid: int) -> str:
    """When a process of this machine started, as a number in the system's own unit since the start
    of the machine; "" where the system does not tell."""
    return _state_and_start(pid)[1]


def is_alive(pid: int, started: str) -> bool:
    """Whether the process of this machine lives that has this id and this start."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        # The second: a number that no process can have, in a name that another user may choose.
        return False
    except PermissionError:
        # Another user's process.
        pass
    state, start = _state_and_start(pid)
    # Z: it has ended, and its parent has not asked for its exit code.
    return state not in ("Z", "X") and (start == started or not start)


def _state_and_start(pid: int) -> tuple[str, str]:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "", ""
    # The name, in parentheses, may contain anything.
    fields = text.rpartition(")")[2].split()
    return fields[0], fields[19]
