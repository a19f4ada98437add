"""Writes the trained model for others: merged as one model that transformers 4.57 and 5 read
alike, or as its adapter.

Release 5 of transformers writes names that 4.57 does not know. 4.57 skips them without a word, and
its rotary embeddings are then those of its own default base frequency.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from paint_engine.checkpoint.adapters.config import read_adapter_config
from paint_engine.checkpoint.merge import Survival, build_trained, check_against_base
from paint_engine.config.sections import ModelSection
from paint_engine.files import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    MODEL_CONFIG_FILE,
    new_directory,
    read_json,
    write_atomic,
    write_json,
)
from paint_engine.model import is_on_hub, load_tokenizer, resolve_model

# The class that reads tokenizer.json as it is, by a name of both releases.
_TOKENIZER_CLASS = "PreTrainedTokenizerFast"
# What the classes of both releases set each by themselves.
_TOKENIZER_SETTINGS = ("model_input_names", "padding_side", "truncation_side")
_LAYER_TYPES = ("full_attention", "sliding_attention")


def export_merged(
    checkpoint: Path, output_dir: Path, section: ModelSection, survivals: list[Survival]
) -> bool:
    """Writes the trained model with the base's tokenizer, in the dtype of the first of
    `survivals`, into `output_dir`, all of it or nothing. Each survival counts the update.

    Returns whether transformers 4.57 reads the model too, as `save_model` does.

    Raises ValueError where `output_dir` is not empty, where the base cannot be loaded or the
    adapter does not fit it, and WriteFailed where it cannot be written.
    """
    _check_new(output_dir)
    tokenizer = load_tokenizer(section)
    model = build_trained(checkpoint, section, survivals)
    # The directory may be a link of the user's to another disk.
    with new_directory(output_dir.resolve()) as unfinished:
        return save_model(model, tokenizer, unfinished)


def export_adapter(checkpoint: Path, output_dir: Path, section: ModelSection) -> dict[str, Any]:
    """Copies the adapter, with the base's name in its configuration, into `output_dir`, all of it
    or nothing. Returns that configuration.

    Raises ValueError where the checkpoint has all weights instead, and as `export_merged` does.
    """
    _check_new(output_dir)
    if not (checkpoint / ADAPTER_CONFIG_FILE).is_file():
        raise ValueError(
            f"--form adapter: {checkpoint} has all weights of a model and no adapter; needs a run "
            "with LoRA; leave --form out"
        )
    check_against_base(checkpoint, section)
    config = read_adapter_config(checkpoint)
    on_hub = is_on_hub(section)
    config["base_model_name_or_path"] = section.name_or_path if on_hub else resolve_model(section)
    config["revision"] = section.revision
    with new_directory(output_dir.resolve()) as unfinished:
        shutil.copyfile(checkpoint / ADAPTER_FILE, unfinished / ADAPTER_FILE)
        write_json(unfinished / ADAPTER_CONFIG_FILE, config)
    return config


def _check_new(output_dir: Path) -> None:
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"{output_dir} exists already: give a directory that is new or empty")


# ---- a model's directory -------------------------------------------------------------------------


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> bool:
    """Writes model and tokenizer into an existing directory.

    Returns whether transformers 4.57 has names for the model's rotary embeddings too. Where they
    would change what release 5 reads, they are left out.

    Raises OSError or SafetensorError where that is not possible.
    """
    generation = model.generation_config
    # Written by itself, since save_pretrained warns about some settings and refuses others.
    model.generation_config = GenerationConfig()
    model.save_pretrained(str(directory))
    model.generation_config = generation
    if generation is not None:
        generation.to_json_file(directory / "generation_config.json")
    tokenizer.save_pretrained(str(directory))
    if isinstance(tokenizer, TokenizersBackend):
        _change(
            directory / "tokenizer_config.json", lambda found: _tokenizer_names(found, tokenizer)
        )
    file = directory / MODEL_CONFIG_FILE
    plain = file.read_text()
    _change(file, add_older_names)
    # Of the same class, so that no code of the directory is looked for.
    if _rope(type(model.config).from_pretrained(directory)) == _rope(model.config):
        return True
    write_atomic(file, plain)
    return False


def _rope(config: PreTrainedConfig) -> dict[str, Any]:
    found = getattr(config.get_text_config(), "rope_parameters", None) or {}
    # Another name of rope_type, that release 5 keeps beside it.
    return {name: value for name, value in found.items() if name != "type"}


def _change(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    changed = change(read_json(file, dict[str, Any], constants=True))
    write_atomic(file, json.dumps(changed, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def add_older_names(config: dict[str, Any]) -> dict[str, Any]:
    """A model's configuration with what transformers 4.57 reads beside the names of release 5."""
    config = {
        name: add_older_names(value) if isinstance(value, dict) and "model_type" in value else value
        for name, value in config.items()
    }
    if "dtype" in config:
        # Until release 4.55.
        config["torch_dtype"] = config["dtype"]
    for alias, name in _aliases(config.get("model_type")).items():
        # Release 5 stores one of the two, often the one that 4.57 does not know (num_experts).
        if isinstance(config.get(name), int) and alias not in config:
            config[alias] = config[name]
    if rope := config.get("rope_parameters"):
        config |= _older_rope(rope, config.get("model_type"))
    return config


def _aliases(model_type: str | None) -> dict[str, str]:
    if model_type is None or model_type not in CONFIG_MAPPING:
        return {}
    return CONFIG_MAPPING[model_type].attribute_map


def _older_rope(rope: dict[str, Any], model_type: str | None) -> dict[str, Any]:
    by_layer = {name: rope[name] for name in _LAYER_TYPES if rope.get(name)}
    if not by_layer:
        return _flat_rope(rope, model_type)
    full, sliding = (by_layer.get(name, {}) for name in _LAYER_TYPES)
    older = _flat_rope(full, model_type) if full else {}
    if "rope_theta" in sliding:
        older["rope_local_base_freq"] = sliding["rope_theta"]
    return older


def _flat_rope(rope: dict[str, Any], model_type: str | None) -> dict[str, Any]:
    older = {n: rope[n] for n in ("rope_theta", "partial_rotary_factor") if n in rope}
    scaling = {name: value for name, value in rope.items() if name not in older}
    if scaling.get("rope_type", "default") != "default":
        if model_type is not None and model_type.startswith("phi3"):
            # Its class accepts these three keys and no others.
            scaling = {
                "type": scaling["rope_type"],
                "short_factor": scaling["short_factor"],
                "long_factor": scaling["long_factor"],
            }
        older["rope_scaling"] = scaling
    return older


def _tokenizer_names(
    settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    if "auto_map" not in settings:
        settings["tokenizer_class"] = _TOKENIZER_CLASS
    for name in _TOKENIZER_SETTINGS:
        settings[name] = getattr(tokenizer, name)
    if isinstance(settings.get("extra_special_tokens"), list):
        # 4.57 takes this name for a dictionary.
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    return settings
