"""Starts the soaked run in a process of its own, and ends it with all that it has started."""

import json
import os
import random
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil

from bench.measure import ROOT
from paint_engine.files import METRICS_FILE

RUN = Path("run")
"""the run directory, below the directory that the process works in"""
LOG = "log.txt"
REWARD = ("--reward.function", "bench.soak.reward:even_length")
URL = "rollout.url"
LIMIT_S = 1800.0
"""of one process, which is far above what 1,000 steps take: only a hang is to be ended"""
ORPHAN_LIMIT_S = 60.0
"""until what a killed process has started must have ended by itself"""
_MARK = "PAINT_SOAK_MARK"
_PROBLEMS = "problems.jsonl"
_NUM_PROBLEMS, _MAX_NEW_TOKENS = 64, 12
_SHARED_MEMORY = Path("/dev/shm")


def write_problems(directory: Path) -> None:
    """Writes the problems of the runs that work in directories below this one. The bundled ones
    are thousands, which every start would read."""
    rng = random.Random(0)
    rows = []
    for _ in range(_NUM_PROBLEMS):
        have, more = rng.randint(2, 60), rng.randint(2, 60)
        problem = f"Ana has {have} stamps. Ana buys {more} stamps. How many stamps has Ana?"
        solution = (
            f"So Ana has ${have} + {more} = {have + more}$.\nThat is \\boxed{{{have + more}}}."
        )
        rows.append({"problem": problem, "solution": solution, "answer": str(have + more)})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / _PROBLEMS).write_text(text)


def variants(url: str) -> dict[str, dict[str, str]]:
    """Returns the settings of the runs that are soaked, by what is special about them.

    url: of a server for the rollouts. Without one they cannot be sampled ahead.
    """
    return {
        "built-in sampler": {},
        "server, rollouts ahead": {"rollout.engine": "auto", URL: url, "rollout.ahead": "1"},
        "running-mean teacher": {"teacher.weights": "ema"},
    }


def resume_arguments(changed: Mapping[str, str]) -> list[str]:
    """Returns the arguments that resume a run with these settings by its directory's name. What a
    run directory may not decide is given again."""
    url = ["--" + URL, changed[URL]] if URL in changed else []
    return ["--resume", str(RUN), *REWARD, *url]


def arguments(num_steps: int, changed: Mapping[str, str]) -> list[str]:
    """Returns the arguments of a soaked run, which is resumed where there is one already.

    changed: settings by key, in place of those below.
    """
    problems = str(Path("..") / _PROBLEMS)
    settings = {
        "data.path": problems,
        "eval.path": problems,
        # Each run evaluates by itself, also under kills.
        "eval.base_cache": "none",
        "lora.rank": "8",
        "lora.alpha": "16",
        "optim.schedule": "cosine",
        "train.num_steps": str(num_steps),
        "train.batch_size": "2",
        "rollout.max_new_tokens": str(_MAX_NEW_TOKENS),
        "eval.max_new_tokens": str(_MAX_NEW_TOKENS),
        "eval.num_problems": "4",
        "eval.num_samples": "2",
        "eval.max_sequences": "4",
        "run.dir": str(RUN),
        "run.auto_resume": "true",
        **changed,
    }
    return [*REWARD, *(part for key, value in settings.items() for part in (f"--{key}", value))]


class Launch:
    """One process of `paint_engine.train`, whose output is appended to a log.

    with Launch(directory, arguments(40, {})) as launch:
        launch.finish()

    directory: the process works here; it is made.
    log: the log's name there.
    limit_s: a process that takes longer than this hangs, and is ended.

    Whatever still runs at the end of the `with` is killed. What the process starts is found by a
    mark in its environment, also when the process has ended.
    """

    def __init__(
        self,
        directory: Path,
        command_line: Sequence[str],
        log: str = LOG,
        *,
        limit_s: float = LIMIT_S,
    ) -> None:
        directory.mkdir(exist_ok=True)
        self.limit_s = limit_s
        self.directory = directory
        self.run_dir = directory / RUN
        self.mark = secrets.token_hex(8)
        self.started = time.monotonic()
        self.log = directory / log
        self._log_begins = self.log.stat().st_size if self.log.exists() else 0
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        own = {_MARK: self.mark, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
        # The measuring process has a core of two to itself, and waiting threads use none.
        own |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "paint_engine.train", *command_line],
                cwd=directory,
                env={**os.environ, **own},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill_all()

    def printed(self) -> str:
        """Returns what this process has printed so far."""
        return self.log.read_bytes()[self._log_begins :].decode(errors="replace")

    def is_running(self) -> bool:
        """Returns whether the process has not ended yet. Raises RuntimeError where it has taken
        longer than `limit_s`, and kills it."""
        if self.process.poll() is not None:
            return False
        if time.monotonic() - self.started > self.limit_s:
            self.kill_all()
            # The log's directory goes with the soak.
            raise RuntimeError(f"a run took more than {self.limit_s:.0f} s: {self._last_words()}")
        return True

    def wait(self) -> int:
        """Returns the exit code. Raises RuntimeError as `is_running` does."""
        while self.is_running():
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(self.started + self.limit_s - time.monotonic())
        return self.process.returncode

    def _last_words(self) -> str:
        return self.printed()[-2000:]

    def finish(self) -> float:
        """Waits for the end; returns the seconds since the start. Raises RuntimeError unless the
        run ends well."""
        code = self.wait()
        if code != 0:
            raise RuntimeError(
                f"a run that should end well has ended with code {code}: {self._last_words()}"
            )
        return time.monotonic() - self.started

    def kill_main(self) -> None:
        """Kills the process alone, as the system does where memory is short."""
        self.process.kill()
        self.process.wait()

    def kill_all(self) -> None:
        """Kills the process with all that it has started, as a scheduler does. The process comes
        first: to find the others takes longer than a checkpoint."""
        self.process.kill()
        while alive := self.alive():
            for process in alive:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            self.process.poll()
        self.process.wait()

    def alive(self) -> list[psutil.Process]:
        """Returns the processes with this launch's mark, whoever their parent is now."""
        return [process for process in psutil.process_iter() if self._has_mark(process)]

    def _has_mark(self, process: psutil.Process) -> bool:
        try:
            environment = process.environ()
            return environment.get(_MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return False

    def seconds_of_orphans(self) -> float | None:
        """Returns how long it takes until no process of this launch is left; None where that is
        longer than ORPHAN_LIMIT_S. What is left then is killed."""
        began = time.monotonic()
        while self.alive():
            if time.monotonic() - began > ORPHAN_LIMIT_S:
                self.kill_all()
                return None
            time.sleep(0.01)
        return time.monotonic() - began


def shared_memory(pids: set[int]) -> list[str]:
    """Returns the names in shared memory that hold the id of one of these processes."""
    if not _SHARED_MEMORY.is_dir():
        return []
    names = (path.name for path in _SHARED_MEMORY.iterdir())
    return [name for name in names if pids & set(map(int, _numbers(name)))]


def _numbers(name: str) -> list[str]:
    parts = "".join(c if c.isascii() and c.isalnum() else " " for c in name).split()
    return [part for part in parts if part.isdecimal()]


def steps_recorded(run_dir: Path) -> int:
    """Returns the number of whole lines of `metrics.jsonl` that are of steps."""
    path = run_dir / METRICS_FILE
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    # Not parsed: it is asked many times a second.
    return sum(b'"eval_' not in line for line in lines)
