from pathlib import Path
from typing import Any

import pytest

from paint_engine.files import read_jsonl
from paint_engine.monitor.metrics import (
    MetricsWriter,
    NotFinite,
    check_finite,
    is_evaluation,
)

METRICS = {
    "loss": 0.0123,
    "token_kl": 0.0456,
    "overlap": 0.62,
    "accuracy": 0.71,
    "tokens_per_s": 1234.4,
}


def open_writer(run_dir: Path, resume_step: int = 0, **changes: Any) -> MetricsWriter:
    settings = {"tensorboard": False, "wandb_project": None, "config": {}} | changes
    return MetricsWriter(run_dir, resume_step=resume_step, **settings)


def test_lines_are_on_disk_as_soon_as_written(tmp_path: Path) -> None:
    with open_writer(tmp_path) as writer:
        for step in (1, 2):
            samples = [{"step": 2, "problem": "π ≈ 3 \u2028 \ud800", "selected": [True]}]
            entry = {"step": step, "loss": -0.5 * step, "checker_errors": 0}
            writer.write(entry, samples if step == 2 else [])
        metrics = read_jsonl(tmp_path / "metrics.jsonl")
        samples = read_jsonl(tmp_path / "samples.jsonl")
    assert metrics == [
        {"step": 1, "loss": -0.5, "checker_errors": 0},
        {"step": 2, "loss": -1.0, "checker_errors": 0},
    ]
    assert samples == [{"step": 2, "problem": "π ≈ 3 \u2028 \ud800", "selected": [True]}]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_metric_that_is_no_finite_number_is_refused(value: float) -> None:
    message = r"^step 7: the metric 'token_kl' is .*; needs a finite number; (?!.*learning_rate)"
    with pytest.raises(NotFinite, match=message):
        check_finite(METRICS | {"step": 7, "token_kl": value})
    check_finite({"step": 7, **METRICS})


@pytest.mark.parametrize("value", [[0.1, float("nan")], {"inner": float("inf")}, object(), b"x"])
def test_sample_without_json_form_is_refused(tmp_path: Path, value: Any) -> None:
    with (
        open_writer(tmp_path) as writer,
        pytest.raises(ValueError, match=r"'token_kl' of step 3 cannot be written as JSON"),
    ):
        writer.write({"step": 3}, [{"step": 3, "problem": "p", "token_kl": value}])
    assert read_jsonl(tmp_path / "samples.jsonl") == []


def test_resume_drops_later_steps_and_a_line_cut_short(tmp_path: Path) -> None:
    with open_writer(tmp_path) as writer:
        for step in range(1, 6):
            writer.write({"step": step, "loss": 1 / step}, [{"step": step, "problem": "p"}])
    uninterrupted = (tmp_path / "metrics.jsonl").read_bytes()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 6, "loss": 0.1')
    with open_writer(tmp_path, resume_step=3) as writer:
        assert [m["step"] for m in read_jsonl(tmp_path / "samples.jsonl")] == [1, 2, 3]
        for step in (4, 5):
            writer.write({"step": step, "loss": 1 / step}, [])
    assert (tmp_path / "metrics.jsonl").read_bytes() == uninterrupted
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "samples.jsonl"]


def test_an_evaluation_is_a_line_of_its_own_and_written_once(tmp_path: Path) -> None:
    before, after = ({"step": step, "eval_avg_at_k": 0.1 + 0.1 * step} for step in (0, 2))
    steps = [{"step": step, "loss": 0.5} for step in (1, 2, 3)]
    assert [is_evaluation(metrics) for metrics in (before, *steps, {"step": 1})] == [True] + [
        False
    ] * 4
    with open_writer(tmp_path) as writer:
        writer.write_evaluation(before)
        writer.write(steps[0], [])
        writer.write(steps[1], [])
        writer.write_evaluation(after)
        writer.write(steps[2], [])
    whole = [before, *steps[:2], after, steps[2]]
    assert read_jsonl(tmp_path / "metrics.jsonl") == whole
    # A resumed run passes both again.
    with open_writer(tmp_path, resume_step=2) as writer:
        assert read_jsonl(tmp_path / "metrics.jsonl") == whole[:4]
        writer.write_evaluation(before)
        writer.write_evaluation(after)
        writer.write(steps[2], [])
    assert read_jsonl(tmp_path / "metrics.jsonl") == whole
    # With other settings of the evaluation it has other numbers.
    other = after | {"eval_avg_at_k": 0.9}
    with open_writer(tmp_path, resume_step=2) as writer:
        writer.write_evaluation(other)
        writer.write_evaluation(other)
    assert read_jsonl(tmp_path / "metrics.jsonl") == [*whole[:4], other]


def test_an_evaluation_before_the_first_step_is_kept(tmp_path: Path) -> None:
    for _ in range(2):
        with open_writer(tmp_path) as writer:
            writer.write_evaluation({"step": 0, "eval_avg_at_k": 0.5})
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 0, "eval_avg_at_k": 0.5}]


def test_fresh_run_starts_with_empty_files(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.1}\n')
    open_writer(tmp_path).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
