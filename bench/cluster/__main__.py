"""Predicts a training step on 1 to 64 GPUs, and the best split between rollouts and training.

    python -m bench.cluster --output bench/results/cluster.json
    python -m bench.cluster --cpu --output bench/results/cluster-cpu.json

Nothing runs on a GPU: operations and bytes are counted and divided by published and assumed rates
(bench.cluster.machine). With --cpu, the same prediction is made of steps of 1, 2 and 4 processes on
this machine, which are measured beside it. The last line of stdout is JSON.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from bench import measure
from bench.cluster import measured
from bench.cluster.machine import GPUS, constants, gpu_machine
from bench.cluster.splits import MODELS, NUM_GPUS, changed_bests, loss_rate, splits_of, workload
from bench.cluster.tables import SHOWN_GPUS, cpu_table, gpus_table, splits_of_number
from bench.losses import EQUAL, MIXTURES
from bench.step.cases import LENGTHS, Lengths


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {text}, needs 1 or more")
    return number


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m bench.cluster", description=(__doc__ or "").split("\n")[0]
    )
    found.add_argument("--gpu", choices=list(GPUS), default="h100")
    found.add_argument("--model", choices=list(MODELS), default="qwen3-8b")
    found.add_argument("--rollouts", type=positive, default=32, help="rollouts per step")
    found.add_argument(
        "--lengths", choices=MIXTURES, default=EQUAL, help="tokens of the completions"
    )
    found.add_argument("--student-prompt", type=positive, default=LENGTHS.student_prompt)
    found.add_argument("--teacher-prompt", type=positive, default=LENGTHS.teacher_prompt)
    found.add_argument("--gpus", type=positive, nargs="+", default=list(NUM_GPUS))
    found.add_argument(
        "--cpu", action="store_true", help="measure and predict steps of 1, 2 and 4 processes here"
    )
    found.add_argument(
        "--rounds", type=positive, default=12, help="of --cpu: measured steps of each number"
    )
    found.add_argument(
        "--shards",
        choices=measured.SHARDS,
        nargs="+",
        default=list(measured.SHARDS[:1]),
        help="of --cpu: the weights of several processes",
    )
    found.add_argument("--output", type=Path, help="also write the JSON to this file")
    return found


def predict(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the result's JSON."""
    gpu, model = GPUS[arguments.gpu], arguments.model
    prompts = Lengths(arguments.student_prompt, arguments.teacher_prompt, 0)
    work = workload(model, arguments.rollouts, arguments.lengths, prompts)
    machine = gpu_machine(gpu, loss_rate(model, gpu, work))
    rows = [row for number in arguments.gpus for row in splits_of(number, work, machine, gpu)]
    shown = SHOWN_GPUS in arguments.gpus
    return {
        "name": "cluster",
        "gpu": arguments.gpu,
        "model": model,
        "num_rollouts": arguments.rollouts,
        "lengths": arguments.lengths,
        "num_tokens": work.num_tokens,
        "student_prompt": prompts.student_prompt,
        "teacher_prompt": prompts.teacher_prompt,
        "constants": {name: one._asdict() for name, one in constants(gpu).items()},
        "rows": rows,
        "changes": changed_bests(SHOWN_GPUS, model, work, gpu) if shown else [],
    }


def main(argv: Sequence[str]) -> None:
    arguments = parser().parse_args(argv)
    command = " ".join(["python -m bench.cluster", *argv])
    transformers_logging.disable_progress_bar()
    environment = measure.environment(torch.device("cpu"), command)
    if arguments.cpu:
        torch.set_num_threads(1)
        environment["num_threads"] = 1
        found = {
            "name": "cluster_cpu",
            **environment,
            **measured.measure(arguments.rounds, arguments.shards),
        }
        print(f"{cpu_table(found)}\n", flush=True)
        measure.emit(found, arguments.output)
        return
    result = {**predict(arguments), **environment}
    for num_gpus in arguments.gpus:
        print(f"{splits_of_number(result, num_gpus)}\n")
    print(f"{gpus_table(result)}\n", flush=True)
    measure.emit(result, arguments.output)


if __name__ == "__main__":
    main(sys.argv[1:])
