"""Part "kills" of the soak: SIGKILL at random moments, and the run resumed each time."""

import itertools
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measure import progress
from bench.soak.ends import End, differences, end_of
from bench.soak.launch import (
    RUN,
    Launch,
    arguments,
    resume_arguments,
    shared_memory,
    steps_recorded,
    variants,
)
from bench.soak.server import serving
from paint_engine.checkpoint.directory import (
    checkpoint_directory,
    checkpoint_step,
    list_checkpoints,
)
from paint_engine.files import EVALUATIONS_DIRECTORY, METRICS_FILE

MOMENTS = ("any", "working", "checkpoint", "evaluation")
"""from the start on; from the first thing that the process writes on; while a checkpoint is
written; after an evaluation's last file, before its checkpoint is marked as the best"""
PHASES = ("start-up", "steps", "checkpoint", "evaluation", "end")
_LONGEST_S = {"checkpoint": 0.03, "evaluation": 0.003}
"""about what a checkpoint takes to be written, and a mark"""
_MOST_TIMES = {"checkpoint": 6, "evaluation": 2}
_POLL_S = 0.001

FileStates = dict[str, tuple[int, ...]]
"""of files in a run directory: inode, size and time of the last change"""


@dataclass(frozen=True)
class Undisturbed:
    """A run that nothing has disturbed: its command line, what it leaves, and its seconds in all
    and until it has recorded its first step."""

    start: list[str]
    resume: list[str]
    end: End
    seconds: float
    seconds_start: float


def frequent_saves(num_steps: int) -> dict[str, str]:
    """Returns the settings of a run with a checkpoint every other step and six evaluations."""
    return {"checkpoint.every": "2", "eval.every": str(max(1, num_steps // 5))}


def run_undisturbed(directory: Path, num_steps: int, variant: dict[str, str]) -> Undisturbed:
    """Runs to the end. Raises RuntimeError if the run fails.

    variant: settings, one of `variants`.
    """
    start = arguments(num_steps, frequent_saves(num_steps) | variant)
    with Launch(directory, start) as launch:
        wait_for(launch, lambda: steps_recorded(launch.run_dir) > 0)
        seconds_start = time.monotonic() - launch.started
        seconds = launch.finish()
        end = end_of(launch.run_dir)
        return Undisturbed(start, resume_arguments(variant), end, seconds, seconds_start)


def wait_for(launch: Launch, happens: Callable[[], bool]) -> None:
    """Waits until something has happened or the process has ended. Raises RuntimeError if it
    hangs."""
    while launch.is_running() and not happens():
        time.sleep(_POLL_S)


# ---- what a run directory looks like -------------------------------------------------------------


def unfinished(run_dir: Path) -> FileStates:
    """Returns the checkpoints that are being written or deleted."""
    directory = checkpoint_directory(run_dir)
    return _file_states(directory.glob(".*")) if directory.is_dir() else {}


def working_files(run_dir: Path) -> FileStates:
    """Returns the files that a run appends to, and those of an evaluation that is not finished."""
    return _file_states(
        [run_dir / METRICS_FILE, *(run_dir / EVALUATIONS_DIRECTORY).glob("*.rank-*")]
    )


def _file_states(paths: Any) -> FileStates:
    found: FileStates = {}
    for path in paths:
        # Whatever is listed may be gone by now.
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            continue
        found[path.name] = (status.st_ino, status.st_size, status.st_mtime_ns)
    return found


def finished_evaluations(run_dir: Path) -> FileStates:
    """Returns the files that an evaluation writes last."""
    return _file_states((run_dir / EVALUATIONS_DIRECTORY).glob("step-*.json"))


@dataclass(frozen=True)
class State:
    """What a run directory says of how far the run is."""

    unfinished: FileStates
    working: FileStates
    steps: int
    checkpoint: int

    @classmethod
    def of(cls, run_dir: Path) -> "State":
        newest = [checkpoint_step(path) for path in list_checkpoints(run_dir)[-1:]]
        return cls(
            unfinished(run_dir), working_files(run_dir), steps_recorded(run_dir), *(newest or [0])
        )


def phase(before: State, after: State, num_steps: int) -> str:
    """Returns what a process did when it was killed, by what it has changed since its start."""
    if after.unfinished.items() - before.unfinished.items():
        return "checkpoint"
    changed = {name for name, _ in after.working.items() - before.working.items()}
    if changed - {METRICS_FILE}:
        return "evaluation"
    if after.checkpoint == num_steps and (changed or before.checkpoint < num_steps):
        return "end"
    # A process that resumes shortens the file to its checkpoint before its first step.
    return "steps" if changed else "start-up"


# ---- the kills -----------------------------------------------------------------------------------


def wait_for_moment(launch: Launch, kind: str, whole: Undisturbed, rng: random.Random) -> float:
    """Waits until the process is to be killed, or has ended. Returns the seconds that were drawn,
    from the start or from what the kind waits for."""
    before = working_files(launch.run_dir)
    if kind == "any":
        wait_s = rng.uniform(0, whole.seconds)
    elif kind == "working":
        wait_s = rng.uniform(0, whole.seconds - whole.seconds_start)
        wait_for(launch, lambda: working_files(launch.run_dir) != before)
    else:
        wait_s = rng.uniform(0, _LONGEST_S[kind])
        look = unfinished if kind == "checkpoint" else finished_evaluations
        for _ in range(rng.randint(1, _MOST_TIMES[kind])):
            seen = look(launch.run_dir).keys()
            wait_for(launch, lambda seen=seen: bool(look(launch.run_dir).keys() - seen))
    began = launch.started if kind == "any" else time.monotonic()
    wait_for(launch, lambda: time.monotonic() - began >= wait_s)
    return wait_s


@dataclass
class Rounds:
    """Runs that are killed and resumed until they end, one after the other, until all kills are
    done."""

    directory: Path
    num_kills: int
    num_steps: int
    rng: random.Random
    wholes: dict[str, Undisturbed]

    def __post_init__(self) -> None:
        self.kills: list[dict[str, Any]] = []
        self.ends: list[dict[str, Any]] = []
        self._killed: Launch | None = None
        self._pids: set[int] = set()

    def run(self) -> None:
        names = itertools.cycle(self.wholes)
        while len(self.kills) < self.num_kills:
            self._run_one(len(self.ends), next(names))

    def _run_one(self, number: int, variant: str) -> None:
        directory = self.directory / f"killed-{number}"
        num_before = len(self.kills)
        while len(self.kills) < self.num_kills:
            if self._launch_and_kill(directory, variant):
                break
        else:
            self._start(directory, variant).finish()
        self._wait_for_orphans()
        differing = differences(self.wholes[variant].end, end_of(directory / RUN))
        num_kills = len(self.kills) - num_before
        self.ends.append({"variant": variant, "kills": num_kills, "differing": differing})
        progress(f"run {number}, {variant}: {num_kills} kills, differing: {differing or 'nothing'}")

    def _start(self, directory: Path, variant: str) -> Launch:
        """Starts or resumes the run, by either command that resumes it."""
        whole = self.wholes[variant]
        by_name = list_checkpoints(directory / RUN) and self.rng.random() < 0.5
        launch = Launch(directory, whole.resume if by_name else whole.start)
        self._pids.add(launch.process.pid)
        return launch

    def _launch_and_kill(self, directory: Path, variant: str) -> bool:
        """Starts the run and kills it. Returns whether it had ended before."""
        before = State.of(directory / RUN)
        kind = MOMENTS[len(self.kills) % len(MOMENTS)]
        how = "main" if self.rng.random() < 0.5 else "all"
        launch = self._start(directory, variant)
        # The killed one's children end while this one starts.
        self._wait_for_orphans()
        wait_s = wait_for_moment(launch, kind, self.wholes[variant], self.rng)
        if not launch.is_running():
            launch.finish()
            return True
        launch.kill_main() if how == "main" else launch.kill_all()
        self._pids |= {process.pid for process in launch.alive()}
        self._killed = launch
        after = State.of(directory / RUN)
        found = {
            "run": len(self.ends),
            "moment": kind,
            "how": how,
            "wait_s": round(wait_s, 4),
            "phase": phase(before, after, self.num_steps),
            "step": after.steps,
            "checkpoint_before": before.checkpoint,
            "checkpoint": after.checkpoint,
            "orphans_s": 0.0,
        }
        self.kills.append(found)
        text = ", ".join(f"{key} {value}" for key, value in found.items())
        progress(f"kill {len(self.kills)}: {text}")
        return False

    def _wait_for_orphans(self) -> None:
        if self._killed is not None:
            self.kills[-1]["orphans_s"] = self._killed.seconds_of_orphans()
            self._killed = None

    def left_in_shared_memory(self) -> list[str]:
        return shared_memory(self._pids)


def measure(directory: Path, num_kills: int, num_steps: int, seed: int) -> dict[str, Any]:
    """Runs each variant undisturbed, then kills runs of them `num_kills` times and compares their
    ends."""
    with serving() as url:
        wholes = {
            name: run_undisturbed(directory / f"whole-{place}", num_steps, variant)
            for place, (name, variant) in enumerate(variants(url).items())
        }
        rounds = Rounds(directory, num_kills, num_steps, random.Random(seed), wholes)
        rounds.run()
    return {
        "num_steps": num_steps,
        "seed": seed,
        "undisturbed": [
            {"variant": name, "seconds": whole.seconds, "seconds_start": whole.seconds_start}
            for name, whole in wholes.items()
        ],
        "kills": rounds.kills,
        "runs": rounds.ends,
        **conclude(rounds.kills, rounds.ends, rounds.left_in_shared_memory()),
    }


def conclude(
    kills: list[dict[str, Any]], runs: list[dict[str, Any]], shared: list[str]
) -> dict[str, Any]:
    """Returns the kills by phase and what went wrong: runs that differ, finished checkpoints that
    were lost, processes and shared memory that stayed."""
    lost = sum(kill["checkpoint"] < kill["checkpoint_before"] for kill in kills)
    orphaned = sum(kill["orphans_s"] is None for kill in kills)
    differing = sum(bool(run["differing"]) for run in runs)
    phases = Counter(kill["phase"] for kill in kills)
    return {
        "phases": {name: phases[name] for name in PHASES},
        "num_differing": differing,
        "num_lost_checkpoints": lost,
        "num_orphaned": orphaned,
        "left_in_shared_memory": shared,
        "passed": not (differing or lost or orphaned or shared),
    }
