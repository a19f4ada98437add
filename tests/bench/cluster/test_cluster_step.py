"""The predicted time of a step: small cases by hand, and what more of anything does."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.cluster.machine import Link, Machine, Rate
from bench.cluster.rollouts import kept_rows, rollout_s
from bench.cluster.step import COMPUTED, PARTS, flops_of, step_time
from bench.cluster.workload import Layout, Workload, waiting_s
from bench.step.cases import Lengths
from paint_engine.config.schema import Config
from paint_engine.estimate.arithmetic import forward_flops, sampling_flops, token_flops
from paint_engine.estimate.model_shape import ModelShape

SHAPE = ModelShape(
    num_layers=2,
    num_attention=2,
    windows=(None, None),
    hidden=8,
    intermediate=16,
    queries=8,
    keys=4,
    num_heads=2,
    recurrent=0,
    state_elements=0,
    num_head_rows=50,
    norms_heads=True,
    tied=True,
    adapted=frozenset({"q_proj"}),
    adapter_rank=2,
    adapters_per_layer=1,
    adapter_inputs=8,
    other_adapter_inputs=0,
    layer_parameters=1000,
    active_parameters=1000,
    root_parameters=408,
    adapter_parameters=100,
    trained_parameters=100,
    largest_trained=50,
)
PARTS_AT_1K = dict.fromkeys((*COMPUTED, "prefill"), Rate(1000.0))
MACHINE = Machine(
    name="by hand",
    parts=PARTS_AT_1K,
    token=Rate(1000.0, 0.5),
    read_bytes_per_s=500.0,
    inside=Link(100.0, 0.25),
    outside=Link(10.0, 2.0),
    per_node=2,
    optimizer=Rate(10.0),
    host_bytes_per_s=200.0,
    other_s=3.0,
    rollout_s=0.125,
)


def work_of(*rollouts: tuple[int, int, int], engine: str = "vllm", limit: int = 4096) -> Workload:
    config = Config.model_validate(
        {"rollout": {"engine": engine}, "train": {"max_tokens_per_microbatch": limit}}
    )
    return Workload(config, SHAPE, tuple(Lengths(*sizes) for sizes in rollouts))


def test_operations_of_single_tokens_add_up_to_those_of_sampling() -> None:
    prompt, completion = 100, 400
    tokens = sum(token_flops(SHAPE, 1, prompt + place) for place in range(completion))
    whole = forward_flops(SHAPE, prompt, adapters=True) + tokens
    assert whole == pytest.approx(sampling_flops(SHAPE, prompt, completion), rel=2e-3)


def test_a_step_of_one_gpu_by_hand() -> None:
    # Prompts of 2 (the teacher's of 4), completions of 2 and 1.
    found = step_time(MACHINE, work_of((2, 4, 2), (2, 4, 1)), Layout(1), 64)
    # 2 x (1,000 + 100) weights per prompt token, and attention of 2 x 2 layers x 8 x 2 squared.
    prefill = 2 * (2 * 1100 * 2 + 128) / 1000
    # First token, 2 rows: reads 2 x (1,100 + 400) weights and 2 caches of 2 x (2 layers x 4) x 2
    # numbers of 2 bytes; 2 x 2 x 1,500 operations, and 4 x 2 x 8 of each of 4 cached tokens.
    first = max((3000 + 2 * 64) / 500, (6000 + 4 * 64) / 1000)
    second = max((3000 + 96) / 500, (3000 + 3 * 64) / 1000)
    assert (first, second) == (6.256, 6.192)
    assert found.parts["rollout"] == pytest.approx(prefill + 2 * 0.5 + first + second)
    # The adapter is written and read: 400 bytes each.
    assert found.parts["sync"] == 4.0
    assert found.parts["rewards"] == 0.25
    # The base without adapters over 6 and 5 tokens; attention of 32 x the squares.
    assert found.parts["teacher"] == pytest.approx((2 * 1000 * 11 + 32 * (36 + 25)) / 1000)
    assert found.parts["student"] == pytest.approx((2 * 1100 * 7 + 32 * (16 + 9)) / 1000)
    # Both models' logits and the gradient back: three products of 2 x 400 per token.
    assert found.parts["loss"] == pytest.approx(3 * 800 * 3 / 1000)
    assert found.parts["collectives"] == 0.0
    assert found.parts["optimizer"] == 10.0 and found.parts["other"] == 3.0
    assert tuple(found.parts) == PARTS
    assert found.step_s == pytest.approx(sum(found.parts.values()))


def test_two_gpus_halve_the_passes_and_add_collectives() -> None:
    work = work_of((2, 4, 2), (2, 4, 2))
    one, two = (step_time(MACHINE, work, Layout(n), 64).parts for n in (1, 2))
    for part in (*COMPUTED, "rewards"):
        assert two[part] == pytest.approx(one[part] / 2), part
    # All-reduce of 400 bytes: each GPU sends half of them twice, and waits once for the link.
    assert two["collectives"] == pytest.approx(400 / 100 + 0.25)
    # Both engines read all weights for every token.
    row_s = max((3000 + 64) / 500, (3000 + 128) / 1000)
    assert two["rollout"] == pytest.approx(4528 / 1000 + 2 * 0.5 + row_s + (3000 + 96) / 500)


def test_sharded_weights_are_gathered_for_every_pass() -> None:
    work = work_of((2, 4, 2), (2, 4, 2))
    parts = step_time(replace(MACHINE, overlaps=False), work, Layout(2, shards=2), 64).parts
    # A layer: (2 x 1,000 + 4 x 100) bytes / 2; half comes from the other GPU.
    layer = 600 / 100 + 0.25
    root = 408 / 100 + 0.25
    gradients = 200 / 100 + 2 * 0.25
    assert parts["collectives"] == pytest.approx(root + 3 * 2 * layer + gradients)
    assert parts["optimizer"] == 5.0
    # Beside the passes, which take longer, only the first layer's gather of each is waited for.
    hidden = step_time(MACHINE, work, Layout(2, shards=2), 64).parts["collectives"]
    exposed = [max(0.0, layer - parts[name] / 2) for name in ("teacher", "student", "backward")]
    assert hidden == pytest.approx(root + 3 * layer + sum(exposed) + gradients)


def test_each_micro_batch_gathers_again() -> None:
    machine = replace(MACHINE, overlaps=False)
    rollouts = [(2, 4, 2)] * 4
    one, two = (
        step_time(machine, work_of(*rollouts, limit=limit), Layout(2, shards=2), 64).parts
        for limit in (4096, 6)
    )
    gathers = 408 / 100 + 0.25 + 6 * (600 / 100 + 0.25)
    assert two["collectives"] - one["collectives"] == pytest.approx(gathers)


def test_collectives_over_nodes_go_over_the_network() -> None:
    # Four GPUs on two nodes: half of the bytes come over two adapters of 10 bytes/s.
    assert MACHINE.gather_s(400, 4) == pytest.approx(200 / 20 + 2.0)
    assert MACHINE.gather_s(400, 2) == pytest.approx(200 / 100 + 0.25)
    # Copies of shards: one GPU per node, alone on its adapter.
    assert MACHINE.reduce_s(400, 2, per_node=1) == pytest.approx(2 * 200 / 10 + 2.0)


def test_tensor_parallel_divides_the_reads_and_adds_all_reduces() -> None:
    work = work_of((2, 4, 1), (2, 4, 1))
    layout = Layout(2, tensor_parallel=2)
    # Two all-reduces of 2 rows x 8 x 2 bytes in each of 2 layers.
    sums = 2 * 2 * (32 / 100 + 0.25)
    token = (3000 + 2 * 64) / 2 / 500
    expected = 9056 / 2 / 1000 + 0.5 + token + sums
    assert rollout_s(MACHINE, work, layout, 64) == pytest.approx(expected)


def test_rollouts_ahead_hide_behind_the_training_on_gpus_of_their_own() -> None:
    work = work_of(*[(2, 4, 2)] * 4)
    split = step_time(MACHINE, work, Layout(1, rollout_gpus=1), 64)
    ahead = step_time(MACHINE, work, Layout(1, rollout_gpus=1, ahead=1), 64)
    assert split.parts == ahead.parts
    longer = max(split.parts["rollout"], split.train_s)
    assert ahead.step_s == pytest.approx(longer + split.parts["sync"])
    assert split.step_s == pytest.approx(split.parts["rollout"] + split.train_s + 4.0)
    # On the same GPU they take turns.
    turns = step_time(MACHINE, work, Layout(1, ahead=1), 64)
    assert turns.step_s == step_time(MACHINE, work, Layout(1), 64).step_s


def test_the_longest_rollout_decides() -> None:
    short, long = (2, 4, 1), (2, 4, 9)
    together = rollout_s(MACHINE, work_of(short, long), Layout(2), 64)
    assert together == rollout_s(MACHINE, work_of(long), Layout(1), 64)


def test_rollouts_above_the_engine_s_number_wait() -> None:
    work = work_of((2, 4, 3), (2, 4, 3))
    alone = rollout_s(MACHINE, work_of((2, 4, 3)), Layout(1), 64)
    assert rollout_s(MACHINE, work, Layout(1), 1) == pytest.approx(2 * alone)
    assert rollout_s(MACHINE, work, Layout(1), 2) < 2 * alone


def test_the_built_in_sampler_drops_finished_rows_by_quarters() -> None:
    assert kept_rows([8, 7, 6, 5, 4, 1]) == [8, 8, 6, 6, 4, 1]


def test_processes_that_share_cores_take_turns() -> None:
    assert waiting_s([1.0, 3.0], None) == 3.0
    assert waiting_s([1.0, 3.0], 2) == 3.0
    assert waiting_s([2.0, 2.0, 2.0, 2.0], 2) == 4.0


def test_padded_rows_are_all_as_long_as_the_longest() -> None:
    work = work_of((2, 4, 2), (5, 9, 1))
    padded = flops_of(replace(work, padded=True), work.examples)
    even = work_of((4, 8, 2), (5, 9, 1))
    assert padded == flops_of(even, even.examples)


sizes = st.tuples(st.integers(1, 30), st.integers(1, 60), st.integers(1, 40))


@settings(max_examples=60, deadline=None)
@given(
    rollouts=st.lists(sizes, min_size=2, max_size=9),
    num_gpus=st.sampled_from([2, 4, 6]),
    shards=st.booleans(),
)
def test_less_work_and_faster_machines_take_no_longer(
    rollouts: list[tuple[int, int, int]], num_gpus: int, shards: bool
) -> None:
    layout = Layout(num_gpus, num_gpus if shards else 1)
    found = step_time(MACHINE, work_of(*rollouts), layout, 64)
    assert all(seconds >= 0 for seconds in found.parts.values())
    # On one GPU: longer rollouts can be divided more evenly among several.
    found_alone = step_time(MACHINE, work_of(*rollouts), Layout(1), 64)
    longer = [(a, b, c + 1) for a, b, c in rollouts]
    assert step_time(MACHINE, work_of(*longer), Layout(1), 64).step_s > found_alone.step_s
    for change in (
        {"read_bytes_per_s": 1000.0},
        {"inside": Link(200.0, 0.25), "outside": Link(20.0, 2.0)},
        {"parts": dict.fromkeys(PARTS_AT_1K, Rate(2000.0))},
        {"token": Rate(2000.0, 0.25)},
    ):
        faster = step_time(replace(MACHINE, **change), work_of(*rollouts), layout, 64)
        assert faster.step_s <= found.step_s * (1 + 1e-12)
    # Passes on all GPUs take at least their share, and at most what one GPU takes.
    passes = sum(found.parts[part] for part in COMPUTED)
    every = sum(found_alone.parts[part] for part in COMPUTED)
    assert every / num_gpus * (1 - 1e-9) <= passes <= every * 4 * (1 + 1e-9)
    assert found.parts["rollout"] <= found_alone.parts["rollout"] * (1 + 1e-9)
