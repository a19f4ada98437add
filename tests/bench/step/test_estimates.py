"""The measured steps of the estimates train as their cases say; predictions and their table."""

import json
import math
from pathlib import Path

import pytest

from bench.plots import RESULTS, TABLES
from bench.step import estimates
from bench.step.estimates import CASES, PLAIN, Sizes, make_loop, measure_estimates, row_of
from paint_engine.types import TeacherView, TrainExample

SIZES = Sizes(rollouts=4, completion=6)


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setattr(estimates, "NUM_TOKENS", 1024)
    monkeypatch.setattr(
        estimates, "MODELS", {"student": (64, 1), "wide": (128, 2), "narrow": (64, 1)}
    )
    return estimates.write_models(tmp_path)


def view_of(example: TrainExample) -> TeacherView:
    assert example.teacher_view is not None
    return example.teacher_view


def test_every_case_steps_on_the_same_rollouts(models: dict[str, str], tmp_path: Path) -> None:
    loops, flops = {}, {}
    for place, (name, case) in enumerate(CASES.items()):
        run = estimates.open_case(case, models, SIZES, tmp_path / f"run-{place}")
        loops[name], flops[name] = make_loop(case, run)
        loops[name].step()
        assert math.isfinite(loops[name].losses[0]), name
    plain = [example.rollout for example in loops[PLAIN].rollouts]
    assert all([e.rollout for e in loop.rollouts] == plain for loop in loops.values())
    assert {len(rollout.completion_ids) for rollout in plain} == {SIZES.completion}
    assert {view_of(e).scorers for e in loops["both, mixed"].rollouts} == {(0, 1)}
    assert all(e.served is not None for e in loops["a server"].rollouts)
    assert "teacher" not in flops["a server"]

    wide, narrow = flops["a wider model"]["teacher"], flops["a narrower model"]["teacher"]
    assert flops["both, mixed"]["teacher"] == wide + narrow
    half, whole = flops["both, half of the rollouts"], flops["both, mixed"]
    assert half == {name: pytest.approx(size / 2) for name, size in whole.items()}
    # GRPO's loss adds the student's logits and the gradient back: two products of three.
    two_losses = flops["the base, `grpo_paint`"]["loss"]
    assert two_losses == pytest.approx(flops[PLAIN]["loss"] * 5 / 3)


def test_times_are_compared_with_the_plain_step_s(models: dict[str, str], tmp_path: Path) -> None:
    assert models
    found = measure_estimates(["a wider model"], SIZES, 1, tmp_path)
    assert [row["teacher"] for row in found["rows"]] == [PLAIN, "a wider model"]
    first, second = found["rows"]
    assert first["measured"] == first["predicted"] == 1.0 and first["error"] == 0.0
    assert second["measured"] > 0 and second["predicted"] > 1


def test_the_error_of_a_prediction_and_its_table() -> None:
    row = row_of({"teacher": 6e9, "loss": 2e9}, [1.5, 1.6, 1.9], {"teacher": 3e9, "loss": 2e9})
    assert row["measured"] == row["predicted"] == 1.6 and row["error"] == 0.0
    row = row_of({"loss": 8e9}, [2.0], {"loss": 5e9})
    assert row["error"] == pytest.approx(-0.2)
    result = {
        "name": "step_estimates",
        "models": {"student": [64, 1]},
        "num_tokens": 1024,
        "rollouts": 4,
        "completion": 6,
        "rounds": 1,
        "plain_ms": 1250.0,
        "rows": [{"teacher": "a wider model", **row}],
        "device": "d",
        "num_threads": 1,
        "versions": {"python": "3.12", "torch": "2.11.0"},
        "commit": "",
        "command": "c",
    }
    lines = TABLES["step_estimates", ""](result).splitlines()
    assert "| a wider model | 0.008 | 2.00 | 2.00 to 2.00 | 1.60 | -20.0% |" in lines
    assert "1,250 ms" in lines[-1] and "student H 64 with 1 layers" in lines[-1]


def test_the_measured_steps_are_within_fifteen_percent_of_their_estimate(tmp_path: Path) -> None:
    """The operations are counted anew, at the sizes of the measurement."""
    result = json.loads((RESULTS / "step-estimates-cpu.json").read_text())
    assert [row["teacher"] for row in result["rows"]] == list(CASES)
    sizes = Sizes(result["rollouts"], result["completion"])
    models, flops = estimates.write_models(tmp_path), {}
    for row in result["rows"]:
        name = row["teacher"]
        run = estimates.open_case(CASES[name], models, sizes, tmp_path / f"run-{len(flops)}")
        flops[name] = make_loop(CASES[name], run)[1]
        assert flops[name] == pytest.approx(row["flops"], rel=1e-9), name
        predicted = sum(flops[name].values()) / sum(flops[PLAIN].values())
        assert abs(predicted / row["measured"] - 1) < 0.15, name
