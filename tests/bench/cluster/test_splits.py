"""The splits of a cluster: which are tried, which do not fit, which is the best; the command."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.cluster import __main__ as command
from bench.cluster.machine import GPUS, SHARED, Machine, constants, gpu_machine
from bench.cluster.splits import (
    AHEAD,
    best_of,
    cached_rollouts,
    layouts,
    loss_rate,
    obstacle,
    splits_of,
    trainer_bytes,
    workload,
)
from bench.cluster.tables import gpus_table, splits_of_number
from bench.cluster.workload import Layout, Workload
from bench.floor.loss import count
from bench.kernels.limits import DEVICES
from bench.losses import EQUAL
from paint_engine.estimate.memory import GIB

H100 = GPUS["h100"]
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning")


@pytest.fixture(scope="module")
def work() -> Workload:
    return workload("qwen3-8b", 32)


@pytest.fixture(scope="module")
def machine(work: Workload) -> Machine:
    return gpu_machine(H100, loss_rate("qwen3-8b", H100, work))


def test_the_sizes_are_those_of_qwen3_8b(work: Workload) -> None:
    assert work.shape.base_parameters == 8_190_735_360
    assert work.shape.adapter_parameters == 174_587_904
    assert work.num_tokens == 32 * 1024


def test_the_loss_takes_what_the_floor_counts(work: Workload, machine: Machine) -> None:
    counted = count("8b", DEVICES[0], EQUAL, "forward_kl", clipped_share=0.6)["predicted_s"]
    # Three products with the head: 2 x 151,936 x 4,096 operations per token each.
    flops = 3 * 2 * 151_936 * 4_096 * 32_768
    assert machine.parts["loss"].seconds(flops) == pytest.approx(counted)


def test_every_constant_has_a_source() -> None:
    for gpu in GPUS.values():
        for name, constant in constants(gpu).items():
            assert constant.source and constant.value > 0, name
        assert constants(gpu)["memory, attained"].value < gpu.peak_bytes_per_s
    assert SHARED["passes, of the peak"].assumed


def test_layouts_divide_evenly(machine: Machine, work: Workload) -> None:
    found = list(layouts(16, machine, work.shape))
    assert len(found) == len(set(found))
    assert all(layout.num_gpus == 16 for layout in found)
    assert {layout.tensor_parallel for layout in found} == {1, 2, 4, 8}
    assert {layout.shards for layout in found if not layout.rollout_gpus} == {1, 8, 16}
    assert not any(layout.ahead for layout in found if not layout.rollout_gpus)
    assert list(layouts(1, machine, work.shape)) == [Layout(1)]


def test_memory_refuses_what_does_not_fit(work: Workload) -> None:
    assert obstacle(work, Layout(8), H100) == ""
    small = replace(H100, memory_bytes=40 * GIB)
    assert obstacle(work, Layout(1), small).startswith("does not fit: a training GPU needs")
    # The trainer fits beside a server, but a server of 16 GiB has no room for 15.3 GiB of weights.
    parallel = work.config.parallel.model_copy(update={"activation_checkpointing": True})
    saving = replace(work, config=work.config.model_copy(update={"parallel": parallel}))
    tiny = replace(H100, memory_bytes=16 * GIB)
    assert obstacle(saving, Layout(8, 8, rollout_gpus=1), tiny) == (
        "does not fit: an engine's memory holds no rollout beside the weights"
    )
    assert obstacle(saving, Layout(8, 8, rollout_gpus=2, tensor_parallel=2), tiny) == ""


def test_the_memory_is_that_of_the_table_in_the_docs(work: Workload) -> None:
    # "8B, adapters" of docs/cluster.md, and vLLM's share of 79 GiB.
    for layout, gib in ((Layout(1), 49.8), (Layout(8, 8), 37.2), (Layout(8), 50.5)):
        found = trainer_bytes(work, layout, H100) / GIB
        assert found == pytest.approx(gib + 0.35 * 79, abs=0.1)


def test_the_cache_bounds_the_rollouts_at_once(work: Workload) -> None:
    # 0.35 of 79 GiB less 2 GB and 16.73 GB of weights and adapters, over 1,424 tokens of 147,456
    # bytes.
    room = (0.35 * 79 * 2**30 - 2e9 - 2 * (8_190_735_360 + 174_587_904)) // (1424 * 147_456)
    assert cached_rollouts(work, Layout(1), H100) == room
    assert cached_rollouts(work, Layout(8, rollout_gpus=1), H100) == 64


def test_the_best_split_is_the_shortest_step(work: Workload, machine: Machine) -> None:
    rows = splits_of(2, work, machine, H100)
    assert [(row["mode"], row["rollout_gpus"]) for row in rows] == [
        ("shared", 0),
        ("split", 1),
        (AHEAD, 1),
    ]
    (best,), (newest,) = ([r for r in rows if r[key]] for key in ("best", "best_on_policy"))
    assert best["step_s"] == min(row["step_s"] for row in rows)
    assert newest["mode"] != AHEAD
    assert best["tokens_per_s"] == pytest.approx(32 * 1024 / best["step_s"])
    assert best_of([{"obstacle": "does not fit"}]) is None


def test_more_gpus_are_never_slower_if_all_may_share(work: Workload, machine: Machine) -> None:
    steps = []
    for number in (1, 2, 4, 8):
        best = best_of(splits_of(number, work, machine, H100))
        assert best is not None
        steps.append(best["step_s"])
    assert steps == sorted(steps, reverse=True)


def test_the_command_prints_its_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cluster.json"
    arguments = ["--model", "qwen3-1.7b", "--gpus", "1", "2", "--rollouts", "4"]
    command.main([*arguments, "--lengths", "uniform 200 to 1,024", "--output", str(path)])
    printed = capsys.readouterr().out
    result = json.loads(path.read_text())
    assert json.loads(printed.splitlines()[-1]) == result
    assert splits_of_number(result, 2) in printed and gpus_table(result) in printed
    assert "A prediction, not a measurement: qwen3-1.7b on H100, 4 rollouts per step" in printed
    assert result["num_tokens"] < 4 * 1024
    assert {row["num_gpus"] for row in result["rows"]} == {1, 2}


def test_a_split_that_does_not_fit_is_said_so() -> None:
    row: dict[str, Any] = {
        "num_gpus": 2,
        "mode": "shared",
        "rollout_gpus": 0,
        "train_gpus": 2,
        "tensor_parallel": 1,
        "shards": 2,
        "obstacle": "does not fit: a training GPU needs 90.0 GiB of 79",
        "best": False,
        "best_on_policy": False,
    }
    text = splits_of_number({"rows": [row]}, 2)
    assert "| all 2 sample, then train | 2 x 1 | sharded |" in text
    assert "needs 90.0 GiB of 79" in text


def test_a_wrong_number_of_gpus_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(["--gpus", "0"])
    assert stopped.value.code == 2 and "got 0, needs 1 or more" in capsys.readouterr().err
