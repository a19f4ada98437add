"""Everything that a GPU is needed for, once, within eight minutes: `python -m bench.gpu_check`.

    python -m bench.gpu_check                          # all parts, results into bench/results/
    python -m bench.gpu_check --parts tests,kernels
    python -m bench.gpu_check --quick --device cpu     # a smoke run, results into runs/gpu-check/

Parts: `environment` (versions, copy bandwidth, GEMM rate), `tests` (of paint_kernels), `waits` (no
wait for the device, offsets past 2^31), `kernels` (the shapes of bench.kernels that matter most),
`steps` (training at Qwen3-1.7B's shape), `engine` (the engine's own step, plain PyTorch's loss and
TRL at Qwen3's shapes), `questions` (tile sizes, chunk sizes, and so on). Each is a process of its
own with a time limit, so that none takes the others with it; time that one leaves is passed on. One
table is printed at the end, and everything found is written to gpu-check-<device>.json after each
part. The exit status is 1 where a part failed or was stopped. It needs torch, triton, transformers,
peft, safetensors, numpy and pytest; rich draws the table, hypothesis is needed by the tests, what
paint_engine imports by `engine`, and other projects are compared with where installed.
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
"""of all parts; the table and the starts of processes fit into eight minutes beside them"""


def print_table(rows: list[dict[str, Any]]) -> None:
    cells = [(r["part"], r["status"], r["text"], f"{r['seconds']:.0f}") for r in rows]
    heads = ("part", "status", "result", "seconds")
    if importlib.util.find_spec("rich") is None:
        print("rich is not installed (pip install rich): a plain table")
        for part, status, text, seconds in (heads, *cells):
            print(f"{part:12} {status:8} {seconds:>7}  {text}")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*heads, show_lines=True)
    for row in cells:
        table.add_row(*map(Text, row))
    # Without a terminal rich takes 80 columns, of which too few are left for the text.
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def parse(argv: list[str]) -> argparse.Namespace:
    names = [part.name for part in parts.PARTS]
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--parts", help=f"some of {','.join(names)}", default=",".join(names))
    parser.add_argument("--quick", action="store_true", help="tiny sizes and few tests")
    parser.add_argument("--output", type=Path, help="folder of the results")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="for all parts")
    return parser.parse_args(argv)


def settings_of(arguments: argparse.Namespace, command: str) -> parts.Settings:
    """ValueError for a GPU that is not there."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "this machine has no usable CUDA device: `--device cpu --quick` tries the command "
            "itself, python -m bench.kernels measures on a CPU."
        )
    device = torch.device(arguments.device)
    on_trial = arguments.quick or arguments.device == "cpu"
    default = ROOT / ("runs/gpu-check" if on_trial else "bench/results")
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
