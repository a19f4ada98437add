"""Compares the fused losses with bare GEMMs, plain PyTorch and peers.

    python -m bench.kernels                     # on a GPU if there is one, else on the CPU
    OMP_NUM_THREADS=2 python -m bench.kernels --device cpu --output bench/results/kernels-cpu.json
    python -m bench.kernels --model 8b --num-tokens 32768 --seconds-budget 120

It reports time, extra memory and gradient error. On a GPU it uses Qwen3's head shapes in bfloat16
and rollouts of 1024 tokens, on a CPU float32, H = 256 and eight rollouts of 64 tokens. The variants
of a group compute the same loss and gradient from the same inputs. `gemms`, the floor, runs only
the matrix products, in the same dtypes and in chunks large enough for full speed. A variant is
timed only if its gradient agrees with float64 in the same run. Progress goes to stderr; the last
line of stdout is JSON.
"""

import argparse
import sys
from pathlib import Path

import torch

from bench import measure
from bench.kernels.compare import (
    CPU_NUM_TOKENS,
    GPU_NUM_TOKENS,
    GROUPS,
    HIDDEN,
    all_variants,
    child,
    choose,
    make_shape,
    run,
)
from bench.losses import MIXTURES, QWEN3_VOCAB_SIZE


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument(
        "--model",
        nargs="+",
        choices=list(HIDDEN),
        help="default: cpu on a CPU, Qwen3's sizes on a GPU",
    )
    parser.add_argument("--num-tokens", type=int, nargs="+")
    parser.add_argument("--vocab-size", type=int, default=QWEN3_VOCAB_SIZE)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="by the names in the tables")
    parser.add_argument("--lengths", choices=MIXTURES, help="of the rollouts; default: equal")
    parser.add_argument("--seconds-budget", type=float, default=float("inf"))
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = arguments.device == "cuda"
    arguments.model = arguments.model or (["1.7b", "4b", "8b"] if on_gpu else ["cpu"])
    arguments.num_tokens = arguments.num_tokens or (GPU_NUM_TOKENS if on_gpu else CPU_NUM_TOKENS)
    return arguments


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    device = torch.device(arguments.device)
    shapes = [
        make_shape(model, num_tokens, arguments.vocab_size, arguments.lengths or "")
        for model in arguments.model
        for num_tokens in arguments.num_tokens
    ]
    if arguments.child:
        child(arguments.child, shapes[0], device)
        return
    variants = choose(all_variants(device), arguments.groups, arguments.variants)
    command = " ".join(["python -m bench.kernels", *argv])
    result = run(shapes, variants, device, arguments.seconds_budget, command)
    for name in ("time_ratio", "memory_ratio"):
        if name in result:
            print(f"{name}, paint_loss over plain PyTorch: {result[name]:.3f}")
    measure.emit(result, arguments.output)


if __name__ == "__main__":
    main(sys.argv[1:])
