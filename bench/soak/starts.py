"""Part "starts" of the soak: a second process in the directory of a run that lives."""

import random
import time
from pathlib import Path
from typing import Any

from bench.measure import progress
from bench.soak.ends import differences, end_of
from bench.soak.kills import Undisturbed, run_undisturbed, wait_for
from bench.soak.launch import RUN, Launch
from paint_engine.checkpoint.directory import list_checkpoints

REFUSED = 2
"""the exit code of a user's mistake"""
_ENTERED = "run directory: "
"""what a process prints when it has the directory"""
_LATEST = 0.6
"""share of a run's time after which no second process is started: it would come too late"""


def intruders(whole: Undisturbed) -> dict[str, list[str]]:
    """Returns the command lines of second processes in a run's directory."""
    new = [*whole.start, "--run.auto_resume", "false"]
    return {
        "start": new,
        "auto_resume": whole.start,
        "resume": whole.resume,
        "overwrite": [*new, "--run.overwrite", "true"],
    }


def outcome(first: Launch, second: Launch) -> dict[str, Any]:
    """Waits for both processes; returns how each has ended, what the refused one has said, and
    whether both were at work in the directory. Raises RuntimeError if one hangs."""
    pair, both = (first, second), False
    while any(launch.is_running() for launch in pair):
        entered = all(_ENTERED in launch.printed() for launch in pair)
        both |= entered and all(launch.is_running() for launch in pair)
        time.sleep(0.02)
    refused = [launch for launch in pair if launch.process.returncode == REFUSED]
    message = refused[0].printed().strip() if len(refused) == 1 else ""
    return {
        "codes": [launch.wait() for launch in pair],
        "both_at_work": both,
        "message": message.splitlines()[-1] if message else "",
        "traceback": any("Traceback" in launch.printed() for launch in pair),
    }


def is_late(case: dict[str, Any]) -> bool:
    """Returns whether the first process had ended before the second came to the directory, which
    says nothing of the two together."""
    return case["codes"] == [0, 0] and not case["both_at_work"]


def is_right(case: dict[str, Any]) -> bool:
    """Returns whether one process was refused in words, and the other ended as if alone."""
    ended = sorted(case["codes"]) == [0, REFUSED] and not case["both_at_work"]
    in_words = bool(case["message"]) and not case["traceback"]
    return ended and in_words and not case["differing"]


def run_case(directory: Path, name: str, wait_s: float, whole: Undisturbed) -> dict[str, Any]:
    """Starts a run, and `wait_s` later a second process of this kind in its directory."""
    with Launch(directory, whole.start) as first:
        wait_for(first, lambda: time.monotonic() - first.started >= wait_s)
        with Launch(directory, intruders(whole)[name], log=f"{name}.txt") as second:
            found = outcome(first, second)
    return {
        "second": name,
        "wait_s": round(wait_s, 3),
        **found,
        "differing": differences(whole.end, end_of(directory / RUN)),
    }


def run_pair_that_resumes(directory: Path, whole: Undisturbed) -> dict[str, Any]:
    """Kills a run after its first checkpoint, then resumes it by two processes at once."""
    with Launch(directory, whole.start) as killed:
        wait_for(killed, lambda: bool(list_checkpoints(killed.run_dir)))
    with (
        Launch(directory, whole.resume, log="1.txt") as first,
        Launch(directory, whole.resume, log="2.txt") as second,
    ):
        found = outcome(first, second)
    return {
        "second": "two resumes at once",
        "wait_s": 0.0,
        **found,
        "differing": differences(whole.end, end_of(directory / RUN)),
    }


def measure(directory: Path, num_starts: int, num_steps: int, seed: int) -> dict[str, Any]:
    """Starts a second process at `num_starts` random moments of a run, each kind in turn, then two
    at the same moment: new runs, and resumed ones. A second process that comes after the end is
    replaced by another one."""
    rng = random.Random(seed)
    whole = run_undisturbed(directory / "alone", num_steps, {})
    kinds = list(intruders(whole))
    cases: list[dict[str, Any]] = []
    num_late = 0
    while len(cases) < num_starts:
        name, place = kinds[len(cases) % len(kinds)], len(cases) + num_late
        wait_s = rng.uniform(0, _LATEST * whole.seconds)
        case = run_case(directory / f"pair-{place}", name, wait_s, whole)
        progress(f"start {place}: {case}")
        if is_late(case):
            num_late += 1
            if num_late > num_starts:
                raise RuntimeError("the runs end before a second one starts: give more --num-steps")
            continue
        cases.append(case)
    at_once = run_case(directory / "at-once", "auto_resume", 0.0, whole)
    cases.append(at_once | {"second": "two starts at once"})
    cases.append(run_pair_that_resumes(directory / "resumed", whole))
    progress(f"at once: {cases[-2:]}")
    for case in cases:
        case["is_right"] = is_right(case)
    return {
        "num_steps": num_steps,
        "seed": seed,
        "seconds_alone": whole.seconds,
        "num_late": num_late,
        "cases": cases,
        "passed": all(case["is_right"] for case in cases),
    }
