"""Weights handed over as files: new names, one set kept, nothing left behind."""

import subprocess
import sys
from pathlib import Path

import torch
from peft import PeftModel, load_peft_weights

from paint_engine.distributed import World
from paint_engine.rollout_weights import WeightFiles

WORLD = World(0, 1, 0, torch.device("cpu"))


def test_each_write_has_a_new_name_and_replaces_the_one_before(
    lora_model: PeftModel, tmp_path: Path
) -> None:
    files = WeightFiles(lora_model, WORLD, str(tmp_path), per_node=True)
    # The same number twice, as when a run is resumed: still another name.
    first, second = files.write(7), files.write(7)
    assert first.name != second.name
    assert (first.serial, second.serial) == (1, 2)
    assert not first.directory.exists()
    stored = load_peft_weights(str(second.directory), device="cpu")
    assert stored.keys() and all(
        torch.equal(tensor, lora_model.get_parameter(name.replace(".weight", ".default.weight")))
        for name, tensor in stored.items()
    )
    again = WeightFiles(lora_model, WORLD, str(tmp_path), per_node=True)
    assert again.write(7).name not in {first.name, second.name}
    files.close()
    again.close()
    assert list(tmp_path.iterdir()) == []


def test_an_exception_that_ends_the_process_leaves_nothing(tmp_path: Path, model_dir: Path) -> None:
    script = f"""
import torch
from paint_engine.config import LoraSection, ModelSection
from paint_engine.distributed import World
from paint_engine.model import add_lora, load_base
from paint_engine.rollout_weights import WeightFiles

device = torch.device("cpu")
model = load_base(ModelSection(name_or_path={str(model_dir)!r}), device)
model = add_lora(model, LoraSection(rank=4, alpha=8), seed=0)
files = WeightFiles(model, World(0, 1, 0, device), {str(tmp_path)!r}, per_node=True)
print(files.write(1).directory.is_dir())
raise RuntimeError("out of memory")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr
    assert "out of memory" in done.stderr
    assert list(tmp_path.iterdir()) == []
