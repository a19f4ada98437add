"""The evaluations' command line: killed and continued, adapters and checkpoints, and mistakes."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from exit_codes import exit_code
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from paint_engine import evaluate
from paint_engine.checkpoint.directory import best_checkpoint, list_checkpoints
from paint_engine.checkpoint.merge import Survival, build_trained
from paint_engine.config.sections import ModelSection
from paint_engine.files import read_jsonl
from paint_engine.rollout.choose import vllm_is_installed

DEADLINE_S = 600.0


main = partial(exit_code, evaluate.main)


def numbers(directory: Path) -> dict[str, Any]:
    """What must not depend on how an evaluation was cut."""
    results = json.loads((directory / "results.json").read_text())
    for benchmark in results["benchmarks"].values():
        del benchmark["seconds"]
    return {key: results[key] for key in ("benchmarks", "macro", "settings", "subject")}


TINY = (
    *("--model", "tiny", "--benchmarks", "tiny", "--num-problems", 5, "--num-samples", 4),
    *("--max-new-tokens", 70, "--thinking", "false", "--max-sequences", 1),
    *("--engine", "builtin", "--device", "cpu", "--output"),
)


def kill_in_the_middle(directory: Path) -> None:
    """Runs the command in a process of its own, which SIGKILL ends two samples later."""
    partial = directory / "tiny.rank-0.jsonl"

    def num_lines() -> int:
        return partial.read_bytes().count(b"\n") if partial.exists() else 1

    before, deadline = num_lines(), time.monotonic() + DEADLINE_S
    command = [sys.executable, "-m", "paint_engine.evaluate", *map(str, TINY), str(directory)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while num_lines() < before + 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert before + 2 <= num_lines() < 1 + 20


def test_killed_twice_and_continued_it_has_the_numbers_of_an_uninterrupted_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(*TINY, tmp_path / "whole") == 0
    cut = tmp_path / "cut"
    for _ in range(2):
        kill_in_the_middle(cut)
    # And the second kill in the middle of a line.
    partial = cut / "tiny.rank-0.jsonl"
    partial.write_bytes(partial.read_bytes()[:-10])
    num_finished = partial.read_bytes().count(b"\n") - 1
    assert num_finished >= 3
    capsys.readouterr()
    assert main(*TINY, cut) == 0
    assert f"tiny ({20 - num_finished} left for this process)" in capsys.readouterr().out
    assert (cut / "tiny.jsonl").read_bytes() == (tmp_path / "whole" / "tiny.jsonl").read_bytes()
    assert numbers(cut) == numbers(tmp_path / "whole")
    assert len(read_jsonl(cut / "tiny.jsonl")) == 20
    # Samples that differ, or else a wrong one would not show.
    assert len({row["text"] for row in read_jsonl(cut / "tiny.jsonl")}) > 10


@pytest.fixture
def arguments(model_dir: Path, tmp_path: Path, write_rows: Callable[..., Path]) -> tuple:
    """An evaluation of seconds, but for --output."""
    rows = write_rows(tmp_path / "rows.jsonl", 3)
    return (
        *("--model", model_dir, "--benchmarks", rows, "--num-samples", 2),
        *("--max-new-tokens", 6, "--engine", "builtin", "--device", "cpu"),
    )


def test_a_finished_one_is_shown_again_and_another_setting_refused(
    arguments: tuple,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    assert main(*arguments, "--output", out) == 0
    before = numbers(out)
    # As after a kill before they were deleted.
    header = json.loads((out / "rows.json").read_text())
    del header["seconds"]
    left = out / "rows.rank-0.jsonl"
    left.write_text(json.dumps({"header": header}) + "\n" + (out / "rows.jsonl").read_text())
    with monkeypatch.context() as patch:
        patch.setattr(
            "paint_engine.evaluation.run.build_engine",
            lambda *_, **__: pytest.fail("built an engine"),
        )
        assert "complete already" not in capsys.readouterr().out
        assert main(*arguments, "--output", out) == 0
        assert "rows: complete already, nothing was sampled\n" in capsys.readouterr().out
        assert numbers(out) == before and not left.exists()
        capsys.readouterr()
        assert main(*arguments, "--output", out, "--temperature", 0.5) == 2
        assert "temperature 1.0 and not 0.5" in capsys.readouterr().out
    # Another benchmark goes beside it.
    more = ("--benchmarks", f"{tmp_path / 'rows.jsonl'},again={tmp_path / 'rows.jsonl'}")
    assert main(*arguments, *more, "--output", out) == 0
    after = numbers(out)
    assert set(after["benchmarks"]) == {"rows", "again"}
    assert after["benchmarks"]["rows"] == before["benchmarks"]["rows"]
    assert after["benchmarks"]["again"] == before["benchmarks"]["rows"]
    assert after["macro"]["avg@2"]["value"] == before["macro"]["avg@2"]["value"]


def test_without_output_the_same_command_finds_its_directory(
    arguments: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(*arguments) == 0
    assert main(*arguments) == 0
    (first,) = (tmp_path / "evaluations").iterdir()
    assert first.name.startswith(f"{Path(arguments[1]).name}-")
    assert (first / "results.json").is_file()
    assert main(*arguments, "--seed", 1) == 0
    assert main(*arguments, "--num-problems", 2) == 0
    assert len(list((tmp_path / "evaluations").iterdir())) == 3


def _texts(directory: Path) -> list[str]:
    return [row["text"] for row in read_jsonl(directory / "rows.jsonl")]


def test_adapters_and_checkpoints_of_a_run(
    arguments: tuple,
    command: list[str],
    run_main: Callable[[Sequence[str]], int],
    tmp_path: Path,
    model_dir: Path,
) -> None:
    """By the run, with and without its model, by the checkpoint, and merged by hand: one text each;
    the base alone: another."""
    assert run_main([*command, "--checkpoint.keep", "9"]) == 0
    run, texts = tmp_path / "run", {}
    last = list_checkpoints(run)[-1]
    without_model = arguments[2:]
    variants = {
        "base": arguments,
        "last": (*arguments, "--adapter", run),
        "said": (*without_model, "--adapter", f"{run}:last"),
        "path": (*without_model, "--adapter", last),
        "step-1": (*arguments, "--adapter", f"{run}:step-1"),
        "number": (*arguments, "--adapter", f"{run}:1"),
        "best": (*arguments, "--adapter", f"{run}:best"),
    }
    for name, given in variants.items():
        assert main(*given, "--output", tmp_path / name) == 0
        texts[name] = _texts(tmp_path / name)
    assert texts["last"] == texts["said"] == texts["path"]
    assert texts["base"] != texts["last"] != texts["step-1"] == texts["number"]
    section = ModelSection(name_or_path=str(model_dir))
    merged = build_trained(last, section, [Survival(torch.float32)])
    merged.save_pretrained(tmp_path / "merged")
    for file in model_dir.glob("*token*"):
        (tmp_path / "merged" / file.name).write_bytes(file.read_bytes())
    for file in model_dir.glob("chat_template*"):
        (tmp_path / "merged" / file.name).write_bytes(file.read_bytes())
    by_hand = (*arguments, "--model", tmp_path / "merged", "--output", tmp_path / "by-hand")
    assert main(*by_hand) == 0
    assert _texts(tmp_path / "by-hand") == texts["last"]
    identities = {
        name: json.loads((tmp_path / name / "rows.json").read_text())["subject"]
        for name in variants
    }
    assert identities["last"] == identities["said"] == identities["path"]
    file = "adapter_model.safetensors"
    assert identities["last"][file] != identities["step-1"][file]
    assert file not in identities["base"]
    best = best_checkpoint(run)
    assert best is not None
    digest = hashlib.sha256((best / file).read_bytes()).hexdigest()
    assert identities["best"][file] == digest[:16]


def test_a_run_that_trained_all_weights(
    arguments: tuple,
    command: list[str],
    run_main: Callable[[Sequence[str]], int],
    tmp_path: Path,
) -> None:
    """Its checkpoints are models, without a tokenizer."""
    assert run_main([*command, "--lora.enabled", "false", "--optim.learning_rate", "1e-3"]) == 0
    assert main(*arguments, "--output", tmp_path / "base") == 0
    assert main(*arguments, "--adapter", tmp_path / "run", "--output", tmp_path / "all") == 0
    assert _texts(tmp_path / "all") != _texts(tmp_path / "base")


def test_an_adapter_in_pickle_is_not_read(
    arguments: tuple, lora_model: PeftModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora_model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    (file,) = (tmp_path / "adapter").glob("*.safetensors")
    file.rename(file.with_name("adapter_model.bin"))
    assert main(*arguments, "--adapter", tmp_path / "adapter", "--output", tmp_path / "o") == 2
    assert "has no adapter_model.safetensors" in capsys.readouterr().out


def _without_the_last_layer(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight for name, weight in weights.items() if ".layers.1." not in name}


def _with_a_third_layer(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    more = {name.replace(".layers.1.", ".layers.2."): weight for name, weight in weights.items()}
    return {name: weight.clone() for name, weight in (weights | more).items()}


def _wider(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: torch.cat([weight, weight], dim=1) if ".lora_A." in name else weight
        for name, weight in weights.items()
    }


@pytest.mark.parametrize("change", [_without_the_last_layer, _with_a_third_layer, _wider])
def test_an_adapter_of_another_base_is_refused(
    arguments: tuple,
    lora_model: PeftModel,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
) -> None:
    """peft itself says nothing where matrices are left over or missing."""
    adapter = tmp_path / "adapter"
    lora_model.save_pretrained(str(adapter), save_embedding_layers=False)
    assert main(*arguments, "--adapter", adapter, "--output", tmp_path / "fits") == 0
    file = adapter / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    capsys.readouterr()
    assert main(*arguments, "--adapter", adapter, "--output", tmp_path / "o") == 2
    assert "does not fit the model" in (printed := capsys.readouterr().out)
    assert "self_attn" in printed or "mlp" in printed
    file.write_bytes(file.read_bytes()[:-8])
    assert main(*arguments, "--adapter", adapter, "--output", tmp_path / "o") == 2
    assert "adapter_model.safetensors cannot be read" in capsys.readouterr().out


def test_other_weights_in_the_same_place_are_another_model(
    arguments: tuple, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As an export over an earlier one: the same names and sizes."""
    model = tmp_path / "model"
    shutil.copytree(model_dir, model)
    command = (*arguments, "--model", model, "--output", tmp_path / "out")
    assert main(*command) == 0
    file = model / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.mlp.up_proj.weight"] *= 1.01
    save_file(weights, file, metadata={"format": "pt"})
    capsys.readouterr()
    assert main(*command) == 2
    message = r"is of another evaluation, with weights '\w{16}' and not '\w{16}'; needs"
    assert re.search(message, capsys.readouterr().out)


def test_what_cannot_resume_is_refused_before_the_weights_are_loaded(
    arguments: tuple,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert main(*arguments, "--output", tmp_path / "out") == 0
    header = json.loads((tmp_path / "out" / "rows.json").read_text())
    del header["seconds"]
    partial = tmp_path / "partial" / "again.rank-3.jsonl"
    partial.parent.mkdir()
    partial.write_text(json.dumps({"header": header | {"benchmark": "again"}}) + "\n")
    monkeypatch.setattr(
        "paint_engine.evaluation.run.build_engine",
        lambda *_, **__: pytest.fail("built an engine"),
    )
    rows = tmp_path / "rows.jsonl"
    both = ("--benchmarks", f"{rows},again={rows}", "--temperature", 0.5)
    capsys.readouterr()
    assert main(*arguments, *both, "--output", partial.parent) == 2
    assert "temperature 1.0 and not 0.5" in capsys.readouterr().out
    assert main(*arguments, "--output", rows) == 2
    assert f"--output {rows}: cannot be made" in capsys.readouterr().out
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").touch()
    assert main(*arguments, "--output", run) == 2
    assert f"--output {run}: is the directory of a training run" in capsys.readouterr().out
    assert [path.name for path in run.iterdir()] == ["config.toml"]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--max-new-tokens", 5000), "give --max-new-tokens"),
        (("--top-p", 0), "--top-p: got 0.0; should be greater than 0"),
        (("--top-k", 0), "--top-k: got 0; -1 (all tokens) or a count"),
        (("--num-samples", "x"), "invalid int value: 'x'"),
        (("--thinking", "maybe"), "got 'maybe', needs true or false"),
        (("--benchmarks", "no/such/file.jsonl"), "--benchmarks no/such/file.jsonl"),
        (("--benchmarks", "no/such/train.jsonl"), "--benchmarks no/such/train.jsonl: there is"),
        (("--num-samples", 0), "--num-samples: got 0; should be greater than 0"),
        (("--adapter", "nowhere"), "--adapter nowhere: nowhere is no directory; needs"),
        (("--adapter", "nowhere:3"), "--adapter nowhere:3: nowhere is no directory; needs"),
        (("--model", "/nowhere/at/all"), "--model"),
        (("--gpu-memory-utilization", 2), "got --gpu-memory-utilization 2.0"),
        (("--answer-column", "gold"), "--problem-column or --answer-column NAME"),
        (
            ("--temprature", 1),
            "unrecognized arguments: --temprature 1; did you mean --temperature?",
        ),
    ],
)
def test_mistakes_end_with_one_message(
    arguments: tuple,
    tmp_path: Path,
    extra: tuple,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In this command's flags, not in the keys of a training's configuration."""
    assert main(*arguments, "--output", tmp_path / "out", *extra) == 2
    printed = capsys.readouterr().out
    assert message in printed
    assert "--eval." not in printed and "--rollout." not in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(vllm_is_installed(), reason="vLLM is installed")
def test_vllm_where_it_is_not_installed(
    arguments: tuple, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(*arguments, "--engine", "vllm", "--output", tmp_path / "out") == 2
    assert "vLLM is not installed" in capsys.readouterr().out


def test_ranks_share_an_evaluation(arguments: tuple, tmp_path: Path) -> None:
    """Two processes under torchrun leave what one does."""
    assert main(*arguments, "--output", tmp_path / "one") == 0
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "paint_engine.evaluate", *map(str, arguments), "--output", str(tmp_path / "two")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("Avg@2") == 1
    files = [(tmp_path / name / "rows.jsonl").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]
    assert numbers(tmp_path / "one") == numbers(tmp_path / "two")


def test_compare_is_a_part_of_the_command(
    arguments: tuple, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert main(*arguments, "--seed", seed, "--output", tmp_path / name) == 0
    capsys.readouterr()
    assert main("compare", tmp_path / "a", tmp_path / "b") == 0
    assert "+0.0" in capsys.readouterr().out
    assert main("compare", tmp_path / "a", tmp_path / "c") == 0
    assert "differ in seed (0 and 1) on rows" in capsys.readouterr().out
