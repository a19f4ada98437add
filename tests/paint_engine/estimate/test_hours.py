"""The predicted hours: the tokens of a run, the waves of answers, and what bounds each of them."""

from dataclasses import replace
from typing import get_args

import pytest
import torch

from paint_engine.config.command_line import load_config
from paint_engine.config.sections import EvalSection, GpuName, ParallelSection
from paint_engine.data import ProblemSet
from paint_engine.estimate.arithmetic import sampling_flops
from paint_engine.estimate.hours import (
    BANDWIDTH_SHARE,
    FLOPS_SHARE,
    GPUS,
    Engine,
    Gpu,
    decode_seconds,
    engine_of,
    evaluations_of,
    gpu_name,
    hours_lines,
)
from paint_engine.estimate.model_shape import ModelShape
from paint_engine.types import Problem

CPU = torch.device("cpu")
# A token of a text takes 2 (keys, values) x 2 layers x 8 entries x 2 bytes = 64 bytes of cache.
SHAPE = ModelShape(
    num_layers=2,
    num_attention=2,
    windows=(None, None),
    hidden=4,
    intermediate=8,
    queries=8,
    keys=8,
    num_heads=2,
    recurrent=0,
    state_elements=0,
    num_head_rows=50,
    norms_heads=False,
    tied=True,
    adapted=frozenset(),
    adapter_rank=0,
    adapters_per_layer=0,
    adapter_inputs=0,
    other_adapter_inputs=0,
    layer_parameters=800,
    active_parameters=800,
    root_parameters=200,
    adapter_parameters=0,
    trained_parameters=1000,
    largest_trained=200,
)
NO_LIMIT = 1e30


def test_waves_that_the_memory_bounds_read_all_weights_and_half_of_the_longest_caches() -> None:
    gpu, engine = Gpu(NO_LIMIT, 1000.0, 80), Engine(1, 1, 4, None)
    seconds = decode_seconds(SHAPE, gpu, engine, num_answers=10, prompt=10, completion=20)
    # 2,000 bytes of weights, and 20 tokens of cache an answer: 1,280 bytes.
    read_bytes = 2 * 20 * (2000 + 4 * 1280) + 20 * (2000 + 2 * 1280)
    assert read_bytes == 376_000
    assert seconds == pytest.approx(read_bytes / (BANDWIDTH_SHARE * 1000.0))
    two = replace(engine, num_engines=2)
    alone = decode_seconds(SHAPE, gpu, engine, num_answers=5, prompt=10, completion=20)
    assert decode_seconds(SHAPE, gpu, two, num_answers=10, prompt=10, completion=20) == alone


def test_waves_that_the_products_bound_take_their_operations() -> None:
    gpu, engine = Gpu(1000.0, NO_LIMIT, 80), Engine(1, 2, 64, None)
    seconds = decode_seconds(SHAPE, gpu, engine, num_answers=3, prompt=10, completion=20)
    flops = 3 * sampling_flops(SHAPE, 10, 20)
    assert seconds == pytest.approx(flops / (FLOPS_SHARE * 1000.0 * 2))


def test_answers_at_once_are_those_whose_whole_caches_fit() -> None:
    assert Engine(1, 1, 64, 3 * 64 * 30 + 1).num_at_once(64 * 30) == 3
    assert Engine(1, 1, 2, 1e9).num_at_once(64 * 30) == 2
    assert Engine(1, 1, 64, 0.0).num_at_once(64 * 30) == 1
    assert Engine(1, 1, 64, None).num_at_once(64 * 30) == 64


def test_an_engine_has_its_share_of_the_memory_without_the_weights() -> None:
    options = ["--preset", "tiny", "--rollout.engine", "vllm", "--rollout.max_sequences", "32"]
    config = load_config([*options, "--rollout.gpu_memory_utilization", "0.25"]).config
    engine = engine_of(config, SHAPE, GPUS["h100"], 8)
    assert engine == Engine(8, 1, 32, 0.25 * 80 * 2**30 - 2000)
    builtin = load_config(["--preset", "tiny", "--eval.max_sequences", "7"]).config
    assert engine_of(builtin, SHAPE, GPUS["h100"], 2, evaluates=True) == Engine(2, 1, 7, None)


def held_out(num_problems: int) -> dict[str, ProblemSet]:
    problems = tuple(Problem(f"p:{i}", "How many?", "", "3") for i in range(num_problems))
    return {"a": ProblemSet(problems, ((1, 2, 3),) * num_problems, 0)}


def test_evaluations_are_those_that_the_run_will_make() -> None:
    section = EvalSection(every=20, num_samples=4, max_new_tokens=100)
    (found,) = evaluations_of(section, 100, held_out(30))
    assert (found.number, found.num_answers, found.num_tokens) == (6, 120, 72_000)
    section = EvalSection(
        every=30, num_samples=4, max_new_tokens=100, at_start=False, final_max_new_tokens=200
    )
    during, after = evaluations_of(section, 100, held_out(30))
    assert during.number == 4
    # Of the last and the best step.
    assert (after.number, after.num_tokens) == (2, 2 * 120 * 200)
    assert evaluations_of(section, 100, {}) == []


def test_the_report_has_tokens_and_hours_of_both_apart_or_says_what_it_needs() -> None:
    options = ["--preset", "tiny", "--train.num_steps", "10", "--train.batch_size", "8"]
    options += ["--eval.num_samples", "2", "--eval.max_new_tokens", "50", "--eval.every", "0"]
    options += ["--rollout.max_new_tokens", "100"]
    evaluations = evaluations_of(load_config(options).config.eval, 10, held_out(3))

    def lines(*more: str) -> list[str]:
        config = load_config([*options, *more]).config
        return hours_lines(
            config, SHAPE, evaluations, step_flops=1e15, prompt=10, device=CPU, num_ranks=2
        )

    tokens = [
        "# training: 10 steps, at most 8,000 tokens",
        "# evaluations: 2 of 6 answers, at most 600 tokens",
    ]
    assert lines()[:2] == tokens
    assert "no hours: name a GPU with --parallel.gpu (a100-40gb, " in lines()[2]
    found = lines("--parallel.gpu", "h100")
    assert found[:2] == tokens
    # 10 steps of 1e15 operations at 2 x 40% of 989e12 a second: 12.6 s, and a few tokens.
    assert found[2].startswith("# prediction for 2 x h100, with every completion as long as its")
    assert found[2].endswith("training 0.00 h, evaluations 0.00 h")
    long = lines("--parallel.gpu", "h100", "--train.num_steps", "10000")
    assert "training 3.51 h" in long[2]
    assert "which are assumptions" in long[3]


def test_the_table_has_every_name_and_a_machine_without_a_gpu_has_none() -> None:
    assert GPUS.keys() == set(get_args(GpuName))
    assert gpu_name(ParallelSection(), CPU) is None
    assert gpu_name(ParallelSection(gpu="l40s"), CPU) == "l40s"
