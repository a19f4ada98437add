"""Loads the base model."""

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from paint_engine.config.schema import Config
from paint_engine.config.sections import ModelSection
from paint_engine.files import ADAPTER_CONFIG_FILE
from paint_engine.model.forward import _COMPUTE_DTYPE
from paint_engine.model.lora import add_lora
from paint_engine.model.stored import load_weights, read_settings
from paint_engine.seeds import adapter_seed

TINY_BASE = Path(__file__).parents[1] / "tiny" / "base"


def quiet_libraries() -> None:
    """For a command: no progress bars of transformers, and no warning that its user cannot act
    on."""
    transformers_logging.disable_progress_bar()
    # peft asks models of transformers for an attribute that has been renamed there.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")


def pick_device(name: str) -> torch.device:
    """Returns the device of a name; "auto" is a GPU if there is one, else the CPU.

    Raises ValueError for "cuda" on a machine without a GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "train.device is 'cuda', but this machine has no usable CUDA device: "
            "use --train.device cpu or auto"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Returns the dtype of a name; "auto" is bfloat16 on a GPU that supports it, else float32."""
    if name == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if bf16 else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def resolve_model(name_or_path: str, *, with_weights: bool = True) -> str:
    """Returns the bundled base's path for "tiny"; otherwise the name itself.

    Raises ValueError for a directory that lacks the configuration, the tokenizer or the weights, or
    that holds an adapter.
    """
    if name_or_path == "tiny":
        return str(TINY_BASE)
    path = Path(name_or_path)
    if not path.is_dir():
        return name_or_path
    present = {file.name for file in path.iterdir()}
    if ADAPTER_CONFIG_FILE in present:
        # Beside a config.json, transformers would load the adapter without a word.
        raise ValueError(
            f"model directory {name_or_path} holds an adapter ({ADAPTER_CONFIG_FILE}); needs a "
            "whole model; merge it with python -m paint_engine.export and name what that writes, "
            "or evaluate it with --adapter"
        )
    if "config.json" not in present:
        needed = "config.json (the model's configuration)"
    elif not present & {"tokenizer.json", "tokenizer.model", "vocab.json"}:
        needed = "tokenizer (tokenizer.json, tokenizer.model or vocab.json)"
    elif with_weights and not any(name.endswith(".safetensors") for name in present):
        needed = "weights in safetensors files"
    else:
        return name_or_path
    raise ValueError(
        f"model directory {name_or_path} has no {needed}; it holds "
        f"{', '.join(sorted(present)) or 'nothing'}: save the model and the tokenizer there with "
        "save_pretrained, or name another with --model.name_or_path"
    )


def load_base(
    section: ModelSection,
    device: torch.device,
    *,
    trains_base: bool = False,
    on_cpu: bool = False,
    say: Callable[[str], object] = print,
) -> PreTrainedModel:
    """Loads the base onto `device`, from safetensors only. Its attention is SDPA where the
    architecture has that, and its own elsewhere (a softcap, Mamba).

    section.dtype: dtype of the arithmetic, and of the weights unless they are trained.
    trains_base: the base's own weights are trained. They are then float32, because bfloat16 rounds
    most updates away at the usual learning rates.
    on_cpu: leave it there, to be sharded onto devices of that kind.
    say: is called with a note if the names of the weights had to be changed.

    Raises ValueError as `load_weights` does.
    """
    dtype = pick_dtype(section.dtype, device)
    stored = torch.float32 if trains_base else dtype
    model = load_weights(resolve_model(section.name_or_path), section, stored, say)
    setattr(model, _COMPUTE_DTYPE, dtype)
    if not on_cpu:
        nn.Module.to(model, device)
    return model


def meta_model(config: Config) -> nn.Module:
    """Builds the model that a run would train, with its adapters, on the meta device.

    It reads config.json alone and loads no weights. Raises ValueError if there is no such model or
    it cannot have these adapters.
    """
    section = config.model
    path = str(TINY_BASE) if section.name_or_path == "tiny" else section.name_or_path
    settings = read_settings(path, section)
    narrow = config.lora.enabled and section.dtype == "bfloat16"
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(
            settings,
            dtype=torch.bfloat16 if narrow else torch.float32,
            trust_remote_code=section.trust_remote_code,
        )
        return add_lora(base, config.lora, adapter_seed(config.train.seed))
