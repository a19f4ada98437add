"""Part "kernels" of the GPU check: the most important shapes of `python -m bench.kernels`.

The most important shape comes first; others follow while time remains. The results are written to
kernels-<device>.json after each shape.
"""

import functools
import json
import time
from typing import Any

from bench.gpu.job import Job, slug
from bench.kernels import compare
from bench.kernels.variants import Variant
from bench.losses import QWEN3_VOCAB_SIZE, Shape

GPU_SHAPES = (
    ("8b", 32768, "", 0),
    ("8b", 32768, "lognormal around 1,500", 30),
    ("1.7b", 32768, "", 30),
    ("8b", 4096, "", 30),
    ("8b", 131072, "", 45),
)
"""model, tokens, mixture of lengths if they are not equal, and the seconds that have to remain"""
PLAIN_MOST_TOKENS = 4096
"""with more tokens, plain PyTorch's full logits do not fit into 80 GB"""
OURS = ("paint_loss", "paint_loss, bounds on the GPU", "paint_loss, trainable head")
TARGETS = {"ratio_to_floor": 1.25, "extra_bytes": 4e9, "gradient_error_before_rounding": 1e-3}
"""upper limits of `paint_loss` at H = 4096 and 32768 tokens"""
SPEED_TARGET = 2.0
"""required speed relative to the fastest peer at equal work"""
SECONDS_TO_WRITE = 5.0


def shapes_for(job: Job) -> list[tuple[Shape, float]]:
    """Shapes in order, each with the seconds that have to remain for it."""
    if job.device.type == "cuda":
        shapes = GPU_SHAPES[:1] if job.quick else GPU_SHAPES
        return [
            (compare.make_shape(model, n, QWEN3_VOCAB_SIZE, mixture), seconds)
            for model, n, mixture, seconds in shapes
        ]
    num_tokens, vocab_size = (64, 2048) if job.quick else (512, QWEN3_VOCAB_SIZE)
    return [(compare.make_shape("cpu", num_tokens, vocab_size), 0.0)]


def variants_for(job: Job, shape: Shape) -> list[Variant]:
    """Returns the floor, ours, the peers, and plain PyTorch if it fits.

    Compiled variants are left out, because torch.compile takes too long.
    """
    kinds = {"floor", "peer"}
    if shape.num_tokens <= PLAIN_MOST_TOKENS:
        kinds.add("plain")
    if job.device.type == "cpu":
        kinds.discard("peer")
    found = compare.choose(compare.all_variants(job.device), ["PAINT", "forward KL"], None)
    return [
        variant
        for variant in found
        if (variant.kind in kinds and "compile" not in variant.name)
        or (variant.kind == "ours" and variant.name in OURS)
    ]


def probes_for(job: Job, variants: list[Variant], shape: Shape) -> dict[str, tuple[int, str]]:
    """Returns the probes, as in `bench.kernels`: memory on a CPU and failures on a GPU are measured
    in other processes."""
    probed = [variant for variant in variants if not variant.unavailable]
    if job.device.type == "cuda":
        probed = [variant for variant in probed if variant.kind == "peer"]
    if job.quick:
        return {}
    return compare.in_own_processes(probed, shape, job.device)


def measure(job: Job, shape: Shape) -> list[dict[str, Any]]:
    """Measures one shape; returns its groups."""
    variants = variants_for(job, shape)
    probes = probes_for(job, variants, shape)
    deadline = job.deadline - SECONDS_TO_WRITE
    return compare.measure_shape(shape, variants, job.device, probes, deadline)


def write(job: Job, groups: list[dict[str, Any]]) -> None:
    result = {"name": "kernels", **job.environment, "groups": groups}
    result |= compare.ratios_to_plain(groups)
    path = job.output / f"kernels-{slug(job.device)}.json"
    path.write_text(json.dumps(result) + "\n")


def line(group: dict[str, Any]) -> str:
    """Returns the speed, memory and error of `paint_loss` in one group, as text."""
    shape = group["shape"]
    head = f"{group['group']}, H {shape['hidden']}, N {shape['num_tokens']}"
    head += f", rollouts {shape['mixture']}" if shape.get("mixture") else ""
    row = next((row for row in group["rows"] if row["variant"] == "paint_loss"), {})
    if "median_ms" not in row or "ratio_to_floor" not in row:
        return f"{head}: {row.get('reason', 'no time')}"
    error = row.get("gradient_error_before_rounding", row["gradient_error"])
    parts = [f"{row['ratio_to_floor']:.3f} x three GEMMs", f"{row['median_ms']:.1f} ms"]
    if "extra_bytes" in row:
        parts.append(f"{row['extra_bytes'] / 1e9:.2f} GB extra")
    parts.append(f"error {error:.1e}")
    peer = group["fastest_peer"]
    against = f"{peer['ratio']:.2f} x as fast as {peer['variant']}" if peer else "no peer ran"
    return f"{head}: {', '.join([*parts, against])}"


def missed_targets(groups: list[dict[str, Any]]) -> list[str]:
    """Targets missed at H = 4096 and 32768 tokens; the speed target needs a peer that ran."""
    missed = []
    for group in groups:
        if group["shape"]["hidden"] != 4096 or group["shape"]["num_tokens"] != 32768:
            continue
        row = next((row for row in group["rows"] if row["variant"] == "paint_loss"), {})
        if group["group"] == "PAINT":
            missed += [
                f"{name} is {row[name]:.3g}, the target {target:g}"
                if name in row
                else f"{name} is not known"
                for name, target in TARGETS.items()
                if not row.get(name, float("inf")) <= target
            ]
        peer = group["fastest_peer"]
        if peer and peer["ratio"] < SPEED_TARGET:
            missed.append(f"{peer['ratio']:.2f} x as fast as {peer['variant']}, not twice")
    return missed


def run(job: Job) -> str:
    groups: list[dict[str, Any]] = []
    for shape, seconds in shapes_for(job):
        name = f"H {shape.hidden}, N {shape.num_tokens}"
        if job.seconds_left() < seconds + SECONDS_TO_WRITE:
            print(f"{name}: left out, {job.seconds_left():.0f} s remain", flush=True)
            continue
        begin = time.monotonic()
        measured = job.attempt(name, functools.partial(measure, job, shape))
        groups += measured or []
        if groups:
            write(job, groups)
        print(f"{name}: {time.monotonic() - begin:.0f} s", flush=True)
    for group in groups:
        print(line(group), flush=True)
        failed = [row for row in group["rows"] if row["kind"] == "ours" and "median_ms" not in row]
        failed = [row for row in failed if row["status"] != "left out"]
        job.failures += [f"{group['group']}, {row['variant']}: {row['reason']}" for row in failed]
    missed = missed_targets(groups)
    job.save(missed_targets=missed)
    summary = "; ".join(map(line, groups[:2])) or "nothing was measured"
    return f"{summary}; missed: {'; '.join(missed)}" if missed else summary
