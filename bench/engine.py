"""Where a training step's time and memory go, beside TRL and beside the loss in plain PyTorch.

    OMP_NUM_THREADS=2 python -m bench.engine --device cpu --output bench/results/engine-cpu.json
    python -m bench.engine --device cuda --model 8b             # random weights, no download
    python -m bench.engine --device cuda --preset paint-qwen3-8b    # its weights and rollouts

First whole steps of a preset, rollouts included, by part. Then its training part: the same fixed
rollouts through the engine's own step, through that step with the full logits in plain PyTorch, and
through TRL's SDFT trainer, at the same weights, adapters, optimizer and rows a forward pass. TRL
has its own attention, SDPA on padded rows, and its forward KL has no clip and no interpolation, so
it does less. Its first loss has to be the forward KL that the engine computes, and plain PyTorch's
the engine's own. On a CPU the loops take turns, step by step; on a GPU they follow one another, so
that each has the memory to itself. A loop's step is timed whole; its parts are timed in further
steps, which wait for the device after each part. The last line of stdout is JSON.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from bench import measure
from bench.gpu import job
from bench.measure import dtype_on, progress
from bench.step.cases import (
    COUNTED_PARTS,
    Case,
    Lengths,
    num_tokens_of,
    operations,
    preset_case,
    random_case,
    random_rollouts,
    token_counts,
)
from bench.step.loops import OwnLoop
from bench.step.tables import engine_case_table
from bench.step.timing import (
    LOOPS,
    OURS,
    TRL,
    Bench,
    Row,
    child,
    extra_bytes,
    make_loop,
    time_each_on_gpu,
    time_on_cpu,
    whole_steps,
)
from bench.step.trl_loop import LACKS, reason_against
from paint_engine import train
from paint_engine.cli import load_config, preset_names

MODELS = ("1.7b", "4b", "8b")
LENGTHS = Lengths(student_prompt=256, teacher_prompt=768, completion=1024)
SMALL_LENGTHS = Lengths(student_prompt=12, teacher_prompt=20, completion=16)
NUM_ROLLOUTS = 8
LOSS_LIMIT = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
"""relative difference of two first losses of equal work"""
RATIOS = {"time": "median_ms", "memory": "peak_bytes", "extra memory": "extra_bytes"}
QUICK = ("--train.batch_size", "4", "--rollout.max_new_tokens", "24")


def described(loop: OwnLoop, bench: Bench) -> dict[str, Any]:
    """What one step of the training part holds."""
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
    """Marks the rows whose first loss is not the one expected: their work was not equal.

    Of TRL that is our forward KL, of plain PyTorch our own loss.
    """
    for name, row in rows.items():
        wanted = forward_kl if name == TRL else rows.get(OURS, {}).get("first_loss")
        if name == OURS or wanted is None or "first_loss" not in row:
            continue
        row["loss_difference"] = abs(row["first_loss"] - wanted) / max(abs(wanted), 1e-12)
        if not row["loss_difference"] <= limit:
            row["reason"] = f"first loss {row['first_loss']:.6g}, expected {wanted:.6g}"


def finish(rows: Mapping[str, Row], case: Mapping[str, Any]) -> list[Row]:
    """One row a loop, in the order of LOOPS: what it is, its rate and its utilisation."""
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
    """Time and memory of the other loops that did equal work, over ours."""
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
    """Everything of one case, in the JSON's form.

    arguments: of this command, naming the case to the processes that measure memory on a CPU; None
    leaves memory out there.
    deadline: of time.monotonic, after which no loop is begun on a GPU.
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
    bench.most_rows = max(map(len, train.my_microbatches(loop.run, bench.rollouts)))
    case |= described(loop, bench)
    forward_kl = loop.forward_kl()
    # On a GPU each loop has the memory to itself.
    del loop
    if bench.device.type == "cuda":
        rows, case["gemm_flops_per_s"] = time_each_on_gpu(bench, names, rounds, deadline)
    else:
        rows, case["gemm_flops_per_s"] = time_on_cpu(bench, names, rounds)
        if arguments is not None:
            for name in names:
                rows[name]["extra_bytes"] = extra_bytes(bench, name, arguments)
    check_losses(rows, forward_kl, LOSS_LIMIT[dtype_on(bench.device)])
    case["rows"] = finish({**rows, **absent}, case)
    return {**case, "ratios": ratios(case["rows"])}


def environment(device: torch.device, command: str) -> dict[str, Any]:
    """With the versions of what trains."""
    found = measure.environment(device, command)
    versions = {name: job.version(name) for name in ("torch", "transformers", "peft", "trl")}
    named = {name: version for name, version in versions.items() if version}
    python = found["versions"]["python"]
    return {**found, "versions": {"python": python, **named, **measure.cuda_version()}}


def result_of(found: dict[str, Any], cases: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The JSON's form: `found` is the environment."""
    return {"name": "engine", **found, "cases": list(cases)}


def cases_of(arguments: argparse.Namespace) -> list[Case]:
    cases = [preset_case(name, *(QUICK if arguments.quick else ())) for name in arguments.preset]
    for model in arguments.model:
        lengths = SMALL_LENGTHS if model == "small" else LENGTHS
        cases.append(random_case(model, lengths, arguments.rollouts))
    return cases


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    presets, models = preset_names(), (*MODELS, "small")
    parser.add_argument(
        "--preset", nargs="+", choices=presets, default=[], help="on a CPU: tiny, if none is given"
    )
    parser.add_argument(
        "--model", nargs="+", choices=models, default=[], help="on a GPU: all, if none is given"
    )
    parser.add_argument(
        "--rollouts", type=int, default=NUM_ROLLOUTS, help="a step, of each --model"
    )
    parser.add_argument("--rounds", type=int, help="timed steps of each loop")
    parser.add_argument("--quick", action="store_true", help="few rollouts and steps")
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    if not arguments.preset and not arguments.model:
        on_gpu = arguments.device == "cuda"
        arguments.preset, arguments.model = ([], list(MODELS)) if on_gpu else (["tiny"], [])
    if arguments.rounds is None:
        arguments.rounds = 2 if arguments.quick else 3 if arguments.device == "cuda" else 8
    return arguments


def naming(case: Case, arguments: argparse.Namespace) -> list[str]:
    """The arguments of this command that name one of its cases on a CPU."""
    found = ["--device", "cpu", "--rollouts", str(arguments.rollouts)]
    found += ["--preset" if case.lengths is None else "--model", case.name]
    return [*found, "--quick"] if arguments.quick else found


def main(argv: Sequence[str]) -> None:
    arguments = parse(argv)
    transformers_logging.disable_progress_bar()
    device = torch.device(arguments.device)
    cases = cases_of(arguments)
    if arguments.child:
        name, path, rows = arguments.child
        with tempfile.TemporaryDirectory() as folder:
            child(Bench(cases[0], device, Path(folder)), name, Path(path), int(rows))
        return
    measured = []
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(case, device, Path(folder))
            measured.append(measure_case(bench, arguments.rounds, naming(case, arguments)))
        print(f"{engine_case_table(measured[-1])}\n", flush=True)
    command = " ".join(["python -m bench.engine", *argv])
    measure.emit(result_of(environment(device, command), measured), arguments.output)


if __name__ == "__main__":
    main(sys.argv[1:])
