"""A run that is killed at random moments, and resumed each time, ends as one that never was.

One kill of each kind of moment; `python -m bench.soak --parts kills` does 50, with other settings.
"""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.soak.kills import MOMENTS, PHASES, Rounds, State, conclude, phase, run_undisturbed
from bench.soak.launch import write_problems

NUM_STEPS = 12
QUIET = State(unfinished={}, working={"metrics.jsonl": (1, 100, 5)}, steps=4, checkpoint=4)


def test_killed_at_random_moments_a_run_ends_the_same(tmp_path: Path) -> None:
    write_problems(tmp_path)
    whole = run_undisturbed(tmp_path / "whole", NUM_STEPS, {})
    seed = random.SystemRandom().randrange(2**31)
    rounds = Rounds(
        tmp_path, len(MOMENTS), NUM_STEPS, random.Random(seed), {"built-in sampler": whole}
    )
    rounds.run()
    found = conclude(rounds.kills, rounds.ends, rounds.left_in_shared_memory())
    assert [kill["moment"] for kill in rounds.kills] == list(MOMENTS)
    assert found["passed"], (seed, rounds.kills, rounds.ends)


def test_the_phase_is_what_the_killed_process_has_changed() -> None:
    written = {".step-6.unfinished": (2, 4096, 9)}
    samples = {**QUIET.working, "step-4.rank-0.jsonl": (3, 10, 9)}
    appended = {"metrics.jsonl": (1, 200, 9)}
    cases = {
        "start-up": QUIET,
        "steps": replace(QUIET, working=appended, steps=5),
        "evaluation": replace(QUIET, working=samples),
        "checkpoint": replace(QUIET, working=appended, steps=6, unfinished=written),
        "end": replace(QUIET, working=appended, steps=8, checkpoint=8),
    }
    assert set(cases) == set(PHASES)
    assert {name: phase(QUIET, after, num_steps=8) for name, after in cases.items()} == {
        name: name for name in cases
    }
    # What an earlier kill has left says nothing.
    killed = replace(QUIET, working=samples, unfinished=written)
    assert phase(killed, killed, num_steps=8) == "start-up"


def kill(**values: Any) -> dict[str, Any]:
    before = {"checkpoint_before": 2, "checkpoint": 4, "orphans_s": 0.1, "phase": "steps"}
    return before | values


def test_what_goes_wrong_fails_the_part() -> None:
    equal, other = {"differing": []}, {"differing": ["metrics.jsonl"]}
    assert conclude([kill()], [equal], [])["passed"]
    for wrong in (
        conclude([kill(checkpoint=0)], [equal], []),
        conclude([kill(orphans_s=None)], [equal], []),
        conclude([kill()], [equal, other], []),
        conclude([kill()], [equal], ["paint-812-5d1ba3c0"]),
    ):
        assert not wrong["passed"]
