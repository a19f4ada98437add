"""Measured steps beside their prediction: the calibration, the errors, the groups of processes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from bench.cluster import measured
from bench.cluster.calibration import Calibration, fitted, with_links
from bench.cluster.machine import Link, Machine, Rate
from bench.cluster.measured import (
    Round,
    group_of,
    padded_workload,
    parts_at_once,
    predictions,
    rows_of,
)
from bench.cluster.step import COMPUTED, step_time
from bench.cluster.tables import cpu_table
from bench.cluster.worker import LARGE_BYTES, SMALL_BYTES
from bench.cluster.workload import Layout, Workload
from bench.step.cases import Lengths
from paint_engine.config.bundled import TINY_BASE

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning")
CORES = 2
CPU = Machine(
    name="CPU",
    parts={
        **{part: Rate(1e9 * (place + 1), 1e-3 * place) for place, part in enumerate(COMPUTED)},
        "prefill": Rate(1e9, 0.0),
    },
    token=Rate(5e8, 3e-3),
    read_bytes_per_s=math.inf,
    inside=Link(math.inf, 0.0),
    outside=Link(math.inf, 0.0),
    per_node=8,
    optimizer=Rate(math.inf, 0.01),
    host_bytes_per_s=math.inf,
    other_s=0.02,
    rollout_s=0.005,
    cores=CORES,
    overlaps=False,
)
ROLLOUTS = [(20 + n, 60 + 3 * n, 10 + 7 * (n % 5)) for n in range(16)]


@pytest.fixture(scope="module")
def work() -> Workload:
    return padded_workload()


def with_rollouts(work: Workload, sizes: list[tuple[int, int, int]]) -> Workload:
    rollouts = tuple(Lengths(*three) for three in sizes)
    return Workload(work.config, work.shape, rollouts, work.padded, work.number_bytes)


def parts_of(work: Workload, rollouts: list[tuple[int, int, int]]) -> list[dict[str, Any]]:
    """Steps of one process as CPU takes them."""
    found = []
    for number in (16, 8, 4):
        own = with_rollouts(work, rollouts[:number])
        parts = dict(step_time(CPU, own, Layout(1), 64).parts)
        step_s = sum(parts.values())
        beside = ("other", "rewards", "collectives")
        kept = {name: seconds for name, seconds in parts.items() if name not in beside}
        one = {"parts_s": kept, "step_s": step_s, "rollouts": rollouts[:number], "pass_s": 0.004}
        found.append(one)
    return found


def test_the_measured_model_is_that_of_the_preset(work: Workload) -> None:
    bundled = json.loads((TINY_BASE / "config.json").read_text())
    assert work.shape.num_layers == bundled["num_hidden_layers"]
    assert work.shape.hidden == bundled["hidden_size"]
    assert work.builtin and work.padded and work.number_bytes == 4


def test_coefficients_are_not_negative() -> None:
    assert fitted([[1, 1, 1], [1, 2, 4]], [5, 7, 11]) == pytest.approx([3, 2])
    # The line through these would begin below 0.
    assert fitted([[1, 1], [1, 2]], [1, 3])[0] == 0.0


def test_calibrating_finds_the_machine_that_took_the_steps(work: Workload) -> None:
    works = [with_rollouts(work, ROLLOUTS[:number]) for number in (16, 8, 4)]
    found = Calibration(works, parts_of(work, ROLLOUTS)).machine(CORES)
    assert found.token.fixed_s == pytest.approx(3e-3)
    assert found.token.flops_per_s == pytest.approx(5e8)
    assert (found.other_s, found.rollout_s) == pytest.approx((0.02, 0.005))
    for part in COMPUTED:
        assert found.parts[part].flops_per_s == pytest.approx(CPU.parts[part].flops_per_s)
    for number in (1, 2, 4):
        expected = step_time(CPU, works[0], Layout(number), 64).step_s
        assert step_time(found, works[0], Layout(number), 64).step_s == pytest.approx(expected)


def test_links_come_from_bare_collectives(work: Workload) -> None:
    bare = {
        "object_s": 0.001,
        "rollouts_s": 0.01,
        "gather_small_s": 0.002,
        "gather_large_s": 0.002 + (LARGE_BYTES - SMALL_BYTES) / 2 / 1e9,
        "pass_s": 0.004,
    }
    replicated = with_links(CPU, work, bare, 2, 9, 0.004)
    assert replicated.token == CPU.token
    assert replicated.inside.bytes_per_s == pytest.approx(1e9)
    assert replicated.inside.latency_s == 0.002
    assert replicated.exchanges_s == pytest.approx(7 * 0.001 + 2 * 0.01)
    layer = work.layers_bytes / work.shape.num_layers
    bare |= {"layer_s": 0.005 + layer / 2 / 1e9, "weights_s": 0.03, "pass_s": 0.0045}
    sharded = with_links(CPU, work, bare, 2, 9, 0.004)
    assert sharded.token.fixed_s == pytest.approx(CPU.token.fixed_s + 0.0005)
    assert sharded.exchanges_s == pytest.approx(replicated.exchanges_s + 0.03)
    assert sharded.gather_s(layer, 2) == pytest.approx(0.005 + layer / 2 / 1e9)


def test_processes_beyond_the_cores_take_turns(work: Workload) -> None:
    names = ("object_s", "rollouts_s", "gather_small_s", "gather_large_s", "pass_s")
    bare = dict.fromkeys(names, 0.0)
    keys = [("full", 1), ("replicate", 2), ("replicate", 4)]
    steps = {key: {"seconds": 1.0} for key in keys}
    parts = parts_of(work, [(20, 60, 40)] * 16)
    found = Round(dict.fromkeys((1, 2, 4), parts), steps, {key: bare for key in keys})
    times = predictions(found, work, CORES, dict.fromkeys(keys, 9))
    one, two, four = (times[key]["parts_s"] for key in keys)
    assert two["backward"] == pytest.approx(one["backward"] / 2, rel=0.05)
    # Four shares on two cores are no faster than two, and each process decodes all tokens.
    assert four["backward"] == pytest.approx(two["backward"], rel=0.05)
    tokens_s = 40 * 3e-3
    assert one["rollout"] - two["rollout"] > 0 and four["rollout"] - two["rollout"] > tokens_s / 2
    assert four["other"] == pytest.approx(2 * two["other"])


def test_errors_are_of_rounds_and_stand_in_the_table() -> None:
    keys = [("full", 1), ("full", 2)]

    def taken(one: float, two: float) -> Round:
        steps = {
            keys[0]: {"seconds": one, "processor_s": [one], "others": 0.0},
            keys[1]: {"seconds": two, "processor_s": [two - 0.1, two - 0.2], "others": 0.5},
        }
        return Round({}, steps, {})

    rounds = [taken(2.0, 1.0), taken(4.0, 2.0), taken(3.0, 2.0)]
    times = [
        {key: {"step_s": seconds, "parts_s": {"rollout": seconds}} for key in keys}
        for seconds in (2.2, 4.4, 3.3)
    ]
    rows = rows_of(rounds, times, CORES)
    assert rows[0]["error"] == pytest.approx(0.1)
    assert rows[1]["error"] == pytest.approx(1.2)
    assert rows[1]["measured_s"] == 2.0 and rows[1]["busy_s"] == pytest.approx(1.9)
    result = {
        "rows": rows,
        "rounds": 3,
        "cores": 2,
        "num_rollouts": 32,
        "num_tokens": [3221],
        "device": "a device",
        "num_threads": 1,
        "versions": {"python": "3.11", "torch": "2.13.0"},
        "commit": "",
        "command": "python -m bench.cluster --cpu",
    }
    lines = cpu_table(result).splitlines()
    assert (
        lines[2]
        == "| 1 | one process | 3.00 | 2.00 to 4.00 | 3.30 | +10.0% | 3.00 | +10.0% | 0.00 |"
    )
    assert (
        lines[3] == "| 2 | `full` | 2.00 | 1.00 to 2.00 | 3.30 | +120.0% | 1.90 | +131.6% | 0.50 |"
    )
    assert "32 rollouts of 3,221 tokens in all; 2 cores" in lines[-1]


SHORT = (*measured.ARGUMENTS, "--rollout.max_new_tokens", "4", "--train.batch_size", "4")


@pytest.mark.parametrize("number", [1, 2])
def test_a_group_answers_and_ends(number: int, tmp_path: Path) -> None:
    with group_of(number, [*SHORT, "--parallel.shard", "full"], tmp_path / "group") as group:
        step = group.ask("step")
        assert step["seconds"] > 0 and len(step["processor_s"]) == number
        assert step["num_tokens"] <= 16 and math.isfinite(step["others"])
        assert group.ask("step")["num_tokens"] == step["num_tokens"]
        if number == 1:
            parts = group.ask("parts")
            assert [len(one["rollouts"]) for one in parts] == [4, 2, 1]
            assert all(set(COMPUTED) < set(one["parts_s"]) for one in parts)
            first, second = parts_at_once([group]), parts_at_once([group])
            assert first[0]["rollouts"] == second[0]["rollouts"] == parts[0]["rollouts"]
            assert all(one["pass_s"] > 0 for one in first + second)
            assert all(sum(one["parts_s"].values()) < one["step_s"] for one in parts)
        else:
            bare = group.ask("collectives")
            assert {"layer_s", "weights_s", "gather_small_s", "object_s"} < set(bare)
            assert all(seconds > 0 for seconds in bare.values())
            assert group.ask("exchanges")["number"] > 2
        group.end()


def test_a_group_that_does_not_start_is_an_error(tmp_path: Path) -> None:
    group = group_of(1, ["--preset", "none-such"], tmp_path / "group")
    with pytest.raises(RuntimeError, match="did not start"), group:
        raise AssertionError("it has started")
