"""What TensorBoard's and W&B's own readers find in what a run has logged."""

import json
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from paint_engine.files import read_jsonl
from paint_engine.monitor.loggers import check_loggers, wandb_id
from paint_engine.monitor.metrics import MetricsWriter

Main = Callable[[Sequence[str]], int]
STEP = {"loss": 0.25, "rollout_lag": 1, "skipped_steps": 0, "truncation_rate": 0.5}
EVALUATION = {"step": 5, "eval_avg_at_k": 0.5, "eval_mean_length": 80.0}
TEXT = "So <b>1</b> ![x](http://x)\n```\n\n# \\boxed{7} \ud800é"
SAMPLE = {
    "benchmark": "aime24",
    "problem_id": "aime.jsonl:1",
    "correct": True,
    "extracted": None,
    "num_tokens": 80,
    "text": TEXT,
}
WITHOUT = {"tensorboard": False, "wandb_project": None}


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """W&B as a laptop without a network has it, with its own files below a test's directory."""
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "of wandb" / name))
    yield
    wandb.teardown()


def open_writer(run_dir: Path, resume_step: int = 0, **changes: Any) -> MetricsWriter:
    run_dir.mkdir(parents=True, exist_ok=True)
    return MetricsWriter(run_dir, resume_step=resume_step, **{"config": {}, **WITHOUT, **changes})


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of a run's file: LevelDB's log format after a header of 7 bytes, in blocks of 32
    KiB, each fragment with checksum, length and type (1 whole, 2 first, 3 middle, 4 last)."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, parts = file.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while place < len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        checksum, length, kind = struct.unpack("<IHB", content[place : place + 7])
        part = content[place + 7 : place + 7 + length]
        assert checksum == zlib.crc32(bytes([kind]) + part)
        parts, place = parts + part, place + 7 + length
        if kind in (1, 4):
            yield Record.FromString(parts)
            parts = b""


def wandb_run(run_dir: Path) -> tuple[list[Any], list[dict[str, Any]]]:
    """The records of the directory's newest run, and the rows of its history."""
    import wandb

    # The file is whole when the service that writes it has ended.
    wandb.teardown()
    (file,) = (run_dir / "wandb" / "latest-run").resolve().glob("*.wandb")
    records = list(wandb_records(file))
    rows = []
    for record in records:
        if record.HasField("history"):
            items = record.history.item
            rows.append({i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items})
    return records, rows


def reports(records: Sequence[Any]) -> list[Any]:
    artifacts = [record.artifact for record in records if record.HasField("artifact")]
    artifacts += [
        record.request.log_artifact.artifact
        for record in records
        if record.request.HasField("log_artifact")
    ]
    return [artifact for artifact in artifacts if artifact.type == "report"]


def wandb_table(run_dir: Path, row: dict[str, Any]) -> dict[str, Any]:
    path = row["eval_samples.path"]
    return json.loads((run_dir / "wandb" / "latest-run" / "files" / path).read_text())


def tensorboard_events(run_dir: Path) -> dict[str, list[tuple[int, Any]]]:
    """What TensorBoard's server reads: (step, number or text) by tag."""
    from tensorboard.backend.event_processing import plugin_event_accumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = plugin_event_accumulator.EventAccumulator(str(run_dir / "tensorboard")).Reload()
    return {
        tag: [(e.step, make_ndarray(e.tensor_proto).item()) for e in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
    }


@pytest.mark.parametrize(
    ("package", "asked"),
    [("tensorboard", {"tensorboard": True}), ("wandb", {"wandb_project": "paint"})],
)
def test_absent_package_names_the_extra(
    package: str, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_loggers(**{**WITHOUT, **asked})
    monkeypatch.setattr("paint_engine.monitor.loggers.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=rf"not installed; run pip install -e '\.\[{package}\]' in"
    ):
        check_loggers(**{**WITHOUT, **asked})
    check_loggers(tensorboard=False, wandb_project=None)


def test_tensorboard_has_the_metrics_and_the_answers_as_they_are(tmp_path: Path) -> None:
    with open_writer(tmp_path, tensorboard=True) as writer:
        for step in (4, 5, 6):
            writer.write({"step": step, **STEP}, [])
        writer.write_evaluation(EVALUATION | {"step": 6}, [SAMPLE | {"num_tokens": 90}])
    # A resumed run repeats step 6.
    with open_writer(tmp_path, 5, tensorboard=True) as writer:
        writer.write_evaluation(EVALUATION, [SAMPLE])
        writer.write({"step": 6, **STEP, "loss": 0.125}, [])
    events = tensorboard_events(tmp_path)
    answers = events.pop("eval_samples/aime24/0/text_summary")
    assert events.keys() == {*STEP, *EVALUATION} - {"step"}
    assert events["loss"] == [(4, 0.25), (5, 0.25), (6, 0.125)]
    assert events["eval_mean_length"] == [(5, 80.0)]
    ((step, text),) = answers
    shown = text.decode()
    assert step == 5
    assert shown.endswith(
        "num_tokens:\n\n    80\n\n"
        "text:\n\n    So <b>1</b> ![x](http://x)\n    ```\n    \n    # \\boxed{7} ?é"
    )


@pytest.mark.filterwarnings("ignore:html5lib's sanitizer is deprecated:DeprecationWarning")
def test_the_page_of_tensorboard_follows_nothing_in_an_answer(tmp_path: Path) -> None:
    from tensorboard.plugin_util import markdown_to_safe_html

    with open_writer(tmp_path, tensorboard=True) as writer:
        writer.write_evaluation(EVALUATION, [SAMPLE])
    ((_, text),) = tensorboard_events(tmp_path)["eval_samples/aime24/0/text_summary"]
    page = markdown_to_safe_html(text)
    assert "<img" not in page and "<b>" not in page and "<h1" not in page
    assert "So &lt;b&gt;1&lt;/b&gt; ![x](http://x)\n```" in page


@pytest.mark.usefixtures("offline")
def test_wandb_has_the_metrics_a_table_of_answers_and_the_report(tmp_path: Path) -> None:
    run_dir, report = tmp_path / "run", tmp_path / "report.html"
    report.write_text("<html>" + 40_000 * "x")
    settings = {"wandb_project": "paint", "config": {"train": {"seed": 3}}}
    with open_writer(run_dir, **settings) as writer:
        writer.write({"step": 5, **STEP}, [])
        writer.write_evaluation(EVALUATION, [SAMPLE, SAMPLE | {"correct": False}])
        writer.write({"step": 6, **STEP, "loss": 0.125}, [])
        writer.add_report(report)
    records, rows = wandb_run(run_dir)
    fifth, sixth = rows
    for name, value in {**STEP, "eval_avg_at_k": 0.5, "eval_mean_length": 80.0}.items():
        assert fifth[name] == value, name
    assert (fifth["_step"], sixth["_step"], sixth["loss"]) == (5, 6, 0.125)
    assert "eval_avg_at_k" not in sixth
    table = wandb_table(run_dir, fifth)
    assert table["columns"] == list(SAMPLE)
    written = TEXT.replace("\ud800", "?")
    assert table["data"] == [
        ["aime24", "aime.jsonl:1", correct, None, 80, written] for correct in (True, False)
    ]
    (artifact,) = reports(records)
    assert artifact.name == f"report-{wandb_id(run_dir)}"
    (entry,) = artifact.manifest.contents
    assert (entry.path, entry.size) == ("report.html", report.stat().st_size)
    (started,) = [record.run for record in records if record.HasField("run")]
    assert (started.run_id, started.project) == (wandb_id(run_dir), "paint")
    assert json.loads(next(u.value_json for u in started.config.update if u.key == "train")) == {
        "seed": 3
    }


@pytest.mark.usefixtures("offline")
def test_runs_in_directories_of_one_name_have_ids_of_their_own(tmp_path: Path) -> None:
    started = []
    for parent, resume_step in (("a", 0), ("b", 0), ("a", 3)):
        run_dir = tmp_path / parent / "run"
        open_writer(run_dir, resume_step, wandb_project="paint").close()
        started += [record.run for record in wandb_run(run_dir)[0] if record.HasField("run")]
        shutil.rmtree(run_dir / "wandb")
    first, second, resumed = started
    assert first.run_id == resumed.run_id != second.run_id
    assert {run.display_name for run in started} == {"run"}


@pytest.mark.parametrize(
    "content", [b"", b"../../other", b"0" * 17, b"0" * 5000, b"\x1b[2J\xff", b"a" * 15 + b"\n\nb"]
)
def test_an_id_that_no_run_has_written_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "wandb_id.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"wandb_id\.txt: got '.*'; needs the run's id in W&B"):
        wandb_id(tmp_path)


@pytest.mark.usefixtures("offline")
def test_a_whole_run_logs_its_evaluations_with_answers_and_its_report(
    command: list[str], run_main: Main, tmp_path: Path
) -> None:
    own = ["--run.tensorboard", "true", "--run.wandb_project", "paint"]
    own += ["--run.samples_per_evaluation", "2", "--train.num_steps", "2"]
    assert run_main([*command, *own]) == 0
    run_dir = tmp_path / "run"
    answers = read_jsonl(run_dir / "evaluations" / "step-2.jsonl")
    events, (records, rows) = tensorboard_events(run_dir), wandb_run(run_dir)
    for name in ("eval_avg_at_k", "eval_mean_length", "eval_truncation_rate"):
        assert [step for step, _ in events[name]] == [0, 2]
        assert [name in row for row in rows] == [True, False, True]
    for name in ("rollout_lag", "skipped_steps", "completion_length", "truncation_rate"):
        assert [step for step, _ in events[name]] == [1, 2]
        assert [name in row for row in rows] == [False, True, True]
    shown = wandb_table(run_dir, rows[-1])
    place = {name: shown["columns"].index(name) for name in shown["columns"]}
    firsts = [one for one in answers if one.get("sample_index") == 0][:2]
    assert len(shown["data"]) == len(firsts) == 2
    for row, first in zip(shown["data"], firsts, strict=True):
        for name in ("problem_id", "text", "correct", "num_tokens", "truncated"):
            assert row[place[name]] == first[name]
    texts = [tag for tag in events if tag.startswith("eval_samples/")]
    assert len(texts) == 2 and [step for step, _ in events[texts[0]]] == [0, 2]
    (artifact,) = reports(records)
    (entry,) = artifact.manifest.contents
    assert entry.size == (run_dir / "report.html").stat().st_size
