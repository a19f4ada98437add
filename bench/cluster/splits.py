"""The splits of a number of GPUs between rollouts and training, their predicted steps, and the
best of them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from bench.cluster.machine import SHARE, Gpu, Machine, Rate, constants, gpu_machine
from bench.cluster.step import StepTime, step_time
from bench.cluster.workload import Layout, Workload
from bench.floor import loss as floor_loss
from bench.floor.work import NUM_TOKENS
from bench.losses import EQUAL, drawn_lengths
from bench.step.cases import LENGTHS, RANDOM_MODELS, Lengths, random_config
from paint_engine.config.command_line import load_config
from paint_engine.config.schema import Config
from paint_engine.estimate import memory
from paint_engine.estimate.arithmetic import Scoring, loss_flops
from paint_engine.estimate.memory import GIB, cache_row_bytes, estimate_memory
from paint_engine.estimate.model_shape import ModelShape, shape_of
from paint_engine.model.lora import add_lora
from paint_engine.recipes import recipe_of

MODELS = {f"qwen3-{name}": name for name in RANDOM_MODELS if name != "small"}
NUM_GPUS = (1, 2, 4, 8, 16, 32, 64)
LONGEST_PROMPTS = (400, 3000)
"""student's and teacher's, for the memory: as the table of docs/cluster.md has them"""
SERVER_SHARE = 0.9
"""of a GPU's memory that a vLLM server takes, its default"""
ROLLOUT_GPUS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 40, 48, 56)
SHARED, SPLIT, AHEAD = "shared", "split", "split, ahead"
MODES = (SHARED, SPLIT, AHEAD)


def shape_of_model(model: str, config: Config) -> ModelShape:
    """Returns the sizes of a model of MODELS with the configuration's adapters."""
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(random_config(MODELS[model]), dtype=torch.bfloat16)
        return shape_of(add_lora(base, config.lora, 0))


def workload(
    model: str, num_rollouts: int, mixture: str = EQUAL, prompts: Lengths = LENGTHS
) -> Workload:
    """Returns a step of the model's PAINT preset.

    mixture: of bench.losses.MIXTURES, the completions' lengths, cut at `rollout.max_new_tokens`.
    prompts: lengths of both prompts.
    """
    arguments = ["--preset", f"paint-{model}", "--train.batch_size", str(num_rollouts)]
    config = load_config([*arguments, "--rollout.engine", "vllm"]).config
    drawn, most = drawn_lengths(mixture), config.rollout.max_new_tokens
    rollouts = tuple(
        Lengths(prompts.student_prompt, prompts.teacher_prompt, min(most, next(drawn)))
        for _ in range(num_rollouts)
    )
    return Workload(config, shape_of_model(model, config), rollouts)


def loss_rate(model: str, gpu: Gpu, work: Workload) -> Rate:
    """Returns the operations of the loss over the time that `bench.floor` predicts for them."""
    objective, share = work.config.objective, max(floor_loss.CLIPPED_SHARES)
    counted = floor_loss.count(
        MODELS[model], gpu.device, EQUAL, objective.divergence, clipped_share=share
    )
    products = recipe_of(work.config).head_work(1)
    flops = loss_flops(work.shape, products, NUM_TOKENS, [Scoring(work.shape, 0)])
    return Rate(flops / counted["predicted_s"])


# ---- memory --------------------------------------------------------------------------------------


def _changed(config: Config, **sections: Mapping[str, object]) -> Config:
    changes = {name: getattr(config, name).model_copy(update=new) for name, new in sections.items()}
    return config.model_copy(update=changes)


def trainer_bytes(work: Workload, layout: Layout, gpu: Gpu) -> int:
    """Returns the memory of a training GPU by the estimate of `--dry-run`, with vLLM's share where
    it samples, too. Ranks that share one of several copies are a run with their part of the
    batch."""
    num_ranks = layout.train_gpus if layout.shards == 1 else layout.shards
    copies = layout.train_gpus // num_ranks
    config = _changed(
        work.config,
        train={"batch_size": -(-len(work.rollouts) // copies)},
        parallel={"shard": "full" if layout.shards > 1 else "replicate"},
        rollout={"url": ("http://server",) if layout.rollout_gpus else None},
    )
    student, teacher = LONGEST_PROMPTS
    lengths = memory.Lengths(student, teacher, config.rollout.max_new_tokens)
    found = estimate_memory(
        work.shape,
        config=config,
        lengths=lengths,
        num_ranks=num_ranks,
        device_memory_bytes=gpu.memory_bytes,
    )
    return found.total_bytes


def cached_rollouts(work: Workload, layout: Layout, gpu: Gpu) -> int:
    """Returns the number of longest rollouts that an engine's cache holds, at most
    `rollout.max_sequences`; 0 if not even one."""
    section = work.config.rollout
    share = SERVER_SHARE if layout.rollout_gpus else section.gpu_memory_utilization
    numbers = work.shape.base_parameters + work.shape.adapter_parameters
    beside = constants(gpu)["vLLM beside weights and cache"].value
    left = share * gpu.memory_bytes - beside
    left = left * layout.tensor_parallel - work.number_bytes * numbers
    longest = LONGEST_PROMPTS[0] + section.max_new_tokens
    room = int(left // cache_row_bytes(work.shape, longest, work.number_bytes))
    return max(0, min(room, section.max_sequences))


def obstacle(work: Workload, layout: Layout, gpu: Gpu) -> str:
    """Returns why a layout does not fit into its GPUs; empty if it does."""
    needed = trainer_bytes(work, layout, gpu)
    if needed > gpu.memory_bytes:
        return (
            f"does not fit: a training GPU needs {needed / GIB:.1f} GiB of "
            f"{gpu.memory_bytes / GIB:.0f}"
        )
    if cached_rollouts(work, layout, gpu) == 0:
        return "does not fit: an engine's memory holds no rollout beside the weights"
    return ""


# ---- layouts -------------------------------------------------------------------------------------


def _powers(most: int) -> Iterator[int]:
    return (1 << place for place in range(most.bit_length()))


def layouts(num_gpus: int, machine: Machine, shape: ModelShape) -> Iterator[Layout]:
    """Yields the layouts of a number of GPUs that divide evenly: engines of 1, 2, 4 or 8 GPUs of
    one node, weights whole on each, sharded over all, or over each node."""
    heads = max(1, shape.num_heads)
    for rollout in (0, *(number for number in ROLLOUT_GPUS if number < num_gpus)):
        train = num_gpus - rollout
        whole_nodes = train > machine.per_node and train % machine.per_node == 0
        shards = sorted({1, train, machine.per_node if whole_nodes else 1})
        for parallel in _powers(min(rollout or train, machine.per_node)):
            if (rollout or train) % parallel or heads % parallel:
                continue
            for number in shards:
                for ahead in (0, 1) if rollout else (0,):
                    yield Layout(train, number, rollout, parallel, ahead)


def mode_of(layout: Layout) -> str:
    return SHARED if not layout.rollout_gpus else AHEAD if layout.ahead else SPLIT


def row_of(layout: Layout, work: Workload, machine: Machine, gpu: Gpu) -> dict[str, Any]:
    """Returns a layout's prediction; without times if it does not fit."""
    row = {
        "num_gpus": layout.num_gpus,
        "mode": mode_of(layout),
        "rollout_gpus": layout.rollout_gpus,
        "train_gpus": layout.train_gpus,
        "tensor_parallel": layout.tensor_parallel,
        "shards": layout.shards,
        "obstacle": obstacle(work, layout, gpu),
    }
    if row["obstacle"]:
        return row
    found = step_time(machine, work, layout, cached_rollouts(work, layout, gpu))
    return {**row, **times_of(found, work)}


def times_of(found: StepTime, work: Workload) -> dict[str, Any]:
    return {
        "step_s": found.step_s,
        "tokens_per_s": work.num_tokens / found.step_s,
        "train_s": found.train_s,
        "parts_s": dict(found.parts),
    }


def best_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Returns the row with the shortest step; of equal ones, the first. None if none fits."""
    fitting = [row for row in rows if not row["obstacle"]]
    return min(fitting, key=lambda row: row["step_s"], default=None)


def splits_of(num_gpus: int, work: Workload, machine: Machine, gpu: Gpu) -> list[dict[str, Any]]:
    """Returns a row for each split of the GPUs: of its layouts, the one with the shortest step, or
    the first if none fits. `best` marks the shortest step of all, `best_on_policy` that of those
    whose rollouts are of the newest weights."""
    splits: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for layout in layouts(num_gpus, machine, work.shape):
        row = row_of(layout, work, machine, gpu)
        splits.setdefault((row["mode"], row["rollout_gpus"]), []).append(row)
    rows = [best_of(found) or found[0] for found in splits.values()]
    rows.sort(key=lambda row: (MODES.index(row["mode"]), row["rollout_gpus"]))
    newest = best_of([row for row in rows if row["mode"] != AHEAD])
    best = best_of(rows)
    return [{**row, "best": row is best, "best_on_policy": row is newest} for row in rows]


def changed_bests(
    num_gpus: int, model: str, work: Workload, gpu: Gpu, factors: Sequence[float] = (0.5, 2.0)
) -> list[dict[str, Any]]:
    """Returns the best split for other values of each assumed rate and time: multiples of its own,
    and at most the peak."""
    loss, found = loss_rate(model, gpu, work), []
    values = {name: one for name, one in constants(gpu).items() if one.is_assumed_time}
    most = {"memory, attained": gpu.peak_bytes_per_s}
    for name, constant in values.items():
        for factor in factors:
            peak = 1.0 if constant.unit == SHARE else most.get(name, math.inf)
            value = min(factor * constant.value, peak)
            machine = gpu_machine(gpu, loss, {name: value})
            best = best_of(splits_of(num_gpus, work, machine, gpu))
            assert best is not None
            found.append({"constant": name, "value": value, "unit": constant.unit, **best})
    return found
