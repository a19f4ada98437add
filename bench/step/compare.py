"""Measures one case: whole steps, then the training part in every loop."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bench.measure import dtype_on, progress
from bench.step.cases import COUNTED_PARTS, num_tokens_of, operations, random_rollouts, token_counts
from bench.step.loops import OwnLoop
from bench.step.timing import (
    LOOPS,
    OURS,
    TRL,
    Bench,
    Row,
    extra_bytes,
    make_loop,
    time_each_on_gpu,
    time_on_cpu,
    whole_steps,
)
from bench.step.trl_loop import LACKS, reason_against
from paint_engine.config.command_line import load_config
from paint_engine.training.step import my_microbatches

LOSS_LIMIT = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
"""largest relative difference of two first losses that should be equal"""
RATIOS = {"time": "median_ms", "memory": "peak_bytes", "extra memory": "extra_bytes"}


def describe(loop: OwnLoop, bench: Bench) -> dict[str, Any]:
    """Returns the work in one step of the training part: tokens and floating-point operations."""
    counted = operations(loop.run, bench.rollouts)
    return {
        "num_rollouts": len(bench.rollouts),
        "rows_a_pass": bench.most_rows,
        "num_tokens": token_counts(bench.rollouts),
        "flops": {name: counted[name] for name in COUNTED_PARTS},
        "attention": loop.run.attention,
        "dtype": str(dtype_on(bench.device)).removeprefix("torch."),
    }


def check_losses(rows: Mapping[str, Row], forward_kl: float, limit: float) -> None:
    """Adds a reason to rows whose first loss is not the expected one: their work is not equal.

    Expected is our forward KL for TRL, and our own loss for plain PyTorch.
    """
    for name, row in rows.items():
        wanted = forward_kl if name == TRL else rows.get(OURS, {}).get("first_loss")
        if name == OURS or wanted is None or "first_loss" not in row:
            continue
        row["loss_difference"] = abs(row["first_loss"] - wanted) / max(abs(wanted), 1e-12)
        if not row["loss_difference"] <= limit:
            row["reason"] = f"first loss {row['first_loss']:.6g}, expected {wanted:.6g}"


def result_rows(rows: Mapping[str, Row], case: Mapping[str, Any]) -> list[Row]:
    """Returns one row per loop in the order of LOOPS, with its status, rate and utilisation."""
    finished = []
    for name, kind in LOOPS.items():
        if name not in rows:
            continue
        status = "failed" if "reason" in rows[name] else "measured"
        lacks = list(LACKS) if name == TRL else []
        row = {"loop": name, "kind": kind, "lacks": lacks, "status": status, **rows[name]}
        if "median_ms" in row:
            per_s = 1e3 / row["median_ms"]
            row["completion_tokens_per_s"] = case["num_tokens"]["completion"] * per_s
            flops_per_s = sum(case["flops"].values()) * per_s
            row["utilisation"] = flops_per_s / case["gemm_flops_per_s"]
        finished.append(row)
    return finished


def ratios(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Returns the time and memory, relative to ours, of the other loops that did equal work."""
    by_name = {row["loop"]: row for row in rows if row["status"] == "measured"}
    ours, found = by_name.pop(OURS, {}), {}
    for name, row in by_name.items():
        pairs = {label: (row.get(key), ours.get(key)) for label, key in RATIOS.items()}
        found[name] = {label: a / b for label, (a, b) in pairs.items() if a and b}
    return found


def measure_case(
    bench: Bench,
    rounds: int,
    arguments: Sequence[str] | None,
    deadline: float = float("inf"),
) -> dict[str, Any]:
    """Measures one case; returns its part of the JSON.

    arguments: of `python -m bench.engine`; they select the case in the processes that measure
    memory on a CPU. With None, memory is not measured there.
    deadline: value of time.monotonic after which no loop starts on a GPU.
    """
    case: dict[str, Any] = {"case": bench.case.name}
    absent = {TRL: {"reason": reason_against()}} if reason_against() else {}
    names = [name for name in LOOPS if name not in absent]
    progress(f"{bench.case.name}: {', '.join(names)}")
    if bench.case.lengths is None:
        case["step"] = whole_steps(bench, rounds)
    else:
        number = load_config(bench.case.arguments).config.train.batch_size
        num_tokens = num_tokens_of(bench.case)
        bench.rollouts = random_rollouts(bench.case.lengths, number, num_tokens)
    loop = make_loop(OURS, bench)
    assert isinstance(loop, OwnLoop)
    bench.most_rows = max(map(len, my_microbatches(loop.run, bench.rollouts)))
    case |= describe(loop, bench)
    forward_kl = loop.forward_kl()
    # Frees the memory: on a GPU each loop has all of it.
    del loop
    if bench.device.type == "cuda":
        rows, case["gemm_flops_per_s"] = time_each_on_gpu(bench, names, rounds, deadline)
    else:
        rows, case["gemm_flops_per_s"] = time_on_cpu(bench, names, rounds)
        if arguments is not None:
            for name in names:
                rows[name]["extra_bytes"] = extra_bytes(bench, name, arguments)
    check_losses(rows, forward_kl, LOSS_LIMIT[dtype_on(bench.device)])
    case["rows"] = result_rows({**rows, **absent}, case)
    return {**case, "ratios": ratios(case["rows"])}
