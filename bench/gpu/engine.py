"""Part "engine" of the GPU check: `python -m bench.engine` at Qwen3's shapes, while time remains.

Requires paint_engine's dependencies, and TRL for the comparison. The results are written to
engine-<device>.json after each model.
"""

import functools
import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

from bench.gpu.job import Job, slug

NEEDED = ("jaxtyping", "jinja2", "matplotlib", "pydantic", "rich")
MODELS = (("8b", 0.0), ("1.7b", 40.0), ("4b", 50.0))
"""model, and the seconds that have to remain; the first one has targets"""
SECONDS_A_LOOP = 25.0
SPEED_TARGET = 1.5
"""tokens per second relative to TRL's"""
UTILISATION_TARGET = 0.45
"""share of the rate of bare matrix products"""


def measure(job: Job, model: str) -> dict[str, Any]:
    """Measures the training part of one model."""
    from bench.step import cases, compare, timing

    on_gpu = job.device.type == "cuda"
    lengths = cases.SMALL_LENGTHS if model == "small" else cases.LENGTHS
    case = cases.random_case(model, lengths, 4 if job.quick or not on_gpu else cases.NUM_ROLLOUTS)
    rounds = 2 if job.quick or not on_gpu else 3
    with tempfile.TemporaryDirectory() as folder:
        bench = timing.Bench(case, job.device, Path(folder))
        deadline = job.deadline - SECONDS_A_LOOP
        return compare.measure_case(bench, rounds, None, deadline)


def missed_targets(case: dict[str, Any]) -> list[str]:
    """Targets missed at the 8B shape: speed and memory relative to TRL, and utilisation."""
    if case["case"] != "8b":
        return []
    rows = {row["kind"]: row for row in case["rows"]}
    missed = []
    if not rows["ours"].get("utilisation", 0.0) >= UTILISATION_TARGET:
        found = rows["ours"].get("utilisation")
        missed.append(f"utilisation is {found}, the target {UTILISATION_TARGET}")
    peer = rows["peer"]
    ratios = case["ratios"].get(peer["loop"])
    if ratios is None:
        # If TRL does not fit into memory, its targets do not apply.
        return missed if peer["reason"] == "out of memory" else [*missed, f"TRL: {peer['reason']}"]
    if not ratios["time"] >= SPEED_TARGET:
        missed.append(f"{ratios['time']:.2f} x as fast as TRL, the target {SPEED_TARGET}")
    if not ratios["memory"] >= 1:
        missed.append(f"TRL takes {ratios['memory']:.2f} of our memory")
    return missed


def line(case: dict[str, Any]) -> str:
    """Returns the results of one model as text."""
    parts = []
    for row in case["rows"]:
        if row["status"] != "measured":
            parts.append(f"{row['loop']} {row['reason']}")
            continue
        text = f"{row['loop']} {row['median_ms']:,.0f} ms, {row['utilisation']:.1%} of GEMM"
        parts.append(text + (f", {row['peak_bytes'] / 1e9:.1f} GB" if "peak_bytes" in row else ""))
    return f"{case['case']}: {'; '.join(parts)}"


def write(job: Job, cases: list[dict[str, Any]]) -> None:
    result = {"name": "engine", **job.environment, "cases": cases}
    path = job.output / f"engine-{slug(job.device)}.json"
    path.write_text(json.dumps(result) + "\n")


def run(job: Job) -> str:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return (
            f"left out: needs {', '.join(missing)} (pip install {' '.join(missing)} trl datasets); "
            'part "steps" times a training step without them'
        )
    models = MODELS if job.device.type == "cuda" else (("small", 0.0),)
    cases: list[dict[str, Any]] = []
    for model, seconds in models[:1] if job.quick else models:
        if job.seconds_left() < seconds + SECONDS_A_LOOP:
            print(f"{model}: left out, {job.seconds_left():.0f} s remain", flush=True)
            continue
        case = job.attempt(model, functools.partial(measure, job, model))
        if case is not None:
            cases.append(case)
            write(job, cases)
            print(line(case), flush=True)
    failed = [row for case in cases for row in case["rows"] if row["status"] == "failed"]
    wrong = [row for row in failed if "loss_difference" in row]
    job.failures += [f"{row['loop']}: {row['reason']}" for row in wrong]
    missed = [text for case in cases for text in missed_targets(case)]
    job.save(missed_targets=missed)
    summary = "; ".join(map(line, cases)) or "nothing was measured"
    return f"{summary}; missed: {'; '.join(missed)}" if missed else summary
