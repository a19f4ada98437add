"""Reads `adapter_config.json` of an adapter in peft's format: every value has its type and its
bounds, and the flavour of LoRA is one that is computed exactly.

peft takes values of any type, and ignores settings that it does not know.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from peft import EvaConfig, LoftQConfig, LoraConfig
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from pydantic import Field

from paint_engine.files import ADAPTER_CONFIG_FILE, Record, checked, read_json

# Far above what an adapter has: hidden sizes, tokens, alphas, names, paths of the system.
_Rank = Annotated[int, Field(ge=1, le=1 << 16)]
_Alpha = Annotated[float, Field(ge=-1e6, le=1e6)]
_Index = Annotated[int, Field(ge=0, lt=1 << 31)]
_Text = Annotated[str, Field(max_length=4096)]
# A regular expression: `patterns` tries it.
_Pattern = Annotated[str, Field(max_length=1 << 17)]
# peft puts these into regular expressions of its own.
_Name = Annotated[str, Field(max_length=4096, pattern=r"^[\w.-]*$")]
_Names = Annotated[list[_Text], Field(max_length=100_000)]
_PlainNames = Annotated[list[_Name], Field(max_length=1000)]
_Indices = Annotated[list[_Index], Field(max_length=1 << 20)]
_Ranks = Annotated[dict[_Pattern, _Rank], Field(max_length=4096)]
_Alphas = Annotated[dict[_Pattern, _Alpha], Field(max_length=4096)]
# What peft writes beside an adapter about how it was initialised, and does not read again.
_INITS = {
    "loftq_config": LoftQConfig,
    "eva_config": EvaConfig,
    "corda_config": CordaConfig,
    "lora_ga_config": LoraGAConfig,
}
# Initialisations that leave the base as it is. The others subtract from the base's weights when
# peft loads the adapter, unless it was converted while it was saved.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_REMEDY = "save or copy it again"
_SHOWN = 60
_FIRST_SETTINGS = 3


class AdapterConfig(Record):
    """Settings of LoRA whose every value is computed exactly, adapter on and merged, and notes.
    What is not here has to be off."""

    peft_type: Literal["LORA"]
    task_type: Literal["CAUSAL_LM"] | None = None
    r: _Rank
    lora_alpha: _Alpha = 8
    lora_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    rank_pattern: _Ranks = Field(default_factory=dict)
    alpha_pattern: _Alphas = Field(default_factory=dict)
    use_rslora: bool | None = None
    use_dora: bool | None = None
    target_modules: _Names | _Pattern | None = None
    exclude_modules: _Names | _Pattern | None = None
    target_parameters: _Names | None = None
    layers_to_transform: _Indices | _Index | None = None
    layers_pattern: _PlainNames | _Name | None = None
    fan_in_fan_out: bool | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_bias: bool | None = None
    modules_to_save: _PlainNames | None = None
    trainable_token_indices: _Indices | dict[_Name, _Indices] | None = None
    ensure_weight_tying: bool | None = None
    # Which steps initialised or trained the matrices, and notes. `_check_init` has more to say.
    init_lora_weights: bool | _Text = True
    loftq_config: dict[str, Any] | None = None
    eva_config: dict[str, Any] | None = None
    corda_config: dict[str, Any] | None = None
    lora_ga_config: dict[str, Any] | None = None
    peft_version: _Text | None = None
    base_model_name_or_path: _Text | None = None
    revision: _Text | None = None
    auto_mapping: dict[str, str | None] | None = None
    inference_mode: bool | None = None
    runtime_config: dict[str, Any] | None = None


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """The configuration of an adapter of a flavour that is computed exactly, as it is in the file.

    Raises ValueError for a file that is not peft's, for values of other types or beyond all
    bounds, for a method other than LoRA, and for settings of LoRA that neither the built-in sampler
    nor a merge reproduces, by name.
    """
    file = directory / ADAPTER_CONFIG_FILE
    # In the hub's cache it is a link.
    config = read_json(file.resolve(), dict[str, Any], remedy=_REMEDY)
    method, task = config.get("peft_type"), config.get("task_type")
    if method != "LORA":
        raise ValueError(
            f"the adapter {directory} is of the method {str(method)[:_SHOWN]} (peft_type in "
            f"{ADAPTER_CONFIG_FILE}); needs LORA; train such an adapter, or merge this one into "
            "its base with peft's merge_and_unload, where the method allows it, and give the "
            "merged model as --model"
        )
    if task not in (None, "CAUSAL_LM"):
        raise ValueError(
            f"the adapter {directory} is for the task {str(task)[:_SHOWN]} (task_type in "
            f"{ADAPTER_CONFIG_FILE}); needs CAUSAL_LM; give an adapter of a causal language model"
        )
    checked(AdapterConfig, config, str(file), _REMEDY)
    _check_init(directory, config)
    if unknown := _unusual_settings(config):
        more = len(unknown) - _FIRST_SETTINGS
        listed = ", ".join(unknown[:_FIRST_SETTINGS]) + (f" and {more} more" if more > 0 else "")
        raise ValueError(
            f"the adapter {directory} has the LoRA settings {listed}, which are not "
            "computed here; needs plain LoRA, rsLoRA or DoRA, with or without biases, "
            "modules_to_save, patterns of ranks, target_parameters and trainable tokens; merge "
            "it into its base with peft, where it can, and give the merged model as --model"
        )
    return config


def _check_init(directory: Path, config: Mapping[str, Any]) -> None:
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init not in _PLAIN_INITS:
        raise ValueError(
            f"the adapter {directory} has init_lora_weights {init[:_SHOWN]!r}, with which peft "
            "changes the base's weights as it loads the adapter; needs an adapter of the base as "
            "it is; save it with peft's path_initial_model_for_weight_conversion, or, if --model "
            f"is the changed base already, set init_lora_weights to true in {ADAPTER_CONFIG_FILE}"
        )


def _unusual_settings(config: Mapping[str, Any]) -> list[str]:
    """Settings beside those of `AdapterConfig` that are on, as "name = value". peft adds such a
    setting with each new flavour, and versions that do not know it leave it out with a warning."""
    defaults = {}
    for field in dataclasses.fields(LoraConfig):
        if field.default is not dataclasses.MISSING:
            defaults[field.name] = field.default
    # An empty list, a zero and null are off.
    unusual = {
        name: value
        for name, value in config.items()
        if name not in AdapterConfig.model_fields and value and value != defaults.get(name)
    }
    for name, kind in _INITS.items():
        known = {field.name for field in dataclasses.fields(kind)}
        notes = config.get(name) or {}
        unusual |= {f"{name}.{k}": value for k, value in notes.items() if value and k not in known}
    return [
        f"{name[:_SHOWN]} = {json.dumps(value)[:_SHOWN]}" for name, value in sorted(unusual.items())
    ]


def largest_rank(config: Mapping[str, Any]) -> int:
    """The largest rank of an adapter's matrices."""
    return max([config["r"], *config.get("rank_pattern", {}).values()])


def patterns_of(config: Mapping[str, Any]) -> dict[str, str]:
    """The regular expressions of a configuration, by their keys."""
    found = {
        key: config[key]
        for key in ("target_modules", "exclude_modules")
        if isinstance(config.get(key), str)
    }
    for key in ("rank_pattern", "alpha_pattern"):
        found |= {f"{key}, {n}": text for n, text in enumerate(config.get(key, {}), start=1)}
    return found
