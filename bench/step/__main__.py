"""Measures steps with external teachers, two losses and a server's scores, beside what the dry run
predicts for them: `python -m bench.step --output bench/results/step-estimates-cpu.json`.

A dry run counts operations. Divided by the rate of the plain step, with the base as the teacher,
they are a time; the other cases are compared with it. The last line of stdout is JSON.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from bench import measure
from bench.step.estimates import CASES, Sizes, measure_estimates
from bench.step.tables import estimates_table


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.step", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each case")
    parser.add_argument("--quick", action="store_true", help="two short rollouts a step")
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args(argv)
    transformers_logging.disable_progress_bar()
    sizes = Sizes(rollouts=8, completion=8) if arguments.quick else Sizes()
    with tempfile.TemporaryDirectory() as folder:
        found = measure_estimates(arguments.cases, sizes, arguments.rounds, Path(folder))
    command = " ".join(["python -m bench.step", *argv])
    environment = measure.environment(torch.device("cpu"), command)
    result = {"name": "step_estimates", **environment, **found}
    print(f"{estimates_table(result)}\n", flush=True)
    measure.emit(result, arguments.output)


if __name__ == "__main__":
    main(sys.argv[1:])
