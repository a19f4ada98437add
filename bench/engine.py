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
from paint_engine.cli import preset_names

MODELS = ("1.7b", "4b", "8b")
QUICK = ("--train.batch_size", "4", "--rollout.max_new_tokens", "24")


def environment(device: torch.device, command: str) -> dict[str, Any]:
    """With the versions of what trains."""
    found = measure.environment(device, command)
    versions = {name: measure.version(name) for name in ("torch", "transformers", "peft", "trl")}
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
