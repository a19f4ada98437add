"""What lies in a run directory is data: planted links lead nowhere, and broken files are named."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from exit_codes import exit_code

from paint_engine import evaluate, export
from paint_engine.report import __main__ as report

Main = Callable[[Sequence[str]], int]
SECRET = "kept\n"


@pytest.fixture(scope="module")
def finished(
    model_dir: Path,
    write_rows: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
    run_main: Main,
) -> Path:
    """A run of 2 steps, with an evaluation before and after, both checkpoints kept."""
    work = tmp_path_factory.mktemp("finished")
    settings = {
        "model.name_or_path": model_dir,
        "data.path": write_rows(work / "train.jsonl"),
        "eval.path": write_rows(work / "test.jsonl", 3),
        "run.dir": work / "run",
        "train.num_steps": 2,
        "train.batch_size": 2,
        "train.device": "cpu",
        "rollout.max_new_tokens": 8,
        "eval.max_new_tokens": 4,
        "eval.num_samples": 1,
        "lora.rank": 4,
        "checkpoint.every": 1,
    }
    assert run_main([part for k, v in settings.items() for part in (f"--{k}", str(v))]) == 0
    return work / "run"


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run", symlinks=True)


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """What a link leads to: a file, and a directory with a file."""
    directory = tmp_path / "home"
    (directory / "step-2").mkdir(parents=True)
    for file in (directory / "file", directory / "step-2" / "file"):
        file.write_text(SECRET)
    return directory


def contents(directory: Path) -> dict[str, str]:
    return {
        str(p.relative_to(directory)): p.read_text() for p in directory.rglob("*") if p.is_file()
    }


def commands(run_dir: Path, run_main: Main) -> dict[str, Callable[[], int]]:
    """Every command that is given a run directory."""
    output = run_dir.with_name("exported")
    adapter = ("--adapter", run_dir, "--benchmarks", "tiny", "--output", run_dir.with_name("e"))
    return {
        "train": lambda: run_main(["--resume", str(run_dir), "--train.num_steps", "3"]),
        "evaluate": lambda: exit_code(evaluate.main, *adapter),
        "compare": lambda: exit_code(evaluate.main, "compare", run_dir, run_dir),
        "report": lambda: exit_code(report.main, run_dir),
        "export": lambda: exit_code(export.main, run_dir, output),
    }


@pytest.mark.parametrize(
    ("name", "target"),
    [
        *(("metrics.jsonl", "file"), ("samples.jsonl", "file"), ("config.toml", "file")),
        *(("report.html", "file"), ("summary.json", "file"), (".lock-1", "file")),
        *(("checkpoints", "."), ("checkpoints/step-2", "step-2"), ("checkpoints/best", "step-2")),
        *(("evaluations", "."), ("tensorboard", "."), ("evaluations/step-2.jsonl", "file")),
        ("checkpoints/step-2/adapter_model.safetensors", "file"),
        ("checkpoints/step-2/trainer", "step-2"),
    ],
)
def test_a_planted_link_is_refused_and_not_followed(
    name: str,
    target: str,
    run_dir: Path,
    outside: Path,
    run_main: Main,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = contents(outside)
    path = run_dir / name
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(outside / target)
    for command, main in commands(run_dir, run_main).items():
        capsys.readouterr()
        assert main() == 2, command
        assert f"{path} is a" in capsys.readouterr().out, command
        assert contents(outside) == before, command


def test_a_planted_pipe_is_refused_and_does_not_hang(
    run_dir: Path, run_main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_dir / "metrics.jsonl").unlink()
    os.mkfifo(run_dir / "metrics.jsonl")
    for command, main in commands(run_dir, run_main).items():
        assert main() == 2, command
        assert "metrics.jsonl is a named pipe" in capsys.readouterr().out, command


@pytest.mark.parametrize("name", ["metrics.jsonl", ".metrics.jsonl.unfinished"])
def test_a_second_name_of_a_file_of_ones_own_is_not_written(
    name: str, run_dir: Path, outside: Path, run_main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    """Archives have hard links too; and links wait at names that a writer is known to use."""
    before = contents(outside)
    if name == "metrics.jsonl":
        (outside / "file").write_bytes((run_dir / name).read_bytes())
        before = contents(outside)
        (run_dir / name).unlink()
        (run_dir / name).hardlink_to(outside / "file")
    else:
        (run_dir / name).symlink_to(outside / "file")
        (run_dir / ".report.html.unfinished").symlink_to(outside / "file")
    code = commands(run_dir, run_main)["train"]()
    assert contents(outside) == before
    if name == "metrics.jsonl":
        assert code == 1 and "has another name too" in capsys.readouterr().out
    else:
        assert code == 0


def test_the_run_directory_itself_may_be_a_link(
    run_dir: Path, run_main: Main, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(run_dir)
    assert run_main(["--resume", str(tmp_path / "link"), "--train.num_steps", "3"]) == 0
    assert (run_dir / "checkpoints/step-3").is_dir() and (tmp_path / "link").is_symlink()


DEEP = 100_000 * "[" + 100_000 * "]"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("metrics.jsonl", '{"step": 1}\n{"loss": 0.1}\n', "step"),
        ("metrics.jsonl", '{"step": "1"}\n', "step"),
        ("metrics.jsonl", '{"step": NaN}\n', "NaN"),
        ("metrics.jsonl", DEEP + "\n", "nested too deeply"),
        ("data.json", '{"train": {"digest": 3}}', "train"),
        ("versions.json", "[]", "got []"),
        ("evaluations/step-2.json", '{"seconds": 2.0}', "benchmark"),
        ("evaluations/step-2.jsonl", '{"problem_id": 3}\n', "problem_id"),
    ],
)
def test_a_broken_record_stops_a_resume_with_its_name(
    name: str,
    content: str,
    said: str,
    run_dir: Path,
    run_main: Main,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (run_dir / name).write_text(content)
    assert run_main(["--resume", str(run_dir), "--train.num_steps", "3"]) in (1, 2)
    printed = capsys.readouterr().out
    assert name.rsplit("/")[-1] in printed and said in printed
    assert (run_dir / name).read_text() == content


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("summary.json", '{"seed": 1}', "num_problems"),
        ("summary.json", DEEP, "nested too deeply"),
        ("metrics.jsonl", '{"step": 1, "loss": "x"}\n', "loss"),
        ("metrics.jsonl", '{"loss": 1}\n', "step"),
        ("samples.jsonl", '{"step": 1}\n', "problem_id"),
        ("samples.jsonl", '{"step": 1, "tokens": 3, "problem_id": "p"}\n', "samples.jsonl"),
        ("config.toml", "train = 3\n", "train"),
        ("config.toml", f"x = {DEEP}\n", "config.toml"),
    ],
)
def test_a_broken_record_ends_a_report_with_its_name(
    name: str, content: str, said: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_dir / name).write_text(content)
    assert exit_code(report.main, run_dir) == 2
    printed = capsys.readouterr().out
    assert name in printed and said in printed


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("step", "2"), ("step", -1), ("seconds_train", None), ("seconds_train", "9")),
        *(("sampled_ahead", [1, [[[5], [0.0, 0.0], True]]]), ("sampled_ahead", 3)),
        *(("sampled_ahead", [1, [[[10**9], [0.0], True]] * 2]), ("skipped", {"total": -1})),
    ],
)
def test_a_crafted_state_is_refused_by_field(
    field: str,
    value: object,
    run_dir: Path,
    run_main: Main,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The manifest has the right checksum, as one who crafts a state would see to."""
    from paint_engine.checkpoint.directory import file_names, seal

    checkpoint = run_dir / "checkpoints/step-2"
    record = json.loads((checkpoint / "trainer_state.json").read_text())
    record["state"][field] = value
    (checkpoint / "trainer_state.json").write_text(json.dumps(record))
    (checkpoint / "manifest.json").unlink()
    (checkpoint / "manifest.json").write_text(json.dumps(seal(checkpoint, file_names(checkpoint))))
    assert run_main(["--resume", str(run_dir), "--train.num_steps", "3"]) == 2
    printed = capsys.readouterr().out
    assert "trainer_state.json" in printed and field in printed


@pytest.mark.parametrize("name", ["trainer", "rng-0.safetensors"])
def test_crafted_numbers_in_a_checkpoint_are_refused_before_they_are_used(
    name: str, run_dir: Path, run_main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    """NaN in a trained weight; a state with which NumPy reads beyond its memory."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    from paint_engine.checkpoint.directory import file_names, seal

    checkpoint = run_dir / "checkpoints/step-2"
    (file,) = (checkpoint / name).iterdir() if name == "trainer" else [checkpoint / name]
    tensors = load_file(file)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    if name == "trainer":
        tensors[max(tensors)].view(-1)[0] = torch.nan
    else:
        metadata["numpy"] = json.dumps(["MT19937", [0] * 624, 10**9, 0, 0.0])
    save_file(tensors, file, metadata=metadata)
    (checkpoint / "manifest.json").unlink()
    (checkpoint / "manifest.json").write_text(json.dumps(seal(checkpoint, file_names(checkpoint))))
    assert run_main(["--resume", str(run_dir), "--train.num_steps", "3"]) == 2
    printed = capsys.readouterr().out
    said = (
        "holds nan; needs finite values" if name == "trainer" else "numpy: position: got 10000000"
    )
    assert f"{checkpoint / name}: " in printed and said in printed
