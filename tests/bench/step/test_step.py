"""The loops of the step benchmark do equal work or fail; their tables; the GPU check's part."""

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import engine
from bench.gpu import engine as engine_part
from bench.gpu.job import Job
from bench.plots import TABLES
from bench.step import compare, timing
from bench.step.cases import (
    Lengths,
    fixed_rollout,
    operations,
    preset_case,
    random_case,
    random_rollouts,
    read_rollouts,
    teacher_prompt_ids,
    write_rollouts,
)
from bench.step.loops import OwnLoop, PlainPaint, no_op
from bench.step.tables import engine_case_table
from bench.step.timing import OURS, PLAIN, TRL, Bench, in_turn, make_loop
from bench.step.trl_loop import rows_a_batch
from paint_engine.config.schema import Config
from paint_engine.config.sections import ObjectiveSection
from paint_engine.recipes import LossInputs, SecondPass
from paint_engine.recipes.paint import Paint
from paint_engine.training.step import my_microbatches

pytestmark = [
    pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental':UserWarning"),
    # TRL's configurations use names that transformers has deprecated.
    pytest.mark.filterwarnings(
        r"ignore:`(is_)?gradient_checkpointing(_enable|_disable)?` is deprecated:FutureWarning"
    ),
]

CPU = torch.device("cpu")
LENGTHS = Lengths(student_prompt=5, teacher_prompt=9, completion=6)
PARTS = {"student", "teacher", "loss", "backward", "optimizer", "other"}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """Random weights; rollouts of different lengths, two of them in each pass."""
    case = random_case("small", LENGTHS, 4)
    case = replace(case, arguments=(*case.arguments, "--train.max_tokens_per_microbatch", "40"))
    lengths = [(4, 9, 6), (5, 7, 6), (3, 8, 5), (5, 9, 7)]
    rollouts = [random_rollouts(Lengths(*sizes), 1, 500)[0] for sizes in lengths]
    return Bench(case, CPU, tmp_path, rollouts, most_rows=2)


@pytest.mark.parametrize("clip", [None, 0.01])
@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
def test_the_plain_loss_equals_the_engines(clip: float | None, reduction: str) -> None:
    torch.manual_seed(0)
    student, teacher, head = torch.randn(11, 16), torch.randn(11, 16), torch.randn(60, 16)
    bounds = torch.tensor([0, 4, 11], dtype=torch.int32)
    section = ObjectiveSection(
        pointwise_clip=clip, reduction=reduction, top_fraction=0.3, interpolation_weight=0.4
    )
    found = []
    for recipe in (Paint, PlainPaint):
        leaf = student.clone().requires_grad_()
        inputs = LossInputs(
            student_hidden_states=leaf,
            lm_head_weight=head,
            second_passes=(SecondPass(teacher, head + 0.1),),
            completion_ids=torch.zeros(11, dtype=torch.long),
            cu_seqlens=bounds,
            examples=(),
            old_logprobs=None,
            vocab_size=57,
            denominator=3,
        )
        output = recipe(Config(objective=section)).loss(inputs)
        output.loss.backward()
        found.append((leaf.grad, output))
    assert leaf.grad is not None and leaf.grad.norm() > 1e-3
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-6)
    for ours, plain in zip(vars_of(found[0][1]), vars_of(found[1][1]), strict=True):
        torch.testing.assert_close(plain.float(), ours.float(), rtol=1e-4, atol=1e-5)
    assert found[0][1].per_token["selected"].sum() == 2 + 3
    assert (found[0][1].per_token["clipped_mass"] > 0).any() == (clip is not None)


def vars_of(output: Any) -> list[torch.Tensor]:
    return [output.loss, *(output.per_token[name] for name in sorted(output.per_token))]


def test_all_loops_start_from_equal_losses_and_ours_stay_equal(bench: Bench) -> None:
    """With rollouts of different lengths, several rows per pass and several passes per step."""
    ours, plain, theirs = (make_loop(name, bench) for name in (OURS, PLAIN, TRL))
    assert isinstance(ours, OwnLoop)
    assert len(my_microbatches(ours.run, bench.rollouts)) > 1
    expected = ours.forward_kl()
    for loop in (ours, plain, theirs):
        seconds = loop.steps(3, no_op)
        assert len(seconds) == len(loop.losses) == 3 and min(seconds) > 0
    assert plain.losses == pytest.approx(ours.losses, rel=1e-4)
    assert theirs.losses[0] == pytest.approx(expected, rel=1e-5)
    # Clip and interpolation make our loss differ from the forward KL.
    assert abs(ours.losses[0] - expected) > 1e-3 * expected
    assert len(set(ours.losses)) == len(set(theirs.losses)) == 3


def test_loops_alternate_and_the_first_step_is_left_out() -> None:
    taken: list[str] = []

    def loop(name: str) -> Any:
        def steps(number: int, between: Any) -> list[float]:
            seconds = []
            for _ in range(number):
                between()
                taken.append(name)
                seconds.append(float(len(taken)))
            return seconds

        return SimpleNamespace(steps=steps)

    seconds = in_turn({name: loop(name) for name in "abc"}, rounds=2)
    assert "".join(taken) == "abc" * 3
    assert seconds == {"a": [4.0, 7.0], "b": [5.0, 8.0], "c": [6.0, 9.0]}
    assert in_turn({"a": loop("a")}, rounds=1)["a"] == [11.0]


def test_unequal_work_is_not_reported_as_measured() -> None:
    rows = {
        OURS: {"first_loss": 2.0, "median_ms": 10.0},
        PLAIN: {"first_loss": 2.1, "median_ms": 5.0},
        TRL: {"first_loss": float("nan"), "median_ms": 5.0},
    }
    compare.check_losses(rows, forward_kl=3.0, limit=0.01)
    assert rows[PLAIN]["reason"] == "first loss 2.1, expected 2"
    assert "expected 3" in rows[TRL]["reason"] and "reason" not in rows[OURS]
    finished = compare.result_rows(rows, case_values())
    assert [row["status"] for row in finished] == ["measured", "failed", "failed"]
    assert compare.ratios(finished) == {}
    equal = {OURS: {"first_loss": 2.0}, PLAIN: {"first_loss": 2.001}, TRL: {"reason": "absent"}}
    compare.check_losses(equal, forward_kl=3.0, limit=0.01)
    assert "reason" not in equal[PLAIN]


def case_values() -> dict[str, Any]:
    return {
        "case": "8b",
        "num_rollouts": 8,
        "rows_a_pass": 2,
        "num_tokens": {"student": 10240, "teacher": 14336, "completion": 8192},
        "flops": {"student": 1e14, "teacher": 2e14, "loss": 5e13, "backward": 1.5e14},
        "attention": "varlen",
        "dtype": "bfloat16",
        "gemm_flops_per_s": 8e14,
    }


def gpu_case(**changes: Any) -> dict[str, Any]:
    """A result at the 8B shape: twice as fast as TRL with half the memory."""
    rows = {
        OURS: {"median_ms": 1250.0, "peak_bytes": 40e9, "first_loss": 1.0},
        PLAIN: {"reason": "out of memory"},
        TRL: {"median_ms": 2500.0, "peak_bytes": 80e9, "first_loss": 2.0},
    }
    rows[OURS] |= {"part_ms": {"student": 300.0, "loss": 100.0, "other": 1.5}, **changes}
    case = case_values()
    finished = compare.result_rows(rows, case)
    parts = {"rollout": 1.0, "sync": 0.25, "student": 0.75}
    step = {"num_steps": 3, "seconds": 2.0, "part_seconds": parts, "completion_tokens_per_s": 4096}
    return {**case, "step": step, "rows": finished, "ratios": compare.ratios(finished)}


def test_rates_ratios_and_tables() -> None:
    case = gpu_case()
    ours = case["rows"][0]
    assert ours["utilisation"] == pytest.approx(0.5)  # 5e14 in 1.25 s of 8e14 a second
    assert ours["completion_tokens_per_s"] == pytest.approx(6553.6)
    assert case["ratios"] == {TRL: {"time": 2.0, "memory": 2.0}}
    lines = engine_case_table(case).splitlines()
    assert lines[:4] == [
        "| a step of 8b | ms | share |",
        "| --- | ---: | ---: |",
        "| rollout | 1,000 | 50.0% |",
        "| sync | 250 | 12.5% |",
    ]
    assert (
        "| `paint_engine` | 1,250 | 6,554 | 50.0% | 300 |  | 100 |  |  | 1.5 | 40,000 |  |" in lines
    )
    assert f"| {PLAIN} | out of memory |  |  |  |  |  |  |  |  |  |  |" in lines
    assert "TRL SDFTTrainer: 2.00 times the time, 2.00 times the memory." in lines[-1]
    result = {"name": "engine", "cases": [case], "command": "c", "commit": "", "device": "d"}
    result |= {"num_threads": 1, "versions": {"python": "3.12", "torch": "2.11.0", "cuda": "13"}}
    table = TABLES["engine", ""](result)
    assert table.endswith("Measured on d; torch 2.11.0, cuda 13; by `c`.")


def test_targets_of_the_8b_shape() -> None:
    assert engine_part.missed_targets(gpu_case()) == []
    assert engine_part.missed_targets({**gpu_case(median_ms=1e6), "case": "4b"}) == []
    missed = engine_part.missed_targets(gpu_case(median_ms=2000.0, peak_bytes=90e9))
    assert [text.split()[0] for text in missed] == ["utilisation", "1.25", "TRL"]
    assert "50.0% of GEMM, 40.0 GB; plain PyTorch loss out of memory" in engine_part.line(
        gpu_case()
    )
    alone = gpu_case()
    alone["rows"][-1] = {"loop": TRL, "kind": "peer", "status": "failed", "reason": "not installed"}
    alone["ratios"] = {}
    assert engine_part.missed_targets(alone) == ["TRL: not installed"]
    alone["rows"][-1]["reason"] = "out of memory"
    assert engine_part.missed_targets(alone) == []


def test_loops_on_a_gpu_run_one_after_another(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls to the GPU are replaced; a loop that does not fit into memory leaves the others."""
    made: list[str] = []

    def make(name: str, given: Bench) -> Any:
        made.append(name)
        if name == TRL:
            raise torch.cuda.OutOfMemoryError
        return make_loop(name, given)

    monkeypatch.setattr(timing, "make_loop", make)
    for name in ("reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 123)
    later = time.monotonic() + 300
    rows, rate = timing.time_each_on_gpu(bench, [OURS, PLAIN, TRL], 1, later)
    assert made == [OURS, TRL, PLAIN] and rate > 0
    assert rows[TRL] == {"reason": "out of memory"}
    assert all(rows[name]["peak_bytes"] == 123 for name in (OURS, PLAIN))
    assert rows[PLAIN]["first_loss"] == pytest.approx(rows[OURS]["first_loss"], rel=1e-4)
    none, _ = timing.time_each_on_gpu(bench, [OURS], 1, time.monotonic())
    assert none == {OURS: {"reason": "the time budget was used up"}}


def test_a_step_of_a_preset_is_measured_by_part(tmp_path: Path) -> None:
    case = preset_case("tiny", "--train.batch_size", "2", "--rollout.max_new_tokens", "8")
    bench = Bench(case, CPU, tmp_path)
    step = timing.whole_steps(bench, 2)
    assert set(step["part_seconds"]) == PARTS | {"rollout", "sync"}
    assert min(step["part_seconds"].values()) >= 0
    assert sum(step["part_seconds"].values()) == pytest.approx(step["seconds"])
    # The student sampled all rollouts of the training part.
    assert len(bench.rollouts) == 2
    assert all(0 < len(p.rollout.completion_ids) <= 8 for p in bench.rollouts)
    assert all(len(teacher_prompt_ids(p)) > len(p.rollout.prompt_ids) for p in bench.rollouts)


def test_memory_is_measured_in_another_process(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--device", "cpu", "--model", "small", "--rollouts", "4"]
    assert timing.extra_bytes(bench, OURS, arguments) > 0
    monkeypatch.setattr("sys.executable", "false")
    with pytest.raises(RuntimeError, match=f"{OURS} failed"):
        timing.extra_bytes(bench, OURS, arguments)


def test_the_gpu_checks_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"command": "c", "commit": "", "device": "d", "num_threads": 1, "versions": {}}
    found_file = tmp_path / "found.json"
    job = Job(CPU, True, tmp_path, found_file, time.monotonic() + 500, environment)
    summary = engine_part.run(job)
    assert job.failures == []
    assert all(name in summary for name in (OURS, PLAIN, TRL)) and "missed" not in summary
    rows = job.found["small"]["rows"]
    assert [row["status"] for row in rows] == ["measured"] * 3
    assert all(set(row["part_ms"]) == PARTS for row in rows[:2])
    assert all(row["loss_difference"] < 1e-4 for row in rows[1:])
    assert len(list(tmp_path.glob("engine-*.json"))) == 1
    monkeypatch.setattr(compare, "reason_against", lambda: "not installed")
    assert engine_part.run(job).endswith(f"{TRL} not installed") and job.failures == []
    late = Job(CPU, True, tmp_path, found_file, time.monotonic(), environment)
    assert engine_part.run(late) == "nothing was measured"
    monkeypatch.setattr(engine_part, "NEEDED", ("torch", "no_such_package"))
    assert engine_part.run(job).startswith("left out: needs no_such_package (pip install")


def test_operations_count_every_rollout_at_its_lengths(bench: Bench) -> None:
    loop = make_loop(OURS, bench)
    assert isinstance(loop, OwnLoop)
    one = [fixed_rollout([1] * 5, [1] * 9, [1] * 7)]
    counted, twice = operations(loop.run, one), operations(loop.run, one * 2)
    assert twice == {name: pytest.approx(2 * value) for name, value in counted.items()}
    # Three products of (7, 64) and (520, 64) in the loss.
    assert counted["loss"] == 3 * 2 * 7 * 64 * 520
    longer = operations(loop.run, [fixed_rollout([1] * 5, [1] * 20, [1] * 7)])
    assert longer["teacher"] > counted["teacher"] and longer["student"] == counted["student"]


def test_rollouts_reach_another_process_unchanged(tmp_path: Path) -> None:
    rollouts = random_rollouts(Lengths(3, 5, 4), 2, 100)
    write_rollouts(rollouts, tmp_path / "rollouts.json")
    assert read_rollouts(tmp_path / "rollouts.json") == rollouts
    assert rollouts[0] != rollouts[1]
    sizes = [(len(p.rollout.prompt_ids), len(teacher_prompt_ids(p))) for p in rollouts]
    assert sizes == [(3, 5)] * 2


@pytest.mark.parametrize(
    ("number", "most", "rows"), [(32, 32, 32), (8, 3, 2), (7, 3, 1), (4, 9, 4)]
)
def test_batches_of_one_size(number: int, most: int, rows: int) -> None:
    assert rows_a_batch(number, most) == rows


def test_what_the_command_measures_by_default() -> None:
    names = [case.name for case in engine.cases_of(engine.parse(["--device", "cpu"]))]
    assert names == ["tiny"]
    cases = engine.cases_of(engine.parse(["--device", "cuda", "--rollouts", "4"]))
    assert [case.name for case in cases] == ["1.7b", "4b", "8b"]
    assert cases[2].arguments[:2] == ("--preset", "paint-qwen3-8b")
    quick = engine.parse(["--device", "cpu", "--quick"])
    (case,) = engine.cases_of(quick)
    assert engine.case_arguments(case, quick)[-3:] == ["--preset", "tiny", "--quick"]
