"""Trains for a long time, under SIGKILLs and beside second starts, and reports what goes wrong.

    python -m bench.soak --output bench/results/soak-cpu.json      # half an hour on two cores
    python -m bench.soak --parts kills --num-kills 10

Parts: `steps`, 1,000 steps whose memory, files and processes are counted from outside; `kills`,
runs that are killed at random moments and resumed, which must end as undisturbed ones, bit for bit;
`starts`, a second process in a live run's directory, of which one must be refused. Every run is
`paint_engine.train` at the smallest size. Parts that are in the output file already, and are not
run again, stay there. The exit status is 1 if a part failed. Progress goes to stderr; the last line
of stdout is JSON. It needs /proc, and psutil, which comes with peft.
"""

import argparse
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench import measure
from bench.soak import kills, starts, steps
from bench.soak.launch import write_problems

NUM_STEPS = {"steps": 1000, "kills": 40, "starts": 120}
"""of the runs of each part; long enough that a second start comes before the end"""
PARTS = tuple(NUM_STEPS)
SAMPLE_EVERY = 5


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.soak", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--num-steps", type=int, help="of each run; default: by the part")
    parser.add_argument("--num-kills", type=int, default=50)
    parser.add_argument("--num-starts", type=int, default=10)
    parser.add_argument("--seed", type=int, help="of the random moments; default: a new one")
    parser.add_argument(
        "--output", type=Path, help="also write the JSON to this file; its other parts stay"
    )
    arguments = parser.parse_args(argv)
    if arguments.seed is None:
        arguments.seed = random.SystemRandom().randrange(2**31)
    return arguments


def command_of(name: str, arguments: argparse.Namespace) -> str:
    """Returns the command that runs one part again."""
    flags = ["--parts", name]
    if arguments.num_steps is not None:
        flags += ["--num-steps", str(arguments.num_steps)]
    if name != "steps":
        flags += [f"--num-{name}", str(getattr(arguments, f"num_{name}"))]
        flags += ["--seed", str(arguments.seed)]
    return " ".join(["python -m bench.soak", *flags])


def run_part(name: str, arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    num_steps, seed = arguments.num_steps or NUM_STEPS[name], arguments.seed
    if name == "steps":
        return steps.measure(directory, num_steps, SAMPLE_EVERY)
    if name == "kills":
        return kills.measure(directory, arguments.num_kills, num_steps, seed)
    return starts.measure(directory, arguments.num_starts, num_steps, seed)


def main(argv: list[str]) -> int:
    arguments = parse(argv)
    environment = measure.environment(torch.device("cpu"), "")
    del environment["num_threads"]
    parts = {}
    if arguments.output and arguments.output.exists():
        parts = json.loads(arguments.output.read_text())["parts"]
    for name in arguments.parts:
        with tempfile.TemporaryDirectory(prefix="soak-") as directory:
            write_problems(Path(directory))
            load = os.getloadavg()[0]
            found = run_part(name, arguments, Path(directory))
        command = command_of(name, arguments)
        parts[name] = {**environment, "command": command, "load_before": load, **found}
        measure.progress(f"{name}: {'passed' if found['passed'] else 'FAILED'}")
    ordered = {name: parts[name] for name in PARTS if name in parts}
    measure.emit({"name": "soak", "parts": ordered}, arguments.output)
    return 0 if all(parts[name]["passed"] for name in arguments.parts) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
