"""Merges a run's adapter into its base: `python -m paint_engine.export RUN_DIR OUTPUT_DIR`.

The result is a Hugging Face checkpoint that needs neither peft nor this package. Each weight is
W + scaling * B A in float32, rounded once at the end: in bfloat16 the sum itself loses an update as
small as a run at 5e-6 makes.

Memory: the base in the dtype that it is stored in, or in the exported one where that is wider, and
one weight in float32; merging goes matrix by matrix.
"""

import argparse
import json
import shutil
import tomllib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear, LoraLayer
from rich.console import Console
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from paint_engine.checkpoint_files import (
    MANIFEST_FILE,
    best_checkpoint,
    file_names,
    find_damage,
    flush,
    list_checkpoints,
)
from paint_engine.cli import user_errors
from paint_engine.config_sections import ModelSection
from paint_engine.model import load_tokenizer, resolve_model
from paint_engine.report import CONFIG_FILE

_ADAPTER_CONFIG = "adapter_config.json"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "auto": None}


def choose_checkpoint(path: Path, which: str | None, given: str | None = None) -> Path:
    """The checkpoint that `path` is, or the one of that run directory that `which` names.

    which: "last" (also where it is None), "best" or "step-N"; only with a run directory.
    given: the user's words for both, for messages; None = those of this module's command.

    Raises ValueError where there is none such, or where its files are not what was written.
    """
    checkpoints = list_checkpoints(path)
    if (path / MANIFEST_FILE).is_file() and which is None:
        chosen = path.resolve()
    elif not path.is_dir():
        raise ValueError(
            f"{path}: no such directory; give a run directory that holds checkpoints/step-N, or "
            "one of these"
        )
    elif not checkpoints:
        raise ValueError(
            f"{path} has no checkpoint to choose from: give a run directory that holds "
            "checkpoints/step-N, or one of these without --checkpoint"
        )
    elif which == "best":
        chosen = best_checkpoint(path)
    elif which is None or which == "last":
        chosen = checkpoints[-1]
    else:
        chosen = next((c for c in checkpoints if c.name == which), None)
    if chosen is None:
        there = [checkpoint.name for checkpoint in checkpoints]
        marked = ["best"] if best_checkpoint(path) is not None else []
        raise ValueError(
            f"{given or f'--checkpoint {which}'}: {path} has no {which}; it has "
            f"{', '.join(there)}; give one of these, {' or '.join([*marked, 'last'])}"
        )
    if damage := find_damage(chosen):
        raise ValueError(f"{chosen} is damaged ({damage}): choose another checkpoint of its run")
    return chosen


def recorded_section(checkpoint: Path, name: str) -> dict[str, Any] | None:
    """A section of the configuration of the run that a checkpoint lies in, as TOML has it; None
    where it lies in none."""
    config = checkpoint.parent.parent / CONFIG_FILE
    return tomllib.loads(config.read_text()).get(name, {}) if config.is_file() else None


def recorded_base(checkpoint: Path) -> ModelSection | None:
    """What the checkpoint was trained from, by the run's configuration, else by the adapter's; None
    where neither says it."""
    adapter_config = checkpoint / _ADAPTER_CONFIG
    if (section := recorded_section(checkpoint, "model")) is not None:
        return ModelSection.model_validate(section)
    if adapter_config.is_file():
        name = json.loads(adapter_config.read_text()).get("base_model_name_or_path")
        return ModelSection(name_or_path=name) if name else None
    return None


def find_base(checkpoint: Path, name_or_path: str | None) -> ModelSection:
    """What the checkpoint was trained from: `name_or_path` where given, else `recorded_base`.

    Raises ValueError where nothing says it.
    """
    if name_or_path is not None:
        return ModelSection(name_or_path=name_or_path)
    recorded = recorded_base(checkpoint)
    if recorded is None:
        raise ValueError(
            f"{checkpoint} lies in no run directory, and so does not say which model it was "
            "trained from, whose tokenizer is needed: give that with --model"
        )
    return recorded


def _load_model(path: str, section: ModelSection) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_pretrained(
            path,
            dtype="auto",
            trust_remote_code=section.trust_remote_code,
            use_safetensors=True,
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"model {path} could not be loaded ({type(error).__name__}: {error}): name the model "
            "that the run began with by --model"
        ) from error


def merge_adapter(
    base: PreTrainedModel, checkpoint: Path, dtype: torch.dtype | None
) -> PreTrainedModel:
    """The base with the adapter's update in its weights; `base` itself is changed.

    dtype: of the merged weights; None = each weight's own.
    """
    model = PeftModel.from_pretrained(base, str(checkpoint))
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            assert isinstance(layer, Linear), type(layer)
            weight = layer.get_base_layer().weight
            assert isinstance(weight, torch.Tensor)
            delta = layer.get_delta_weight("default")
            assert delta.dtype == torch.float32, delta.dtype
            weight.data = delta.add_(weight.data).to(dtype or weight.dtype)
    merged = model.unload()
    assert isinstance(merged, PreTrainedModel)
    return merged


@torch.no_grad()
def build_model(
    checkpoint: Path, section: ModelSection, dtype: torch.dtype | None
) -> PreTrainedModel:
    """The trained model, in one piece.

    dtype: of all its weights; None = what the base is stored in.
    """
    path = resolve_model(section.name_or_path)
    if (checkpoint / _ADAPTER_CONFIG).is_file():
        model = merge_adapter(_load_model(path, section), checkpoint, dtype)
    else:
        model = _load_model(str(checkpoint), section)
        stored = AutoConfig.from_pretrained(path, trust_remote_code=section.trust_remote_code)
        assert not isinstance(stored.dtype, str), stored.dtype
        dtype = dtype or stored.dtype
    if dtype is not None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        model.config.dtype = dtype
    return model


def export(
    checkpoint: Path, output_dir: Path, section: ModelSection, dtype: torch.dtype | None
) -> None:
    """Writes the trained model with the base's tokenizer into `output_dir`, all of it or nothing.

    Raises ValueError where that holds something already, where the base cannot be loaded, and where
    the disk is full.
    """
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"{output_dir} exists already: give a directory that is new or empty")
    tokenizer = load_tokenizer(section)
    model = build_model(checkpoint, section, dtype)
    unfinished = output_dir.with_name(f".{output_dir.name}.unfinished")
    if unfinished.exists():
        shutil.rmtree(unfinished)
    try:
        unfinished.mkdir(parents=True)
        model.save_pretrained(str(unfinished))
        tokenizer.save_pretrained(str(unfinished))
        for name in (*file_names(unfinished), "."):
            flush(unfinished / name)
        unfinished.rename(output_dir)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise ValueError(
            f"{output_dir} could not be written ({error}); nothing of it is left; make room, or "
            "give a directory elsewhere"
        ) from error
    flush(output_dir.parent)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m paint_engine.export",
        description="Merges a run's adapter into its base, as a Hugging Face checkpoint.",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="CHECKPOINT_OR_RUN_DIR", type=Path)
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", type=Path, help="new or empty")
    parser.add_argument("--model", metavar="BASE", help="the base, if it is not where it was")
    parser.add_argument(
        "--dtype", choices=tuple(_DTYPES), default="auto", help="auto (default): the base's own"
    )
    parser.add_argument(
        "--checkpoint", metavar="last|best|step-N", help="of a run directory (default: last)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """A mistake of the user's ends with one message and exit code 2."""
    console = Console(highlight=False, markup=False)
    transformers_logging.disable_progress_bar()
    # peft asks models of transformers for an attribute that has been renamed there.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    arguments = _parser().parse_args(argv)
    with user_errors(console):
        checkpoint = choose_checkpoint(arguments.source, arguments.checkpoint)
        section = find_base(checkpoint, arguments.model)
        export(checkpoint, arguments.output_dir, section, _DTYPES[arguments.dtype])
    console.print(f"{checkpoint} is exported to {arguments.output_dir}", soft_wrap=True)


if __name__ == "__main__":
    main()
