"""Measures how `paint_loss` scales with the number of tokens.

N doubles from 4096 to 131072, in rollouts of 1024 tokens and as one rollout: on a GPU at the shape
of Qwen3-8B in bfloat16, on a CPU at H = 64, V = 4096 in float32. Extra memory is the peak that the
forward and backward passes allocate. The float32 gradient rows (N, H) and the values per token have
to grow with N; the rest, the working memory, should not. The exponent of time is the slope of a
least-squares line in log N and log time. The last line of stdout is JSON.
"""

import argparse
import functools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench import measure
from bench.losses import (
    PAINT,
    QWEN3_HIDDEN,
    QWEN3_VOCAB_SIZE,
    Shape,
    gradients,
    make_inputs,
    our_loss,
)
from bench.measure import dtype_on, progress

NUM_TOKENS = [4096 * 2**doubling for doubling in range(6)]
ROLLOUT_TOKENS = 1024
CPU_HIDDEN, CPU_VOCAB_SIZE = 64, 4096
VALUE_BYTES = 6 * 4 + 1
"""per token: six float32 values and one bool for the selection"""


def kept_bytes(shape: Shape) -> int:
    """Returns the bytes of the float32 gradient rows and the values per token, kept for the
    backward pass."""
    return shape.num_tokens * (4 * shape.hidden + VALUE_BYTES)


def forward_backward(shape: Shape, device: torch.device) -> functools.partial[Any]:
    inputs = make_inputs(shape, device, dtype_on(device))
    return functools.partial(gradients, functools.partial(our_loss, objective=PAINT), inputs)


def extra_bytes(shape: Shape, device: torch.device) -> int:
    """Returns the peak memory of one call; on a CPU measured in its own process."""
    if device.type == "cuda":
        return measure.extra_bytes_on_gpu(forward_backward(shape, device))[0]
    command = [sys.executable, "-m", "bench.scaling", "--device", "cpu", "--child"]
    command += ["--num-tokens", str(shape.num_tokens), "--vocab-size", str(shape.vocab_size)]
    command += ["--rollout-tokens", str(shape.rollout_tokens), "--hidden", str(shape.hidden)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.split()[-1])


def measure_point(shape: Shape, device: torch.device, repeats: int) -> dict[str, Any]:
    extra = extra_bytes(shape, device)
    call = forward_backward(shape, device)
    if device.type == "cuda":
        times = measure.times_on_gpu(call, device, seconds=1.5)
    else:
        times = measure.times_round_robin({"": call}, device, repeats)[""]
    progress(f"N {shape.num_tokens}, rollouts of {shape.rollout_tokens}: {min(times):.3f} s")
    return {
        "num_tokens": shape.num_tokens,
        "rollout_tokens": shape.rollout_tokens,
        "extra_bytes": extra,
        "kept_bytes": kept_bytes(shape),
        "working_bytes": extra - kept_bytes(shape),
        **measure.summary_of_times(times),
    }


def fitted_exponent(points: list[dict[str, Any]]) -> float:
    """Returns the exponent a of time = b N^a, by least squares on the logarithms."""
    x = [math.log(point["num_tokens"]) for point in points]
    y = [math.log(point["median_ms"]) for point in points]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def layout(name: str, points: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "layout": name,
        "points": points,
        "time_exponent": fitted_exponent(points),
        "memory_ratio": points[-1]["working_bytes"] / points[0]["working_bytes"],
    }


def run(
    num_tokens: list[int],
    rollout_tokens: int,
    hidden: int,
    vocab_size: int,
    device: torch.device,
    repeats: int,
    command: str,
) -> dict[str, Any]:
    """Measures both layouts; returns the JSON that the command prints."""
    layouts = []
    for name, one_rollout in ((f"rollouts of {rollout_tokens}", False), ("one rollout", True)):
        shapes = [
            Shape("scaling", n, n if one_rollout else rollout_tokens, hidden, vocab_size)
            for n in num_tokens
        ]
        points = [measure_point(shape, device, repeats) for shape in shapes]
        layouts.append(layout(name, points))
    return {
        "name": "scaling",
        **measure.environment(device, command),
        "hidden": hidden,
        "vocab_size": vocab_size,
        "dtype": str(dtype_on(device)).removeprefix("torch."),
        "layouts": layouts,
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.scaling", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--num-tokens", type=int, nargs="+", default=NUM_TOKENS)
    parser.add_argument("--rollout-tokens", type=int, default=ROLLOUT_TOKENS)
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--vocab-size", type=int)
    parser.add_argument(
        "--repeats", type=int, default=3, help="timed calls on a CPU, after one warm-up call"
    )
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    on_gpu = torch.cuda.is_available() and arguments.device != "cpu"
    device = torch.device("cuda" if on_gpu or arguments.device == "cuda" else "cpu")
    hidden = arguments.hidden or (QWEN3_HIDDEN["8b"] if on_gpu else CPU_HIDDEN)
    vocab_size = arguments.vocab_size or (QWEN3_VOCAB_SIZE if on_gpu else CPU_VOCAB_SIZE)
    if arguments.child:
        num_tokens, rollout_tokens = arguments.num_tokens[0], arguments.rollout_tokens
        forward_backward(Shape("scaling", 16, 8, hidden, vocab_size), device)()
        call = forward_backward(
            Shape("scaling", num_tokens, rollout_tokens, hidden, vocab_size), device
        )
        print(measure.extra_bytes_on_cpu(call))
        return
    result = run(
        arguments.num_tokens,
        arguments.rollout_tokens,
        hidden,
        vocab_size,
        device,
        arguments.repeats,
        " ".join(["python -m bench.scaling", *argv]),
    )
    measure.emit(result, arguments.output)


if __name__ == "__main__":
    main(sys.argv[1:])
