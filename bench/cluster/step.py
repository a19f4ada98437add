"""Predicts the time of a training step, part by part.

Operations are those that `--dry-run` counts, and micro-batches those that the engine plans. Every
rank waits for the slowest: with sharded weights in each pass, else at the end.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from bench.cluster.machine import Machine
from bench.cluster.rollouts import rollout_s
from bench.cluster.workload import Layout, Workload, waiting_s
from bench.step.cases import teacher_prompt_ids
from paint_engine.estimate.arithmetic import Scoring, rollout_flops
from paint_engine.training.microbatches import plan_microbatches
from paint_engine.types import TrainExample

PASSES = ("teacher", "student", "backward")
COMPUTED = (*PASSES, "loss")
PARTS = ("rollout", "sync", "rewards", "teacher", "student", "loss", "backward")
PARTS = (*PARTS, "collectives", "optimizer", "other")


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by part, and of the whole step: less than the sum if parts overlap."""

    parts: Mapping[str, float]
    step_s: float

    @property
    def train_s(self) -> float:
        """Seconds of what the training GPUs do after the rollouts."""
        return sum(self.parts.values()) - self.parts["rollout"] - self.parts["sync"]


def flops_of(work: Workload, group: Sequence[TrainExample]) -> dict[str, float]:
    """Returns the operations of one micro-batch by part, with the padding of its rows."""
    students = [len(one.rollout.prompt_ids) for one in group]
    teachers = [len(teacher_prompt_ids(one)) for one in group]
    completions = [len(one.rollout.completion_ids) for one in group]
    if work.padded:
        students, teachers = (
            [max(map(sum, zip(prompts, completions, strict=True))) - size for size in completions]
            for prompts in (students, teachers)
        )
    total: dict[str, float] = dict.fromkeys(COMPUTED, 0.0)
    for student, teacher, completion in zip(students, teachers, completions, strict=True):
        scoring = [Scoring(work.shape, teacher)]
        sizes = {"student_prompt": student, "completion": completion, "scoring": scoring}
        found = rollout_flops(work.config, work.shape, **sizes)
        total = {part: size + found[part] for part, size in total.items()}
    return total


@lru_cache(maxsize=256)
def planned_flops(work: Workload, num_ranks: int) -> list[list[dict[str, float]]]:
    """Returns the operations of each rank's micro-batches, by part."""
    limit = work.config.train.max_tokens_per_microbatch
    ranks = plan_microbatches(work.examples, limit, num_ranks, padded=work.padded)
    # A rank without rollouts runs one all the same.
    return [[flops_of(work, group or work.examples[:1]) for group in rank] for rank in ranks]


def _computed_s(machine: Machine, plan: list[list[dict[str, float]]], shards: int) -> list[dict]:
    """Returns the seconds of each part, one after the other: of each micro-batch if every rank
    waits for the others there, else of all together."""
    seconds = [
        [{part: machine.parts[part].seconds(flops[part]) for part in COMPUTED} for flops in rank]
        for rank in plan
    ]
    if shards > 1:
        return [
            {part: waiting_s([one[part] for one in place], machine.cores) for part in COMPUTED}
            for place in zip(*seconds, strict=True)
        ]
    by_part = {part: sum(one[part] for rank in seconds for one in rank) for part in COMPUTED}
    ranks = [sum(sum(one.values()) for one in rank) for rank in seconds]
    share = waiting_s(ranks, machine.cores) / sum(by_part.values())
    return [{part: share * total for part, total in by_part.items()}]


def collectives_s(
    machine: Machine, work: Workload, layout: Layout, computed: Sequence[Mapping[str, float]]
) -> float:
    """Returns the seconds in which ranks wait for weights and gradients.

    With sharded weights, each pass of a micro-batch gathers every layer, the next one while one
    computes, and the root once. Gradients of adapters are summed once per step.
    """
    layers, shards, copies = (
        work.shape.num_layers,
        layout.shards,
        layout.train_gpus // layout.shards,
    )
    layer_s = machine.gather_s(work.layers_bytes / layers, shards)
    seconds = machine.exchanges_s * (layout.train_gpus > 1)
    for place in computed if shards > 1 else ():
        seconds += machine.gather_s(work.root_bytes, shards)
        for part in PASSES:
            hidden_s = place[part] / layers if machine.overlaps else 0.0
            seconds += layer_s + (layers - 1) * max(0.0, layer_s - hidden_s)
    seconds += machine.gather_s(work.adapter_bytes, shards, layers if shards > 1 else 0)
    near = max(1, machine.per_node // shards)
    return seconds + machine.reduce_s(work.adapter_bytes / shards, copies, per_node=near)


def _sync_s(machine: Machine, work: Workload) -> float:
    """Returns the seconds in which the adapter is written, and read by every engine at once. The
    built-in sampler has the trainer's own weights."""
    return 0.0 if work.builtin else 2 * work.adapter_bytes / machine.host_bytes_per_s


def step_time(machine: Machine, work: Workload, layout: Layout, at_once: int) -> StepTime:
    """Predicts a step.

    at_once: rollouts that an engine decodes at once.
    """
    ranks, cores = layout.train_gpus, machine.cores
    computed = _computed_s(machine, planned_flops(work, ranks), layout.shards)
    rewards = [machine.rollout_s * len(work.rollouts[rank::ranks]) for rank in range(ranks)]
    trained = work.shape.trained_parameters / layout.shards
    parts = {
        "rollout": rollout_s(machine, work, layout, at_once),
        "sync": _sync_s(machine, work),
        "rewards": waiting_s(rewards, cores),
        **{part: sum(place[part] for place in computed) for part in COMPUTED},
        "collectives": collectives_s(machine, work, layout, computed),
        "optimizer": waiting_s([machine.optimizer.seconds(trained)] * ranks, cores),
        "other": waiting_s([machine.other_s] * ranks, cores),
    }
    parts = {part: parts[part] for part in PARTS}
    found = StepTime(parts, sum(parts.values()))
    if layout.ahead and layout.rollout_gpus:
        # On GPUs of their own, rollouts run beside the training. On the same GPUs, both take turns.
        together = max(parts["rollout"], found.train_s) + parts["sync"]
        return StepTime(parts, together)
    return found
