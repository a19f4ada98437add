"""The launches of the kernels for losses on the teacher's top-k, recorded without running them."""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from bench.kernels.launches import Launch, recorded
from bench.losses import QWEN3_VOCAB_SIZE
from paint_kernels import _triton_topk as launchers

NUM_TOKENS, NUM_HEAD_ROWS, HIDDEN = 4, 16, 4096
"""as few tokens as keep every tensor aligned to 16 bytes, and rows of the head of which each has
about as many ids as one of Qwen3's of 32,768 tokens: 16 of 64 ids a token"""
FULL, HALF = torch.float32, torch.bfloat16
KERNELS = tuple(name for name in vars(launchers.kernels) if name.endswith("_kernel"))


def some_ids(num_ids: int) -> Tensor:
    """Returns (N, K) ids. Neighbours differ."""
    return (torch.arange(NUM_TOKENS * num_ids) % NUM_HEAD_ROWS).view(NUM_TOKENS, num_ids)


def gathered_logits(dtype: torch.dtype, num_ids: int, width: int = HIDDEN) -> None:
    hidden = torch.zeros(NUM_TOKENS, width, dtype=dtype)
    weight = torch.zeros(NUM_HEAD_ROWS, width, dtype=dtype)
    launchers.gathered_logits(hidden, weight, some_ids(num_ids))


def hidden_gradient(
    dtype: torch.dtype, num_ids: int, *, with_tail: bool, width: int = HIDDEN
) -> None:
    values, ids = torch.zeros(NUM_TOKENS, num_ids), some_ids(num_ids)
    weight = torch.zeros(NUM_HEAD_ROWS, width, dtype=dtype)
    rest = (torch.zeros(NUM_TOKENS, width), torch.zeros(NUM_TOKENS)) if with_tail else None
    out = torch.zeros(NUM_TOKENS, width, dtype=dtype)
    launchers.hidden_gradient(values, weight, ids, rest, out)


def head_gradient(dtype: torch.dtype, num_ids: int) -> None:
    values, ids = torch.zeros(NUM_TOKENS, num_ids), some_ids(num_ids)
    hidden = torch.zeros(NUM_TOKENS, HIDDEN, dtype=dtype)
    launchers.add_head_gradient(values, hidden, ids, torch.zeros(NUM_HEAD_ROWS, HIDDEN))


def softmax(gradient: torch.dtype, width: int = QWEN3_VOCAB_SIZE) -> None:
    logits = torch.zeros(NUM_TOKENS, width)
    out = torch.zeros(NUM_TOKENS, width, dtype=gradient)
    launchers.softmax_rows(logits, torch.zeros(NUM_TOKENS), 1.1, out, 256.0)


CALLS: dict[str, Callable[[], None]] = {
    "bf16, k 64": partial(gathered_logits, HALF, 64),
    "bf16, k 50": partial(gathered_logits, HALF, 50),
    "bf16, k 1": partial(gathered_logits, HALF, 1),
    "bf16, k 64, ragged": partial(gathered_logits, HALF, 64, HIDDEN - 1),
    "fp32, k 64": partial(gathered_logits, FULL, 64),
    "bf16 head, with a tail": partial(hidden_gradient, HALF, 64, with_tail=True),
    "bf16 head": partial(hidden_gradient, HALF, 64, with_tail=False),
    "bf16 head, k 50": partial(hidden_gradient, HALF, 50, with_tail=False),
    "bf16 head, ragged": partial(hidden_gradient, HALF, 64, with_tail=False, width=HIDDEN - 1),
    "fp32 head, with a tail": partial(hidden_gradient, FULL, 64, with_tail=True),
    "head's gradient, bf16 hidden": partial(head_gradient, HALF, 64),
    "head's gradient, fp32 hidden": partial(head_gradient, FULL, 64),
    "fp32 logits, fp16 result": partial(softmax, torch.float16),
    "fp32 logits, fp32 result": partial(softmax, FULL),
    "fp32 logits, fp16 result, ragged": partial(softmax, torch.float16, QWEN3_VOCAB_SIZE - 1),
}


def counted(launch: Launch) -> Launch:
    """Adds the number of entries: logits of the softmax, else those of the row of the head, or of
    the hidden state, that each id takes. Programs are short: all of their instructions count."""
    name, settings = launch.kernel.__name__, launch.settings
    if name == "softmax_kernel":
        per_token, iterations = settings["num_columns"], 0
    elif name == "gathered_logits_kernel":
        per_token = settings["num_ids"] * settings["width"]
        iterations = math.ceil(settings["width"] / settings["BLOCK"])
    else:
        bounds, indices = launch.arguments[:2]
        per_token = len(indices) // NUM_TOKENS * settings["width"]
        # Every row of the result has as many ids.
        iterations = math.ceil(int(bounds[1]) / settings["ENTRIES"])
    return launch._replace(
        passes=("softmax" if name == "softmax_kernel" else "product",),
        num_entries=NUM_TOKENS * per_token,
        num_tokens=NUM_TOKENS,
        iterations=iterations,
    )


def topk_launches() -> Iterator[tuple[str, Launch]]:
    """Yields the name of every variant and what the launcher passes to its kernel."""
    for name, call in CALLS.items():
        yield name, counted(recorded(launchers, call))
