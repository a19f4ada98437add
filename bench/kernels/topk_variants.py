"""The launches of the kernels for losses on the teacher's top-k, recorded without running them."""

from collections.abc import Callable, Iterator

import torch

from bench.kernels.compiled import Launch, recorded
from bench.losses import QWEN3_VOCAB_SIZE
from paint_kernels import _triton_topk as launchers

NUM_TOKENS, NUM_HEAD_ROWS, HIDDEN = 4, 8, 4096
"""as few tokens and rows of the head as keep every tensor aligned to 16 bytes"""
FULL, HALF = torch.float32, torch.bfloat16
KERNELS = tuple(name for name in vars(launchers.kernels) if name.endswith("_kernel"))


def gathered_logits(dtype: torch.dtype, num_ids: int) -> None:
    ids = torch.zeros(NUM_TOKENS, num_ids, dtype=torch.int64)
    hidden = torch.zeros(NUM_TOKENS, HIDDEN, dtype=dtype)
    launchers.gathered_logits(hidden, torch.zeros(NUM_HEAD_ROWS, HIDDEN, dtype=dtype), ids)


def hidden_gradient(dtype: torch.dtype, num_ids: int, with_tail: bool) -> None:
    values = torch.zeros(NUM_TOKENS, num_ids)
    weight = torch.zeros(NUM_HEAD_ROWS, HIDDEN, dtype=dtype)
    rest = (torch.zeros(NUM_TOKENS, HIDDEN), torch.zeros(NUM_TOKENS)) if with_tail else None
    out = torch.zeros(NUM_TOKENS, HIDDEN, dtype=dtype)
    launchers.hidden_gradient(values, weight, values.long(), rest, out)


def head_gradient(dtype: torch.dtype, num_ids: int) -> None:
    values = torch.zeros(NUM_TOKENS, num_ids)
    hidden = torch.zeros(NUM_TOKENS, HIDDEN, dtype=dtype)
    out = torch.zeros(NUM_HEAD_ROWS, HIDDEN)
    launchers.add_head_gradient(values, hidden, values.long(), out)


def softmax(gradient: torch.dtype) -> None:
    logits = torch.zeros(NUM_TOKENS, QWEN3_VOCAB_SIZE)
    out = torch.zeros(NUM_TOKENS, QWEN3_VOCAB_SIZE, dtype=gradient)
    launchers.softmax_rows(logits, torch.zeros(NUM_TOKENS), 1.1, out, 256.0)


CALLS: dict[str, Callable[[], None]] = {
    "bf16, k 64": lambda: gathered_logits(HALF, 64),
    "bf16, k 50": lambda: gathered_logits(HALF, 50),
    "bf16, k 1": lambda: gathered_logits(HALF, 1),
    "fp32, k 64": lambda: gathered_logits(FULL, 64),
    "bf16 head, with a tail": lambda: hidden_gradient(HALF, 64, True),
    "bf16 head": lambda: hidden_gradient(HALF, 64, False),
    "fp32 head, with a tail": lambda: hidden_gradient(FULL, 64, True),
    "head's gradient, bf16 hidden": lambda: head_gradient(HALF, 64),
    "head's gradient, fp32 hidden": lambda: head_gradient(FULL, 64),
    "fp32 logits, fp16 result": lambda: softmax(torch.float16),
    "fp32 logits, fp32 result": lambda: softmax(FULL),
}


def topk_launches() -> Iterator[tuple[str, Launch]]:
    """Yields the name of every variant and what the launcher passes to its kernel."""
    for name, call in CALLS.items():
        yield name, recorded(launchers, call)
