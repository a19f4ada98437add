"""Checks an adapter in peft's format: that it is LoRA of a flavour that is computed exactly, that
it fits its base tensor by tensor, and that vLLM can load it.

peft itself skips tensors that fit nowhere, leaves the weights of missing ones random, and ignores
settings that it does not know. vLLM ignores some settings that change what an adapter computes.
"""

import dataclasses
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
)
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from paint_engine.files import ADAPTER_CONFIG_FILE, ADAPTER_FILE, MODEL_CONFIG_FILE, read_json

# Fields of a LoRA configuration whose every value is computed exactly, adapter on and merged.
_ANY_VALUE = {
    *("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora"),
    *("target_modules", "exclude_modules", "target_parameters", "fan_in_fan_out"),
    *("layers_to_transform", "layers_pattern", "bias", "lora_bias", "use_dora"),
    *("modules_to_save", "trainable_token_indices", "ensure_weight_tying"),
    # Which steps initialised or trained the matrices, and notes. `_check_init` has more to say.
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("peft_type", "task_type", "peft_version", "base_model_name_or_path", "revision"),
    *("auto_mapping", "inference_mode", "runtime_config"),
}
# Initialisations that leave the base as it is. The others subtract from the base's weights when
# peft loads the adapter, unless it was converted while it was saved.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_FIRST_NAMES = 3
# What others write weights to.
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# An adapter's tensors in a file begin with this, and then the base's own names follow.
PREFIX = "base_model.model."


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """The configuration of an adapter of a flavour that is computed exactly.

    Raises ValueError for a file that is not peft's, for a method other than LoRA, and for settings
    of LoRA that neither the built-in sampler nor a merge reproduces, by name.
    """
    file = directory / ADAPTER_CONFIG_FILE
    # In the hub's cache it is a link.
    config = read_json(file.resolve(), dict[str, Any], remedy="save or copy it again")
    method = config.get("peft_type")
    if method != "LORA":
        raise ValueError(
            f"the adapter {directory} is of the method {method} (peft_type in "
            f"{ADAPTER_CONFIG_FILE}); needs LORA; train such an adapter, or merge this one into "
            "its base with peft's merge_and_unload, where the method allows it, and give the "
            "merged model as --model"
        )
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise ValueError(
            f"the adapter {directory} is for the task {config['task_type']} (task_type in "
            f"{ADAPTER_CONFIG_FILE}); needs CAUSAL_LM; give an adapter of a causal language model"
        )
    _check_init(directory, config)
    _check_ranks(directory, config)
    if unknown := _unusual_settings(config):
        raise ValueError(
            f"the adapter {directory} has the LoRA settings {', '.join(unknown)}, which are not "
            "computed here; needs plain LoRA, rsLoRA or DoRA, with or without biases, "
            "modules_to_save, patterns of ranks, target_parameters and trainable tokens; merge "
            "it into its base with peft, where it can, and give the merged model as --model"
        )
    return config


def _check_init(directory: Path, config: Mapping[str, Any]) -> None:
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init not in _PLAIN_INITS:
        raise ValueError(
            f"the adapter {directory} has init_lora_weights {init!r}, with which peft changes the "
            "base's weights as it loads the adapter; needs an adapter of the base as it is; save "
            "it with peft's path_initial_model_for_weight_conversion, or, if --model is the "
            f"changed base already, set init_lora_weights to true in {ADAPTER_CONFIG_FILE}"
        )


def _check_ranks(directory: Path, config: Mapping[str, Any]) -> None:
    patterns = config.get("rank_pattern") or {}
    found = {"r": config.get("r"), **(patterns if isinstance(patterns, dict) else {"": patterns})}
    for name, rank in found.items():
        if type(rank) is not int or rank < 1:
            raise ValueError(
                f"the adapter {directory} has the rank {rank!r} for {name!r} in "
                f"{ADAPTER_CONFIG_FILE}; needs positive integers; save or copy it again"
            )


def _unusual_settings(config: Mapping[str, Any]) -> list[str]:
    """Settings beside `_ANY_VALUE` that are on, as "name = value". peft adds such a setting with
    each new flavour, and versions that do not know it leave it out with a warning."""
    defaults = {}
    for field in dataclasses.fields(LoraConfig):
        if field.default is not dataclasses.MISSING:
            defaults[field.name] = field.default
    return [
        f"{name} = {json.dumps(value)[:60]}"
        for name, value in sorted(config.items())
        # An empty list, a zero and null are off.
        if name not in _ANY_VALUE and value and value != defaults.get(name)
    ]


def largest_rank(config: Mapping[str, Any]) -> int:
    """The largest rank of an adapter's matrices."""
    return max([config["r"], *(config.get("rank_pattern") or {}).values()])


def check_adapter(directory: Path, shape: PreTrainedModel, base_name: str) -> None:
    """Raises ValueError unless the adapter's files are those of LoRA on this base: every tensor
    has its place and its shape, none is missing, and all values are finite. Where the base that it
    was trained on is on this machine, its kind and its vocabulary are those of this base.

    shape: the base on the meta device. It is changed and of no use afterwards.
    base_name: the base, for messages.
    """
    config = read_adapter_config(directory)
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
            shapes = {}
            for name in opened.keys():  # noqa: SIM118
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
    sizes = there.get("text_config") or there
    for key, ours in (
        ("model_type", shape.config.model_type),
        ("vocab_size", shape.config.get_text_config().vocab_size),
    ):
        theirs = (there if key == "model_type" else sizes).get(key)
        if theirs is not None and theirs != ours:
            return f"it was trained on a model of {key} {theirs}, and this one has {ours}"
    return None


def _stored_config(name_or_path: str) -> Path | None:
    path = Path(name_or_path) / MODEL_CONFIG_FILE
    if path.is_file():
        return path
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name_or_path):
        return None
    cached = try_to_load_from_cache(name_or_path, MODEL_CONFIG_FILE)
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
    try:
        with quiet_peft():
            fitted = get_peft_model(shape, LoraConfig(**settings), low_cpu_mem_usage=True)
            needed = get_peft_model_state_dict(fitted, save_embedding_layers=False)
    except (TypeError, ValueError) as error:
        return str(error)
    # Adapters of earlier releases of transformers are converted, as peft does when it loads them.
    tensors = {name: torch.empty(size, device="meta") for name, size in there.items()}
    converted = convert_peft_adapter_state_dict_for_transformers(
        fitted, fitted.peft_config["default"], tensors
    )
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
        return None
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
