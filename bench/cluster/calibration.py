"""A CPU's rates, from steps of one process and from bare collectives.

Single processes take steps of three numbers of rollouts, as many of them at once as the predicted
step has. Each part's processor seconds are fitted by a constant per call and the part's operations.
The steps that several processes take together are not looked at.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bench.cluster.machine import Link, Machine, Rate
from bench.cluster.rollouts import batches, decoding_of, prefill_flops
from bench.cluster.step import COMPUTED, planned_flops
from bench.cluster.worker import LARGE_BYTES, SMALL_BYTES
from bench.cluster.workload import Workload
from bench.step.cases import Lengths

ROLLOUT_EXCHANGES = 2
"""exchanges of a step that have the rollouts: judged, and with the teacher's view"""


def fitted(columns: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    """Returns the coefficients, none below 0, of the columns that are nearest to the values by
    least squares of their relative errors. A column whose coefficient would be below 0 is left
    out."""
    weights = 1 / np.array(values)
    matrix = np.array(columns, dtype=float).T * weights[:, None]
    used = list(range(len(columns)))
    while True:
        found = np.linalg.lstsq(matrix[:, used], np.ones(len(values)), rcond=None)[0]
        if (found >= 0).all():
            break
        used.pop(int(found.argmin()))
    coefficients = [0.0] * len(columns)
    for place, value in zip(used, found, strict=True):
        coefficients[place] = float(value)
    return coefficients


def rate_of(fixed_s: float, seconds_per_flop: float) -> Rate:
    return Rate(1 / seconds_per_flop if seconds_per_flop else math.inf, fixed_s)


@dataclass(frozen=True)
class Calibration:
    """Steps of one process: by part, in processor seconds.

    works: the steps' rollouts. steps: what `Worker.parts` returned of each.
    """

    works: Sequence[Workload]
    steps: Sequence[Mapping[str, Any]]

    def _part(self, name: str) -> list[float]:
        return [step["parts_s"][name] for step in self.steps]

    def _passes(self) -> dict[str, Rate]:
        plans = [planned_flops(work, 1)[0] for work in self.works]
        calls, rates = [len(plan) for plan in plans], {}
        for part in COMPUTED:
            flops = [sum(group[part] for group in plan) for plan in plans]
            rates[part] = rate_of(*fitted([calls, flops], self._part(part)))
        return rates

    def _token(self, prefill: Rate) -> Rate:
        at_once = self.works[0].config.rollout.max_sequences
        flops = [
            [decoding_of(work, batch).flops for batch in batches(work, work.rollouts, at_once)]
            for work in self.works
        ]
        tokens = [sum(map(len, found)) for found in flops]
        sizes = [sum(float(one.sum()) for one in found) for found in flops]
        prompts = [prefill_flops(work, work.rollouts) for work in self.works]
        left = [
            seconds - prefill.seconds(size)
            for seconds, size in zip(self._part("rollout"), prompts, strict=True)
        ]
        return rate_of(*fitted([tokens, sizes], left))

    def machine(self, cores: int) -> Machine:
        """Returns the machine for one process, with links that take no time. The weights of a
        small model stay in the cores' caches: nothing is read from memory."""
        passes = self._passes()
        parts = passes | {"prefill": passes["teacher"]}
        numbers = [len(work.rollouts) for work in self.works]
        others = [step["step_s"] - sum(step["parts_s"].values()) for step in self.steps]
        other_s, rollout_s = fitted([[1.0] * len(numbers), numbers], others)
        return Machine(
            name="CPU",
            parts=parts,
            token=self._token(parts["prefill"]),
            read_bytes_per_s=math.inf,
            inside=Link(math.inf, 0.0),
            outside=Link(math.inf, 0.0),
            per_node=max(numbers),
            optimizer=Rate(math.inf, float(np.median(self._part("optimizer")))),
            host_bytes_per_s=math.inf,
            other_s=other_s,
            rollout_s=rollout_s,
            cores=cores,
            overlaps=False,
        )


def with_links(
    machine: Machine,
    work: Workload,
    bare: Mapping[str, float],
    num_ranks: int,
    exchanges: int,
    pass_s: float,
) -> Machine:
    """Returns the machine with the links between a number of processes.

    bare: what `Worker.collectives` returned. exchanges: number of a step's exchanges of objects.
    pass_s: of one token's pass in a single process, without FSDP's hooks.
    """
    share = (num_ranks - 1) / num_ranks
    seconds = bare["gather_large_s"] - bare["gather_small_s"]
    rate = share * (LARGE_BYTES - SMALL_BYTES) / seconds if seconds > 0 else math.inf
    latency_s = bare["gather_small_s"]
    if "layer_s" in bare:
        # FSDP copies the weights in and out, beside the collective.
        moved = share * work.layers_bytes / work.shape.num_layers
        latency_s = max(latency_s, bare["layer_s"] - moved / rate)
    link = Link(rate, latency_s)
    small = exchanges - ROLLOUT_EXCHANGES
    exchanges_s = small * bare["object_s"] + ROLLOUT_EXCHANGES * bare["rollouts_s"]
    # The built-in sampler has the weights gathered once.
    exchanges_s += bare.get("weights_s", 0.0)
    hooks_s = max(0.0, bare["pass_s"] - pass_s)
    token = machine.token._replace(fixed_s=machine.token.fixed_s + hooks_s)
    return replace(machine, token=token, inside=link, outside=link, exchanges_s=exchanges_s)


def workload_of(work: Workload, rollouts: Sequence[Sequence[int]]) -> Workload:
    """Returns a step of these rollouts: student's prompt, teacher's prompt, completion of each."""
    return replace(work, rollouts=tuple(Lengths(*sizes) for sizes in rollouts))
