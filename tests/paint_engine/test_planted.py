"""What lies in a run directory is data: planted links lead nowhere, and broken files are named."""

import json
import os
import shutil
import subprocess
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


SUMMARY = {
    **{"num_problems": 3, "num_samples": 1, "seconds_train": 1.0, "seconds_eval": 1.0},
    **{"avg_at_k_before": 0.5, "avg_at_k_after": 0.5},
    **{"paired_difference": 0.1, "paired_difference_ci95": [0.0, 0.2]},
}
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
        (
            "summary.json",
            json.dumps(SUMMARY | {"paired_difference_ci95": None}),
            "both, or neither",
        ),
        ("summary.json", json.dumps(SUMMARY | {"paired_difference": None}), "both, or neither"),
        ("summary.json", json.dumps(SUMMARY | {"seconds_train": 1e308}), "seconds_train"),
        ("summary.json", json.dumps(SUMMARY | {"seed": "x"}), "seed"),
        ("summary.json", json.dumps(SUMMARY | {"avg_at_k_after": 1e300}), "avg_at_k_after"),
        ("metrics.jsonl", '{"step": 1, "loss": 1e308}\n{"step": 2, "loss": -1e308}\n', "1e+308"),
        ("metrics.jsonl", f'{{"step": 1{300 * "0"}}}\n', "step"),
        ("config.toml", f"[{2999 * 'a.'}a]\n", "nested too deeply"),
        ("config.toml", f"x = [{{{2999 * 'a.'}a = 1}}]\n", "nested too deeply"),
        ("config.toml", f"[train]\nnum_steps = 0x{6000 * 'f'}\n", "num_steps"),
        ("config.toml", f"[train]\nnum_steps = {10**30}\n", "num_steps"),
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


@pytest.mark.parametrize(
    "change",
    [
        {"shown": None, "mask_ratio": None},
        {"shown": None, "context": None, "source": None},
        *({key: None} for key in ("overlap", "mask_ratio", "shown", "anchors")),
        *({key: None} for key in ("context", "source")),
        *({"overlap": value} for value in ("x", 1e308, -0.5)),
        *({"mask_ratio": 2.0}, {"anchors": [3]}, {"reward": 1e308, "advantage": 0.0}),
        *({"reward": 1.0}, {"advantage": 1.0}, {"token_loss": [1e308]}),
    ],
)
def test_a_sample_that_no_recipe_records_is_named(
    change: dict[str, object], run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """None takes a key away."""
    rows = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    assert exit_code(report.main, run_dir) == 0
    changed = [{k: v for k, v in (row | change).items() if v is not None} for row in rows]
    (run_dir / "samples.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in changed))
    capsys.readouterr()
    assert exit_code(report.main, run_dir) == 2
    assert "samples.jsonl: a sample of step 1: " in capsys.readouterr().out


def test_a_run_ends_well_though_its_report_cannot_be_made(
    run_dir: Path, run_main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    lines[0] = json.dumps(json.loads(lines[0]) | {"loss": 1e308})
    (run_dir / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    assert run_main(["--resume", str(run_dir), "--train.num_steps", "3"]) == 0
    printed = capsys.readouterr().out
    assert "note: no report was made: " in printed and "1e+308" in printed
    assert f"python -m paint_engine.report {run_dir}" in " ".join(printed.split())
    assert "run directory:" in printed and (run_dir / "checkpoints/step-3").is_dir()


@pytest.mark.parametrize(
    ("section", "line", "said"),
    [
        ("model", 'name_or_path = ""', "name_or_path: got ''"),
        ("model", f'name_or_path = "/{5000 * "a"}"', "name_or_path: got '/aaa"),
        ("data", f'path = "{5000 * "a"}.jsonl"', "data.path: got 'aaa"),
        ("train", f"batch_size = {10**30}", "train.batch_size: got 1000"),
        ("train", f"num_steps = 0x{6000 * 'f'}", "train.num_steps: got an integer of about 7,225"),
        ("optim", f"learning_rate = 0x{6000 * 'f'}", "optim.learning_rate: got an integer of"),
        ("prompts", "instruction = 3", "instruction: got 3"),
    ],
)
def test_a_crafted_setting_is_refused_by_its_key(
    section: str,
    line: str,
    said: str,
    run_dir: Path,
    run_main: Main,
    capsys: pytest.CaptureFixture[str],
) -> None:
    key, file = line.split(" = ")[0], run_dir / "config.toml"
    tables = file.read_text().split("\n\n")
    place = next(i for i, table in enumerate(tables) if table.startswith(f"[{section}]\n"))
    kept = [old for old in tables[place].splitlines() if not old.startswith(f"{key} = ")]
    tables[place] = "\n".join([*kept, line])
    file.write_text("\n\n".join(tables))
    reads = {"model": ("train", "evaluate", "export"), "prompts": ("train", "evaluate")}
    for command in reads.get(section, ("train",)):
        capsys.readouterr()
        assert commands(run_dir, run_main)[command]() == 2, command
        printed = " ".join(capsys.readouterr().out.split())
        assert str(file) in printed and said in printed and "; needs" in printed, command
        assert len(printed) < 1500 and "pydantic" not in printed


def test_directories_that_are_too_deep_are_named(
    run_dir: Path, run_main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_dir / "evaluations"
    for _ in range(1500):
        path /= "d"
        path.mkdir()
    try:
        for command, main in commands(run_dir, run_main).items():
            assert main() == 2, command
            assert "in more than 10 others" in capsys.readouterr().out, command
    finally:
        subprocess.run(["rm", "-r", run_dir / "evaluations" / "d"], check=True)
