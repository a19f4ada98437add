"""Weights are read from safetensors alone: a pickle under any name is refused and never opened."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from exit_codes import exit_code
from peft import PeftModel
from safetensors.torch import load_file

from paint_engine import evaluate, export
from paint_engine.checkpoint.directory import file_names, seal
from paint_engine.files import MANIFEST_FILE, STATE_FILE

EVALUATION = (
    *("--benchmarks", "tiny", "--num-problems", "1", "--num-samples", "1", "--max-new-tokens"),
    *("4", "--thinking", "false", "--engine", "builtin", "--device", "cpu"),
)


class _Planted:
    """Its pickle makes a file where it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "the pickle was loaded"


@pytest.fixture
def plant(marker: Path) -> Callable[[Path], None]:
    """Puts the pickle, as torch.save writes it, into a file."""

    def into(file: Path) -> None:
        torch.save({"base_model.model.lm_head.weight": _Planted(marker)}, file)
        assert not marker.exists()

    return into


@pytest.fixture
def adapter(lora_model: PeftModel, tmp_path: Path) -> Path:
    lora_model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    return tmp_path / "adapter"


def test_the_planted_file_does_what_it_is_for(
    tmp_path: Path, marker: Path, plant: Callable[[Path], None]
) -> None:
    plant(tmp_path / "adapter_model.bin")
    torch.load(tmp_path / "adapter_model.bin", weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "adapter_model.ckpt"])
def test_an_adapter_in_pickle_is_refused_and_named(
    name: str,
    adapter: Path,
    marker: Path,
    plant: Callable[[Path], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    plant(adapter / name)
    for arguments in (
        (export.main, adapter, tmp_path / "out"),
        (export.main, adapter, tmp_path / "out", "--form", "adapter"),
        (evaluate.main, "--adapter", adapter, *EVALUATION, "--output", tmp_path / "out"),
    ):
        assert exit_code(*arguments) == 2
        said = " ".join(capsys.readouterr().out.split())
        assert "has no adapter_model.safetensors" in said and f"(it holds {name})" in said
        assert "never read from pickle" in said and "save_pretrained" in said
    assert not marker.exists() and not (tmp_path / "out").exists()


def test_a_run_s_adapter_in_pickle_is_refused_though_its_manifest_lists_it(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Even one that does no harm: whoever can write into a run can write its manifest too."""
    checkpoint = tmp_path / "run" / "checkpoints" / "step-1"
    shutil.copytree(adapter, checkpoint)
    weights = checkpoint / "adapter_model.safetensors"
    torch.save(load_file(weights), checkpoint / "adapter_model.bin")
    weights.unlink()
    (checkpoint / STATE_FILE).write_text(json.dumps({"state": {"step": 1}, "world_size": 1}))
    manifest = seal(checkpoint, file_names(checkpoint))
    (checkpoint / MANIFEST_FILE).write_text(json.dumps(manifest))
    (tmp_path / "run" / "config.toml").write_text('[model]\nname_or_path = "tiny"\n')
    assert exit_code(export.main, tmp_path / "run", tmp_path / "out") == 2
    assert "(it holds adapter_model.bin)" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "out").exists()


def test_a_pickle_under_the_adapter_s_name_is_damage(
    adapter: Path,
    marker: Path,
    plant: Callable[[Path], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plant(adapter / "adapter_model.safetensors")
    for arguments in (
        (export.main, adapter, tmp_path / "out"),
        (export.main, adapter, tmp_path / "out", "--form", "adapter"),
        (evaluate.main, "--adapter", adapter, *EVALUATION, "--output", tmp_path / "out"),
    ):
        assert exit_code(*arguments) == 2
        assert "adapter_model.safetensors cannot be read" in " ".join(
            capsys.readouterr().out.split()
        )
    assert not marker.exists()


def _pickle_alone(base: Path, plant: Callable[[Path], None]) -> None:
    (base / "model.safetensors").unlink()
    plant(base / "pytorch_model.bin")


def _pickle_renamed(base: Path, plant: Callable[[Path], None]) -> None:
    plant(base / "model.safetensors")


def _pickle_in_the_index(base: Path, plant: Callable[[Path], None]) -> None:
    # A file of that kind is there, and it is not the one that the index names.
    (base / "model.safetensors").rename(base / "unused.safetensors")
    plant(base / "pytorch_model.bin")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model.bin"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("spoil", [_pickle_alone, _pickle_renamed, _pickle_in_the_index])
def test_a_base_in_pickle_is_refused(
    spoil: Callable[[Path, Callable[[Path], None]], None],
    adapter: Path,
    model_dir: Path,
    marker: Path,
    plant: Callable[[Path], None],
    tmp_path: Path,
    command: Sequence[str],
    run_main: Callable[[Sequence[str]], int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = Path(shutil.copytree(model_dir, tmp_path / "base"))
    spoil(base, plant)
    assert exit_code(export.main, adapter, tmp_path / "out", "--model", base) == 2
    assert exit_code(evaluate.main, "--model", base, *EVALUATION, "--output", tmp_path / "out") == 2
    assert run_main([*command, "--model.name_or_path", str(base)]) == 2
    # From three commands, each of which names the directory.
    assert capsys.readouterr().out.count("error: ") == 3
    assert not marker.exists()


def test_a_pickle_beside_the_weights_is_left_alone(
    adapter: Path, model_dir: Path, marker: Path, plant: Callable[[Path], None], tmp_path: Path
) -> None:
    base = Path(shutil.copytree(model_dir, tmp_path / "base"))
    for file in (
        *(base / "pytorch_model.bin", base / "training_args.bin", base / "consolidated.00.pth"),
        *(adapter / "adapter_model.bin", adapter / "optimizer.pt", adapter / "rng_state.pth"),
    ):
        plant(file)
    export.main([str(adapter), str(tmp_path / "out"), "--model", str(base)])
    assert not marker.exists()
    written = {file.suffix for file in (tmp_path / "out").iterdir()}
    assert written <= {".safetensors", ".json", ".jinja"}, written
