"""Checks everything that needs a GPU, in eight minutes.

    python -m bench.gpu_check                          # all parts; results in bench/results/
    python -m bench.gpu_check --parts tests,kernels
    python -m bench.gpu_check --quick --device cpu     # a smoke test; results in runs/gpu-check/

Parts: `environment` (versions, copy bandwidth, GEMM rate), `tests` (those of paint_kernels),
`waits` (no synchronization with the device, offsets past 2^31), `kernels` (the most important
shapes of bench.kernels), `steps` (training at Qwen3-1.7B's shape), `engine` (the engine's step,
plain PyTorch's loss and TRL at Qwen3's shapes), `questions` (tile sizes, chunk sizes and other open
choices).

Each part is a process with its own time limit, so that a failure does not affect the others; unused
time is passed on to the next part. The results are written to gpu-check-<device>.json after each
part, and a table is printed at the end. The exit status is 1 if a part failed or was stopped.

Requires torch, triton, transformers, peft, safetensors, numpy and pytest. Optional: rich for the
table, hypothesis for some tests, paint_engine's dependencies for `engine`, and the peers.
"""

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch

from bench.gpu import parts
from bench.gpu.job import describe_environment
from bench.measure import ROOT

TOTAL_SECONDS = 460.0
"""for all parts; with the starts of processes and the table this stays below eight minutes"""


def print_table(rows: list[dict[str, Any]]) -> None:
    cells = [(r["part"], r["status"], r["text"], f"{r['seconds']:.0f}") for r in rows]
    heads = ("part", "status", "result", "seconds")
    if importlib.util.find_spec("rich") is None:
        print("rich is not installed (pip install rich): printing a plain table")
        for part, status, text, seconds in (heads, *cells):
            print(f"{part:12} {status:8} {seconds:>7}  {text}")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*heads, show_lines=True)
    for row in cells:
        table.add_row(*map(Text, row))
    # Without a terminal rich uses 80 columns, which leaves too few for the text.
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def parse(argv: list[str]) -> argparse.Namespace:
    names = [part.name for part in parts.PARTS]
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_check", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--parts",
        help=f"comma-separated; of {', '.join(names)} (default: all)",
        default=",".join(names),
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes and one test in twenty")
    parser.add_argument("--output", type=Path, help="directory of the results")
    parser.add_argument(
        "--seconds", type=float, default=TOTAL_SECONDS, help="time limit of all parts"
    )
    return parser.parse_args(argv)


def settings_of(arguments: argparse.Namespace, command: str) -> parts.Settings:
    """Returns the settings that the arguments ask for; ValueError if there is no GPU to use."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device cuda: this machine has no usable CUDA device; use `--device cpu --quick` to "
            "try the command, or `python -m bench.kernels` to measure on a CPU"
        )
    device = torch.device(arguments.device)
    is_trial = arguments.quick or arguments.device == "cpu"
    default = ROOT / ("runs/gpu-check" if is_trial else "bench/results")
    output = (arguments.output or default).resolve()
    output.mkdir(parents=True, exist_ok=True)
    environment = describe_environment(device, command)
    return parts.Settings(device, arguments.quick, output, arguments.seconds, environment)


def main(argv: list[str]) -> int:
    arguments = parse(argv)
    settings = settings_of(arguments, " ".join(["python -m bench.gpu_check", *argv]))
    rows = parts.run_parts(parts.chosen_parts(arguments.parts), settings)
    print_table(rows)
    print(f"results: {parts.result_file(settings)}")
    return 1 if any(row["status"] in ("failed", "stopped") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
