"""Atomic checkpoints of a run, and the exact state that training goes on from.

`checkpoints/step-N/` holds the adapter in peft's own format (or the whole model where LoRA is off),
the optimizer's moments and a small JSON. Data order, rollout seeds and the learning rate are pure
functions of the step, so nothing else is needed to go on bit for bit.
"""

import json
import os
import re
import shutil
from pathlib import Path

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from paint_engine.model import causal_lm

_STATE_FILE = "trainer_state.json"
_OPTIMIZER_FILE = "optimizer.safetensors"


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _sync_to_disk(directory: Path) -> None:
    """Flushes every file and the directory itself, so that the rename cannot come before the
    data."""
    for path in (*directory.iterdir(), directory):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = {}
    for path in (run_dir / "checkpoints").glob("step-*"):
        # A copy that someone named step-40-best is theirs.
        if match := re.fullmatch(r"step-(\d+)", path.name):
            found[int(match[1])] = path
    return [found[step] for step in sorted(found)]


def save_weights(model: nn.Module, directory: Path) -> None:
    """The adapter in peft's format, or the whole model in transformers' where LoRA is off."""
    if isinstance(model, PeftModel):
        # "auto" would ask the hub whether the vocabulary has grown; it never does here.
        model.save_pretrained(str(directory), save_embedding_layers=False)
    else:
        causal_lm(model).save_pretrained(str(directory))


def save_checkpoint(
    run_dir: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, float],
    *,
    keep: int,
) -> Path:
    """Writes `checkpoints/step-N` (N = state["step"]) beside its place, then renames it there.

    state: numbers to go on from, `step` among them.
    keep: how many of the newest checkpoints stay.
    """
    target = run_dir / "checkpoints" / f"step-{int(state['step'])}"
    if target.exists():
        return target
    unfinished = target.with_name(f".{target.name}.unfinished")
    if unfinished.exists():
        shutil.rmtree(unfinished)
    unfinished.mkdir(parents=True)
    save_weights(model, unfinished)
    moments = {
        f"{key}.{name}": value
        for name, parameter in _trainable(model).items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    save_file(moments, unfinished / _OPTIMIZER_FILE)
    (unfinished / _STATE_FILE).write_text(json.dumps(state, indent=2) + "\n")
    _sync_to_disk(unfinished)
    unfinished.rename(target)
    _sync_to_disk(target.parent)
    for old in list_checkpoints(run_dir)[:-keep]:
        shutil.rmtree(old)
    return target


def _load_weights(model: nn.Module, directory: Path) -> None:
    if isinstance(model, PeftModel):
        weights = load_file(directory / "adapter_model.safetensors")
        result = set_peft_model_state_dict(model, weights)
        assert not result.unexpected_keys, result.unexpected_keys
        return
    weights = {}
    for file in sorted(directory.glob("model*.safetensors")):
        weights.update(load_file(file))
    missing, unexpected = causal_lm(model).load_state_dict(weights, strict=False)
    tied = set(causal_lm(model)._tied_weights_keys or ())
    assert not unexpected and set(missing) <= tied, (missing, unexpected)


def load_checkpoint(
    run_dir: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, float]:
    """Restores the newest checkpoint into model and optimizer, and returns its state.

    Raises ValueError where the run directory has no complete checkpoint.
    """
    checkpoints = list_checkpoints(run_dir)
    if not checkpoints:
        raise ValueError(
            f"{run_dir} has no complete checkpoint under checkpoints/: the run stopped before its "
            f"first; start it again with --config {run_dir}/config.toml --run.dir {run_dir} "
            "--run.overwrite true"
        )
    directory = checkpoints[-1]
    _load_weights(model, directory)
    parameters = _trainable(model)
    for entry, value in load_file(directory / _OPTIMIZER_FILE).items():
        # The optimizer's own keys (exp_avg, step) hold no dot.
        key, _, name = entry.partition(".")
        device = parameters[name].device if value.ndim else "cpu"
        optimizer.state[parameters[name]][key] = value.to(device)
    return json.loads((directory / _STATE_FILE).read_text())
