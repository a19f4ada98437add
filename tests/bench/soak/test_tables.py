"""The tables of the soak, from made-up results."""

from typing import Any

from bench.soak.flat import MIB
from bench.soak.steps import AMOUNTS, COUNTS
from bench.soak.tables import kills_table, starts_table, steps_table

MADE = {
    "command": "python -m bench.soak",
    "commit": "0123456789abcdef",
    "device": "a device",
    "load_before": 3.4,
    "versions": {"torch": "2.13.0"},
}


def result(name: str, **part: Any) -> dict[str, Any]:
    return {"name": "soak", "parts": {name: {**MADE, "num_steps": 1000, **part}}}


def test_steps_have_a_row_per_series_and_columns_per_run() -> None:
    flat = {"second": 100 * MIB, "last": 101 * MIB, "slope": 2 * MIB, "is_flat": True}
    count = {"second": 6, "last": 8, "slope": 4.0, "is_flat": False}
    verdicts = {name: flat for name in AMOUNTS} | {name: count for name in COUNTS}
    run = {"variant": "a", "verdicts": verdicts, "series": {"step": [5, 10]}}
    table = steps_table(result("steps", limit_bytes=10 * MIB, runs=[run, run | {"variant": "b"}]))
    lines = table.splitlines()
    assert lines[0] == "|  | a | per 1,000 steps | flat | b | per 1,000 steps | flat |"
    memory, files = "100.0 to 101.0 | +2.0 | yes", "6 to 8 |  | **no**"
    assert lines[2] == f"| resident memory, MiB | {memory} | {memory} |"
    assert f"| open files | {files} | {files} |" in lines
    assert len(lines) == 2 + len(AMOUNTS) + len(COUNTS) + 2
    assert "1,000 steps, 2 samples" in lines[-1]


def test_kills_are_counted_by_phase_and_kind() -> None:
    kills = [
        {"phase": "steps", "moment": "any", "how": "all", "orphans_s": 0.02},
        {"phase": "steps", "moment": "working", "how": "main", "orphans_s": 0.31},
        {"phase": "checkpoint", "moment": "any", "how": "main", "orphans_s": 0.0},
    ]
    part = {
        "kills": kills,
        "runs": [{"kills": 3}, {"kills": 0}],
        "undisturbed": [{"variant": "a"}, {"variant": "b"}],
        "phases": {"steps": 2, "checkpoint": 1, "end": 0},
        "num_differing": 0,
        "num_lost_checkpoints": 0,
        "num_orphaned": 0,
        "left_in_shared_memory": [],
    }
    lines = kills_table(result("kills", **part)).splitlines()
    assert lines[2:6] == [
        "| steps | 2 | 1 | 1 |",
        "| checkpoint | 1 | 0 | 1 |",
        "| end | 0 | 0 | 0 |",
        "| all | 3 | 1 | 2 |",
    ]
    assert "3 kills (2 any, 1 working) in 1 runs of 1000 steps (a; b); 0 runs ended" in lines[-1]
    assert "within 0.3 s. a device" in lines[-1] and lines[-1].endswith("`python -m bench.soak`.")


def test_starts_are_counted_by_kind() -> None:
    cases = [
        {"second": "resume", "codes": [0, 2], "differing": []},
        {"second": "resume", "codes": [0, 0], "differing": ["metrics.jsonl"]},
        {"second": "overwrite", "codes": [2, 0], "differing": []},
    ]
    lines = starts_table(result("starts", seconds_alone=20.4, cases=cases)).splitlines()
    assert lines[2:4] == ["| resume | 2 | 1 | 1 |", "| overwrite | 1 | 1 | 1 |"]
    assert "which take 20 s alone. a device" in lines[-1]
