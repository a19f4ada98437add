"""Predicts the time of a step's rollouts.

A decoding step of a batch takes the larger of two times: of its bytes (the weights once, and the
cache of every row), and of its operations; and a constant, and the all-reduces of tensor
parallelism. Engines work side by side, and the longest rollout decides.
"""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from bench.cluster.machine import Machine
from bench.cluster.workload import Layout, Workload, waiting_s
from bench.step.cases import Lengths
from paint_engine.estimate.arithmetic import forward_flops, token_flops
from paint_engine.estimate.memory import cache_row_bytes
from paint_engine.estimate.model_shape import ModelShape
from paint_engine.rollout.builtin import COMPACTION_SHARE


def kept_rows(live: Sequence[int]) -> list[int]:
    """Returns the rows that the built-in sampler computes at each token: it drops finished ones
    when they are a quarter of its rows.

    live: unfinished rows at each token.
    """
    rows, found = live[0], []
    for number in live:
        if number <= (1 - COMPACTION_SHARE) * rows:
            rows = number
        found.append(rows)
    return found


@lru_cache(maxsize=256)
def _cache_sizes(shape: ModelShape, longest: int, number_bytes: int) -> np.ndarray:
    """Returns (longest + 1,) bytes of a text's cache, by its length."""
    return np.array([cache_row_bytes(shape, size, number_bytes) for size in range(longest + 1)])


def _decoded(work: Workload, batch: Sequence[Lengths]) -> tuple[np.ndarray, ...]:
    """Returns, for each token of the longest completion, the number of rows that are computed, and
    the tokens and the bytes of their caches."""
    prompts = np.array([one.student_prompt for one in batch])
    place = np.arange(max(one.completion for one in batch))
    live = np.array([one.completion for one in batch])[:, None] > place
    lengths = prompts[:, None] + place
    sizes = _cache_sizes(work.shape, int(lengths.max()), work.number_bytes)
    if not work.builtin:
        return live.sum(0), (live * lengths).sum(0), (live * sizes[lengths]).sum(0)
    # Prompts are padded to the longest.
    rows, longest = np.array(kept_rows(live.sum(0).tolist())), lengths.max(0)
    return rows, rows * longest, rows * sizes[longest]


class Decoding(NamedTuple):
    """Work of a batch for each token of its longest completion."""

    rows: np.ndarray
    flops: np.ndarray
    read: np.ndarray
    """bytes of weights and caches"""


def decoding_of(work: Workload, batch: Sequence[Lengths]) -> Decoding:
    """Returns the work of decoding a batch, without its prompts."""
    shape = work.shape
    rows, cached, cache = _decoded(work, batch)
    weights = shape.active_parameters + shape.adapter_parameters + shape.head_parameters
    flops = token_flops(shape, 1, 0) * rows + token_flops(shape, 0, 1) * cached
    return Decoding(rows, flops, work.number_bytes * weights + cache)


def prefill_flops(work: Workload, batch: Sequence[Lengths]) -> float:
    """Returns the operations of a batch's prompts. The built-in sampler pads them."""
    longest = max(one.student_prompt for one in batch)
    prompts = [longest if work.builtin else one.student_prompt for one in batch]
    return sum(forward_flops(work.shape, size, adapters=True) for size in prompts)


def batches(work: Workload, rollouts: Sequence[Lengths], at_once: int) -> list[Sequence[Lengths]]:
    """Returns the rollouts that an engine decodes together: `at_once`, then as many more."""
    ordered = sorted(rollouts, key=lambda one: one.student_prompt) if work.builtin else rollouts
    return [ordered[start : start + at_once] for start in range(0, len(ordered), at_once)]


def batch_s(machine: Machine, work: Workload, batch: Sequence[Lengths], parallel: int) -> float:
    """Returns the seconds of rollouts that one engine decodes together.

    parallel: GPUs of the engine.
    """
    rows, flops, read = decoding_of(work, batch)
    tokens_s = np.maximum(read / machine.read_bytes_per_s, flops / machine.token.flops_per_s)
    # Two all-reduces per layer, of every row's hidden state.
    hidden = work.number_bytes * work.shape.hidden
    sums_s = sum(
        many * machine.reduce_s(number * hidden, parallel)
        for number, many in Counter(rows.tolist()).items()
    )
    return (
        machine.parts["prefill"].seconds(prefill_flops(work, batch) / parallel)
        + len(rows) * machine.token.fixed_s
        + float(tokens_s.sum()) / parallel
        + 2 * work.shape.num_layers * sums_s
    )


@lru_cache(maxsize=1024)
def engine_s(
    machine: Machine, work: Workload, share: tuple[Lengths, ...], parallel: int, at_once: int
) -> float:
    """Returns the seconds of one engine's rollouts; those above `at_once` wait for the others."""
    return sum(batch_s(machine, work, one, parallel) for one in batches(work, share, at_once))


def rollout_s(machine: Machine, work: Workload, layout: Layout, at_once: int) -> float:
    """Returns the seconds until the last engine has sampled its share of the rollouts.

    at_once: rollouts that an engine decodes at once.
    """
    number, parallel = layout.num_engines, layout.tensor_parallel
    shares = [work.rollouts[place::number] for place in range(number)]
    # An engine without a rollout waits.
    taken = [
        engine_s(machine, work, share, parallel, at_once) if share else 0.0 for share in shares
    ]
    seconds = waiting_s(taken, machine.cores)
    if work.builtin and layout.shards > 1:
        # It samples with whole weights, which it gathers first.
        whole = work.layers_bytes + work.root_bytes
        seconds += machine.gather_s(whole, layout.shards, work.shape.num_layers + 1)
    return seconds
