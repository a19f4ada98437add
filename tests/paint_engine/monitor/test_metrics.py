import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from paint_engine.files import read_jsonl
from paint_engine.monitor.metrics import (
    MetricsWriter,
    NotFinite,
    check_finite,
    check_loggers,
    is_evaluation,
    wandb_id,
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


@pytest.mark.parametrize(
    ("package", "asked"),
    [
        ("tensorboard", {"tensorboard": True, "wandb_project": None}),
        ("wandb", {"tensorboard": False, "wandb_project": "paint"}),
    ],
)
def test_absent_package_names_the_extra(
    package: str, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paint_engine.monitor.metrics.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"not installed; run pip install '\.\[{package}\]' in"):
        check_loggers(**asked)
    check_loggers(tensorboard=False, wandb_project=None)


def test_numbers_are_mirrored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    class SummaryWriter:
        def __init__(self, directory: str, purge_step: int) -> None:
            calls.append((directory, purge_step))

        def add_scalar(self, *arguments: object) -> None:
            calls.append(arguments)

        def flush(self) -> None:
            calls.append(("flushed",))

        def close(self) -> None:
            calls.append(("closed",))

    run = SimpleNamespace(
        log=lambda numbers, step: calls.append((numbers, step)),
        finish=lambda: calls.append(("finished",)),
    )
    wandb = SimpleNamespace(init=lambda **settings: calls.append((settings["id"],)) or run)
    tensorboard = SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", tensorboard)
    with open_writer(tmp_path, 4, tensorboard=True, wandb_project="paint") as writer:
        writer.write({"step": 5, "loss": 0.25}, [])
        writer.write_evaluation({"step": 5, "eval_tokens_per_correct": 80.0})
    assert calls == [
        (str(tmp_path / "tensorboard"), 5),
        (wandb_id(tmp_path),),
        ("loss", 0.25, 5),
        ("flushed",),
        ({"loss": 0.25}, 5),
        ("eval_tokens_per_correct", 80.0, 5),
        ("flushed",),
        ({"eval_tokens_per_correct": 80.0}, 5),
        ("closed",),
        ("finished",),
    ]


def test_runs_in_directories_of_one_name_have_ids_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, Any]] = []

    def init(**settings: Any) -> SimpleNamespace:
        started.append(settings)
        return SimpleNamespace(finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for parent, resume_step in (("a", 0), ("b", 0), ("a", 3)):
        run_dir = tmp_path / parent / "run"
        run_dir.mkdir(parents=True, exist_ok=True)
        open_writer(run_dir, resume_step, wandb_project="paint").close()
    first, second, resumed = started
    assert first["id"] == resumed["id"] != second["id"]
    assert [settings["name"] for settings in started] == ["run"] * 3
    assert {settings["resume"] for settings in started} == {"allow"}


@pytest.mark.parametrize(
    "content", [b"", b"../../other", b"0" * 17, b"0" * 5000, b"\x1b[2J\xff", b"a" * 15 + b"\n\nb"]
)
def test_an_id_that_no_run_has_written_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "wandb_id.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"wandb_id\.txt: got '.*'; needs the run's id in W&B"):
        wandb_id(tmp_path)
