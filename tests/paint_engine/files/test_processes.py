"""Which process lives: the one that a file names, and none that has got its id since."""

import os
import subprocess
import sys

from paint_engine.files.processes import is_alive, start_of


def test_a_process_lives_until_it_has_ended() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        started = start_of(other.pid)
        assert started.isdecimal() and is_alive(other.pid, started)
        other.kill()
        # Not waited for yet: its id is still there.
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        assert not is_alive(other.pid, started)
    assert not is_alive(other.pid, started) and start_of(other.pid) == ""


def test_a_process_that_has_got_the_id_of_a_dead_one_is_another() -> None:
    assert is_alive(os.getpid(), start_of(os.getpid()))
    assert not is_alive(os.getpid(), "4711")


def test_an_id_that_no_process_can_have_is_of_none() -> None:
    assert not is_alive(10**20, "4711")


def test_another_users_process_lives() -> None:
    assert is_alive(1, start_of(1))
