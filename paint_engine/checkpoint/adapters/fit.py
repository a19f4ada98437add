"""Checks an adapter in peft's format: that it is LoRA of a flavour that is computed exactly, that
it fits its base tensor by tensor, and that vLLM can load it.

peft itself skips tensors that fit nowhere, and leaves the weights of missing ones random. vLLM
ignores some settings that change what an adapter computes.
"""

import dataclasses
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
)
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from paint_engine.checkpoint.adapters.config import patterns_of, read_adapter_config
from paint_engine.checkpoint.adapters.patterns import bad_pattern
from paint_engine.files import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    MODEL_CONFIG_FILE,
    BadFile,
    read_json,
)
from paint_engine.model.stored import not_floats

_FIRST_NAMES = 3
# What others write weights to.
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# An adapter's tensors in a file begin with this, and then the base's own names follow.
PREFIX = "base_model.model."


def check_adapter(directory: Path, shape: PreTrainedModel, base_name: str) -> None:
    """Raises ValueError unless the adapter's files are those of LoRA on this base: every tensor
    has its place and its shape, none is missing, and all values are finite. Where the base that it
    was trained on is on this machine, its kind and its vocabulary are those of this base.

    shape: the base on the meta device. It is changed and of no use afterwards.
    base_name: the base, for messages.
    """
    config = read_adapter_config(directory)
    names = [name for name, _ in shape.named_modules(remove_duplicate=False)]
    if (bad := bad_pattern(patterns_of(config), names)) is not None:
        raise BadFile(f"{directory / ADAPTER_CONFIG_FILE}: {bad}; name the layers one by one")
    there = _read_shapes(directory / ADAPTER_FILE)
    problem = _other_base(config, shape) or _misfit(config, shape, there)
    if problem is not None:
        raise ValueError(
            f"the adapter {directory} does not fit the model {base_name} ({problem}); needs the "
            "model that it was trained on, according to its configuration "
            f"{config.get('base_model_name_or_path')!r}; give that with --model"
        )


def require_weights(directory: Path) -> None:
    """Raises ValueError unless the adapter has its weights in safetensors. Other files of weights
    are pickles, which run what their author wrote, and are never opened."""
    if (directory / ADAPTER_FILE).is_file():
        return
    others = sorted(file.name for file in directory.iterdir() if file.suffix in _PICKLES)
    raise ValueError(
        f"{directory} has no {ADAPTER_FILE}{f' (it holds {_some(others)})' if others else ''}; "
        "needs peft's files with the weights in safetensors: they are never read from pickle; "
        "save the adapter again with save_pretrained, where you trust its author"
    )


def _read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of an adapter's file, by its name. Reads all values."""
    require_weights(file.parent)
    broken = []
    try:
        with safe_open(file, framework="pt") as opened:
            names, shapes = list(opened.keys()), {}
            if others := not_floats({name: opened.get_slice(name) for name in names}):
                raise BadFile(
                    f"the adapter's {file} cannot be used ({others}); needs weights in float32, "
                    "bfloat16 or float16; save the adapter in one of these"
                )
            for name in names:
                tensor = opened.get_tensor(name)
                shapes[name] = tuple(tensor.shape)
                if not tensor.isfinite().all():
                    broken.append(name)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"the adapter's {file} cannot be read ({error}); save or copy the adapter again"
        ) from error
    if broken:
        raise ValueError(
            f"the adapter's {file} has NaN or infinite values in {_some(broken)}; needs finite "
            "weights; give an adapter or a checkpoint from before they broke"
        )
    return shapes


def _other_base(config: Mapping[str, Any], shape: PreTrainedModel) -> str | None:
    """How the base that the adapter was trained on differs, if its configuration is on this
    machine: matrices of the same sizes fit a model with another vocabulary too."""
    name = config.get("base_model_name_or_path")
    found = _stored_config(name) if name else None
    if found is None:
        return None
    there = read_json(found.resolve(), dict[str, Any], constants=True)
    text = there.get("text_config")
    sizes = text if isinstance(text, dict) and text else there
    for key, ours in (
        ("model_type", shape.config.model_type),
        ("vocab_size", shape.config.get_text_config().vocab_size),
    ):
        theirs = (there if key == "model_type" else sizes).get(key)
        if theirs is not None and theirs != ours:
            trained = f"it was trained on a model of {key} {str(theirs)[:60]}"
            return f"{trained}, and this one has {ours}"
    return None


def _stored_config(name_or_path: str) -> Path | None:
    path = Path(name_or_path) / MODEL_CONFIG_FILE
    # Unlike Path.is_file, False for a name that no file can have, and where others' files are.
    if os.path.isfile(path):
        return path
    try:
        cached = try_to_load_from_cache(name_or_path, MODEL_CONFIG_FILE)
    except HFValidationError:
        return None
    return Path(cached) if isinstance(cached, str) else None


def _misfit(
    config: Mapping[str, Any], shape: PreTrainedModel, there: Mapping[str, tuple[int, ...]]
) -> str | None:
    """Why these tensors are not those of this configuration on this base; None if they are."""
    # peft does not read a file's runtime_config either.
    fields = {f.name for f in dataclasses.fields(LoraConfig) if f.init} - {"runtime_config"}
    settings = {name: value for name, value in config.items() if name in fields}
    # peft would initialise in ways that need values, and would warn about the base's name.
    settings |= {"init_lora_weights": False, "base_model_name_or_path": None, "revision": None}
    if (problem := _absent_tokens(config, shape)) is not None:
        return problem
    absent = _absent_names(config, shape)
    try:
        with quiet_peft():
            fitted = get_peft_model(shape, LoraConfig(**settings), low_cpu_mem_usage=True)
            needed = get_peft_model_state_dict(fitted, save_embedding_layers=False)
        # Those of earlier releases of transformers are converted, as peft does when it loads them.
        tensors = {name: torch.empty(size, device="meta") for name, size in there.items()}
        converted = convert_peft_adapter_state_dict_for_transformers(
            fitted, fitted.peft_config["default"], tensors
        )
    except Exception as error:
        # Settings and names that do not go together are found where they are used.
        said = " ".join(str(error).split())[:300]
        return absent or f"peft cannot put it there: {type(error).__name__}: {said}"
    found = {
        name.replace(".default.", ".").removesuffix(".default"): tuple(tensor.shape)
        for name, tensor in converted.items()
    }
    # peft may save weights of the base with the adapter, such as embeddings.
    placed = {**fitted.state_dict(), **needed}
    wrong = [
        f"{name} has the shape {found.get(name, 'none')}, and the base needs "
        f"{tuple(placed[name].shape) if name in placed else 'none'}"
        for name in sorted(found.keys() | needed.keys())
        if name not in found or name not in placed or found[name] != tuple(placed[name].shape)
    ]
    if not wrong:
        return absent
    return f"{wrong[0]}; so for {len(wrong)} of {len(found.keys() | needed.keys())} tensors"


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Without peft's warnings about adapters on tied weights and on layers without a bias, which
    are checked and merged here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"peft\.")
        yield


def _absent_tokens(config: Mapping[str, Any], shape: PreTrainedModel) -> str | None:
    given = config.get("trainable_token_indices") or []
    lists = given.values() if isinstance(given, dict) else [given]
    largest = max((index for indices in lists for index in indices), default=-1)
    embeddings = shape.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding), type(embeddings)
    num_tokens = embeddings.num_embeddings
    if largest < num_tokens:
        return None
    return f"it trains the token {largest}, and the base's vocabulary has {num_tokens}"


def _absent_names(config: Mapping[str, Any], shape: PreTrainedModel) -> str | None:
    """A name that nothing in the base has, which peft leaves out without a word. Among names of
    target_modules, which often stand for several architectures, it is usual."""
    modules = [name for name, _ in shape.named_modules(remove_duplicate=False)]
    parameters = [f".{name}" for name, _ in shape.named_parameters(remove_duplicate=False)]
    # As peft matches them.
    for key, endings, present in (
        ("modules_to_save", config.get("modules_to_save") or [], modules),
        ("target_parameters", config.get("target_parameters") or [], parameters),
    ):
        for ending in endings:
            end = ending if key == "modules_to_save" else f".{ending}"
            if not any(name.endswith(end) for name in present):
                return f"its {key} names {ending[:60]!r}, and the base has nothing of that name"
    return None


def _some(names: list[str]) -> str:
    more = len(names) - _FIRST_NAMES
    return ", ".join(names[:_FIRST_NAMES]) + (f" and {more} more" if more > 0 else "")


def tensor_names(directory: Path) -> list[str]:
    """The names of the tensors in an adapter's file."""
    with safe_open(directory / ADAPTER_FILE, framework="pt") as file:
        return list(file.keys())


# ---- vLLM ----------------------------------------------------------------------------------------


def vllm_obstacles(config: Mapping[str, Any], names: list[str]) -> list[str]:
    """What in an adapter vLLM 0.32 refuses, skips or computes otherwise; empty if it can load it.

    config: as `read_adapter_config` returns it.
    names: of the tensors in the adapter's file.
    """
    found = [
        f"{name} = {json.dumps(config[name])}"
        for name in ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices")
        if config.get(name)
    ]
    if config.get("bias", "none") != "none":
        found.append(f"bias = {json.dumps(config['bias'])}")
    # vLLM takes a file's first expert matrices for those of `gate_up_proj` whatever they are.
    if config.get("target_parameters"):
        found.append(f"target_parameters = {json.dumps(config['target_parameters'])}")
    if any(".lora_embedding_" in name or ".lm_head." in name for name in names):
        found.append("adapters on the embeddings or the head")
    # vLLM leaves these out without a word.
    if any(".lora_" not in name for name in names) and not found:
        found.append("weights of the base itself in the adapter's file")
    return found


def check_vllm_loads(directory: Path) -> None:
    """Raises ValueError where vLLM cannot load the adapter, with what stands in its way."""
    if found := vllm_obstacles(read_adapter_config(directory), tensor_names(directory)):
        raise ValueError(
            f"the adapter {directory} has {'; '.join(found)}, which vLLM does not load; needs LoRA "
            "matrices on linear layers alone; use --engine builtin, or merge it with python -m "
            "paint_engine.export and give the merged model as --model"
        )
