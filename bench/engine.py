"""Times a training step by part, and next to plain PyTorch's loss and TRL's trainer.

    OMP_NUM_THREADS=2 python -m bench.engine --device cpu --output bench/results/engine-cpu.json
    python -m bench.engine --device cuda --model 8b             # random weights, no download
    python -m bench.engine --device cuda --preset paint-qwen3-8b    # its weights and rollouts

It first times whole steps of a preset by part, including the rollouts. Then it times the training
part on the same fixed rollouts in three loops: the engine's step, that step with the full logits in
plain PyTorch, and TRL's SDFT trainer. The loops share weights, adapters, optimizer and rows per
forward pass.

TRL uses its own attention, SDPA on padded rows, and its forward KL has neither clip nor
interpolation, so it does less work. A loop counts only if its first loss is the expected one: the
engine's own loss for plain PyTorch, the engine's forward KL for TRL.

On a CPU the loops alternate step by step; on a GPU they run one after another, each with all of the
memory. Steps are timed whole; the parts are timed in further steps that synchronize after each
part. The last line of stdout is JSON.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from bench import measure
from bench.step.cases import (
    LENGTHS,
    NUM_ROLLOUTS,
    SMALL_LENGTHS,
    Case,
    preset_case,
    random_case,
)
from bench.step.compare import measure_case
from bench.step.tables import engine_case_table
from bench.step.timing import Bench, child
from paint_engine.config.command_line import preset_names

MODELS = ("1.7b", "4b", "8b")
QUICK = ("--train.batch_size", "4", "--rollout.max_new_tokens", "24")


def environment(device: torch.device, command: str) -> dict[str, Any]:
    """Returns `measure.environment` with the versions of the libraries that train."""
    found = measure.environment(device, command)
    versions = {name: measure.version(name) for name in ("torch", "transformers", "peft", "trl")}
    named = {name: version for name, version in versions.items() if version}
    python = found["versions"]["python"]
    return {**found, "versions": {"python": python, **named, **measure.cuda_version()}}


def result_of(found: dict[str, Any], cases: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the JSON that the command prints; `found` is the environment."""
    return {"name": "engine", **found, "cases": list(cases)}


def cases_of(arguments: argparse.Namespace) -> list[Case]:
    cases = [preset_case(name, *(QUICK if arguments.quick else ())) for name in arguments.preset]
    for model in arguments.model:
        lengths = SMALL_LENGTHS if model == "small" else LENGTHS
        cases.append(random_case(model, lengths, arguments.rollouts))
    return cases


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.engine", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    presets, models = preset_names(), (*MODELS, "small")
    parser.add_argument(
        "--preset",
        nargs="+",
        choices=presets,
        default=[],
        metavar="PRESET",
        help="default on a CPU: tiny",
    )
    parser.add_argument(
        "--model",
        nargs="+",
        choices=models,
        default=[],
        help="random weights; default on a GPU: all but small",
    )
    parser.add_argument(
        "--rollouts", type=int, default=NUM_ROLLOUTS, help="rollouts per step of each --model"
    )
    parser.add_argument("--rounds", type=int, help="timed steps per loop")
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


def case_arguments(case: Case, arguments: argparse.Namespace) -> list[str]:
    """Returns the arguments of this command that select one of its cases on a CPU."""
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
            measured.append(measure_case(bench, arguments.rounds, case_arguments(case, arguments)))
        print(f"{engine_case_table(measured[-1])}\n", flush=True)
    command = " ".join(["python -m bench.engine", *argv])
    measure.emit(result_of(environment(device, command), measured), arguments.output)


if __name__ == "__main__":
    main(sys.argv[1:])
