"""What is refused before it is paid for, and whether the advice holds."""

import re
from typing import Any

import pytest
import torch
from transformers import Qwen3Config

from paint_engine.config.command_line import load_config
from paint_engine.config.schema import Config
from paint_engine.config.sections import ParallelSection
from paint_engine.estimate.capacity import check_fits, device_memory_bytes
from paint_engine.estimate.memory import GIB, Lengths, estimate_memory, largest_microbatch
from paint_engine.estimate.model_shape import ModelShape, shape_of
from paint_engine.model.load import meta_model

LENGTHS = Lengths(200, 700, 1024)
SHAPE_8B: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 12288,
    "tie_word_embeddings": False,
}


def with_options(*options: str) -> Config:
    """The 8B preset, with one vLLM engine for rollouts and evaluations."""
    preset = ("--preset", "paint-qwen3-8b", "--rollout.engine", "vllm")
    one = ("--eval.gpu_memory_utilization", "none")
    return load_config([*preset, *one, *options]).config


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    directory = tmp_path_factory.mktemp("qwen3-8b")
    Qwen3Config(**SHAPE_8B).save_pretrained(directory)
    return shape_of(meta_model(with_options("--model.name_or_path", str(directory))))


def check(shape: ModelShape, config: Config, *, gib: float, num_ranks: int = 1) -> str:
    """The refusal, or nothing."""
    try:
        check_fits(
            shape,
            config=config,
            lengths=LENGTHS,
            num_ranks=num_ranks,
            device_memory_bytes=round(gib * GIB),
        )
    except ValueError as error:
        return str(error)
    return ""


def test_the_preset_fits_a_gpu_of_80_gib_and_not_one_of_48(shape: ModelShape) -> None:
    config = with_options()
    assert check(shape, config, gib=80) == ""
    refusal = check(shape, config, gib=48)
    assert "at its peak (the loss)" in refusal
    assert "48.0 GiB" in refusal


@pytest.mark.parametrize(
    ("options", "gib", "num_ranks", "named"),
    [
        (("--train.max_tokens_per_microbatch", "16384"), 80, 1, {"max_tokens_per_microbatch"}),
        (("--train.max_tokens_per_microbatch", "1024"), 40, 1, {"activation_checkpointing"}),
        (
            (
                *("--train.max_tokens_per_microbatch", "1024", "--parallel.shard", "replicate"),
                *("--parallel.activation_checkpointing", "true"),
            ),
            34,
            8,
            {"shard"},
        ),
        (
            (
                *("--train.max_tokens_per_microbatch", "1024", "--parallel.replicas", "8"),
                *("--parallel.activation_checkpointing", "true"),
            ),
            34,
            8,
            {"replicas"},
        ),
        (
            (
                *("--train.max_tokens_per_microbatch", "1024"),
                *("--parallel.activation_checkpointing", "true"),
            ),
            32,
            1,
            {"gpu_memory_utilization"},
        ),
        ((), 35, 1, {"max_tokens_per_microbatch", "activation_checkpointing"}),
    ],
)
def test_the_setting_that_a_refusal_names_makes_the_run_fit(
    shape: ModelShape, options: tuple[str, ...], gib: float, num_ranks: int, named: set[str]
) -> None:
    refusal = check(shape, with_options(*options), gib=gib, num_ranks=num_ranks)
    advice = re.findall(r"--(\S+\.(\w+)) ([\w.]+)", refusal)
    assert {name for _, name, _ in advice} == named, refusal
    changed = [part for key, _, value in advice for part in (f"--{key}", value)]
    assert check(shape, with_options(*options, *changed), gib=gib, num_ranks=num_ranks) == ""
    if named == {"max_tokens_per_microbatch"}:
        # No smaller than it has to be.
        more = str(int(changed[1]) + 256)
        assert check(shape, with_options(*options, changed[0], more), gib=gib) != ""


def test_an_engine_for_evaluations_takes_its_share_in_place_of_the_rollouts(
    shape: ModelShape,
) -> None:
    """Beside what is held throughout, and without the activations of a step."""
    share = "--eval.gpu_memory_utilization"
    preset = ("--preset", "paint-qwen3-8b", "--rollout.engine", "vllm")
    config = load_config([*preset]).config
    assert config.eval.gpu_memory_utilization == 0.7
    for num_ranks in (1, 8):
        assert check(shape, config, gib=80, num_ranks=num_ranks) == ""
    large = with_options(share, "0.8")
    estimate = estimate_memory(
        shape, config=large, lengths=LENGTHS, num_ranks=1, device_memory_bytes=80 * GIB
    )
    one = estimate_memory(
        shape, config=with_options(), lengths=LENGTHS, num_ranks=1, device_memory_bytes=80 * GIB
    )
    assert estimate.peak_phase == "an evaluation" and one.peak_phase == "the loss"
    # 0.35 of the GPU is the rollouts' share.
    outside = sum(one.outside.values()) + round(0.45 * 80 * GIB)
    assert estimate.total_bytes == pytest.approx(sum(one.held.values()) + outside, abs=2)
    assert estimate.allocated_bytes == one.allocated_bytes
    assert "vLLM, more than for rollouts" in estimate.table()
    refusal = check(shape, large, gib=80)
    assert "at its peak (an evaluation)" in refusal and f"{share} 0.7" in refusal
    assert check(shape, with_options(share, "0.8", "--eval.enabled", "false"), gib=80) == ""
    assert check(shape, with_options(share, "0.8", "--rollout.engine", "builtin"), gib=80) == ""


def test_what_no_setting_mends_is_said_to_need_larger_gpus(shape: ModelShape) -> None:
    assert "use more GPUs" in check(shape, with_options(), gib=16)


def test_the_built_in_sampler_s_cache_is_counted_and_its_rows_are_advised(
    shape: ModelShape,
) -> None:
    config = with_options("--rollout.engine", "builtin", "--eval.max_sequences", "32")
    refusal = check(shape, config, gib=80)
    assert "(sampling)" in refusal
    assert "--eval.max_sequences 8 " in refusal
    # 32 rows of 200 + 38912 tokens; keys and values of 36 layers, 1024 bfloat16 numbers each.
    cache = 32 * (200 + 38912) * 36 * 2 * 1024 * 2
    estimate = estimate_memory(
        shape, config=config, lengths=LENGTHS, num_ranks=1, device_memory_bytes=80 * GIB
    )
    assert estimate.phases["sampling"]["sampler: cache"] == cache
    assert estimate.outside["vLLM"] == 0


def test_nothing_is_refused_on_a_cpu(shape: ModelShape) -> None:
    estimate = check_fits(
        shape, config=with_options(), lengths=LENGTHS, num_ranks=1, device_memory_bytes=None
    )
    assert estimate.outside == {}


def test_weights_are_split_over_the_ranks_and_gathered_in_passing(shape: ModelShape) -> None:
    whole, split = (
        estimate_memory(
            shape,
            config=with_options("--parallel.shard", shard),
            lengths=LENGTHS,
            num_ranks=8,
            device_memory_bytes=80 * GIB,
        )
        for shard in ("replicate", "full")
    )
    for part in ("frozen base", "frozen head", "trained weights", "optimizer"):
        assert split.held[part] == pytest.approx(whole.held[part] / 8, rel=1e-6)
    gathered = split.phases["the loss"]["FSDP: gathered embeddings and head"]
    assert gathered == 2 * (2 * 151936 * 4096 + 4096)
    assert whole.phases["the loss"]["FSDP: gathered embeddings and head"] == 0
    assert split.total_bytes < whole.total_bytes


def test_a_copy_of_the_weights_is_split_over_its_own_ranks_alone(shape: ModelShape) -> None:
    copies, one, smaller = (
        estimate_memory(
            shape,
            config=with_options("--parallel.replicas", replicas),
            lengths=LENGTHS,
            num_ranks=num_ranks,
            device_memory_bytes=80 * GIB,
        )
        for replicas, num_ranks in (("4", 8), ("1", 8), ("1", 2))
    )
    assert copies.held == smaller.held
    assert copies.held["frozen base"] == pytest.approx(4 * one.held["frozen base"], rel=1e-6)


def test_a_rollout_above_the_limit_is_a_micro_batch_of_its_own() -> None:
    config = with_options("--train.max_tokens_per_microbatch", "1000")
    batch = largest_microbatch(config, LENGTHS, num_ranks=1)
    assert (batch.student_tokens, batch.teacher_tokens) == (1224, 1724)
    small = with_options("--train.batch_size", "2", "--train.max_tokens_per_microbatch", "9000")
    assert largest_microbatch(small, LENGTHS, num_ranks=1).student_tokens == 2 * 1224
    assert largest_microbatch(small, LENGTHS, num_ranks=2).student_tokens == 1224


def test_the_memory_of_a_gpu_is_the_configuration_s_or_none_on_a_cpu() -> None:
    cpu = torch.device("cpu")
    assert device_memory_bytes(ParallelSection(device_memory_gb=80.0), cpu) == 80 * 2**30
    assert device_memory_bytes(ParallelSection(), cpu) is None
