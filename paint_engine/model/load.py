"""Loads the base model."""

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import RevisionResolutionError
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from paint_engine.config.bundled import BUNDLED
from paint_engine.config.schema import Config
from paint_engine.config.sections import ModelSection
from paint_engine.distributed import World, gather_objects, together
from paint_engine.files import ADAPTER_CONFIG_FILE, FILE_FAILURES, check_no_devices
from paint_engine.model.forward import _COMPUTE_DTYPE
from paint_engine.model.lora import add_lora
from paint_engine.model.probe import set_logit_scale
from paint_engine.model.stored import (
    empty_model,
    load_empty,
    load_weights,
    read_settings,
    stored_shapes,
)
from paint_engine.seeds import adapter_seed

# What a model has beside its weights.
_SETTINGS_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.py")
# The same weights again, for other libraries.
_OTHER_WEIGHTS = ("original/*", "consolidated*", "onnx/*")


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


def is_on_hub(section: ModelSection) -> bool:
    """Returns whether the model is named by a Hugging Face id."""
    return section.name_or_path not in BUNDLED and not Path(section.name_or_path).is_dir()


def _pinned_directory(section: ModelSection, *, with_weights: bool) -> str:
    """Returns the directory of a revision's files in the hub's cache, to which they are downloaded.
    Whoever reads the model from there reads that commit."""
    name, revision = section.name_or_path, section.revision
    if not is_on_hub(section):
        raise ValueError(
            f"model.revision: got {revision!r} with {name!r}, which is a local directory; needs a "
            "Hugging Face id, whose versions have names; leave out --model.revision"
        )
    patterns = [*_SETTINGS_FILES, *(["*.safetensors"] if with_weights else [])]
    try:
        return snapshot_download(
            name, revision=revision, allow_patterns=patterns, ignore_patterns=list(_OTHER_WEIGHTS)
        )
    except (OSError, ValueError, RevisionResolutionError) as error:
        raise ValueError(
            f"revision {revision!r} of the model {name!r} could not be loaded "
            f"({type(error).__name__}: {error}): it is neither in the cache nor reachable on the "
            "hub; check --model.revision, --model.name_or_path and the network"
        ) from error


def hub_commit(section: ModelSection) -> str | None:
    """Returns the commit of a hub model's files in the cache, once its configuration or its
    tokenizer was loaded; None if none are there, and for a local model."""
    if not is_on_hub(section):
        return None
    for file in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        found = try_to_load_from_cache(section.name_or_path, file, revision=section.revision)
        if isinstance(found, str):
            return Path(found).parent.name
    return None


def resolve_model(section: ModelSection, *, with_weights: bool = True) -> str:
    """Returns what the model is read from: the directory of a bundled model or of a pinned
    revision; otherwise the name itself.

    Raises ValueError for a directory that lacks the configuration, the tokenizer or the weights, or
    that holds an adapter or a pipe, for a revision that there is not, and for a revision of a
    directory.
    """
    name_or_path = section.name_or_path
    if section.revision is not None:
        name_or_path = _pinned_directory(section, with_weights=with_weights)
    if name_or_path in BUNDLED:
        return str(BUNDLED[name_or_path])
    path = Path(name_or_path)
    if not path.is_dir():
        # An id has at most one slash, between owner and name.
        if name_or_path.startswith(("/", ".", "~")) or name_or_path.count("/") > 1:
            raise ValueError(
                f"model {name_or_path}: there is no such directory (relative to {Path.cwd()}); "
                "needs a model directory or a Hugging Face id; check --model.name_or_path (--model "
                "in an evaluation or export)"
            )
        return name_or_path
    check_no_devices(path)
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
    ranks: World | None = None,
    say: Callable[[str], object] = print,
) -> PreTrainedModel:
    """Loads the base onto `device`, from safetensors only. Its attention is SDPA where the
    architecture has that, and its own elsewhere (a softcap, Mamba).

    section.dtype: dtype of the arithmetic, and of the weights unless they are trained.
    trains_base: the base's own weights are trained. They are then float32, because bfloat16 rounds
    most updates away at the usual learning rates.
    ranks: the ranks that `shard_model` will divide it among. The main rank alone reads the weights,
        onto its CPU; the others' model is on the meta device. A collective call.
    say: is called with a note if the names of the weights had to be changed.

    Raises ValueError as `load_weights` and `logit_scale` do.
    """
    dtype = pick_dtype(section.dtype, device)
    stored = torch.float32 if trains_base else dtype
    if ranks is None:
        model = load_weights(resolve_model(section), section, stored, say, device=device)
    else:
        model = _load_on_main(section, stored, say, ranks)
    if section.revision is not None:
        # peft writes it into the adapters' configuration: the id, and not a place in the cache.
        model.name_or_path = model.config.name_or_path = section.name_or_path
    setattr(model, _COMPUTE_DTYPE, dtype)
    set_logit_scale(model, f"model {section.name_or_path}")
    return model


def _load_on_main(
    section: ModelSection, dtype: torch.dtype, say: Callable[[str], object], world: World
) -> PreTrainedModel:
    """Loads a model on the CPU of the main rank, and on the meta device of the others. A collective
    call: what the main rank refuses is raised on every rank."""

    def load() -> tuple[PreTrainedModel, dict[str, tuple[int, ...]]] | None:
        if not world.is_main:
            return None
        path = resolve_model(section)
        model = load_weights(path, section, dtype, say, apart=True)
        return model, stored_shapes(path, section)

    loaded = together(load, (ValueError, *FILE_FAILURES))
    shapes = gather_objects(loaded and loaded[1])[0]
    if loaded is not None:
        return loaded[0]
    assert shapes is not None
    return load_empty(resolve_model(section, with_weights=False), section, dtype, shapes)


def meta_base(section: ModelSection, *, trains_base: bool = False) -> PreTrainedModel:
    """Builds a model without weights, on the meta device, from config.json alone.

    trains_base: as in `load_base`.

    Raises ValueError if there is no such model.
    """
    path = str(BUNDLED.get(section.name_or_path, section.name_or_path))
    if section.revision is not None:
        path = resolve_model(section, with_weights=False)
    settings = read_settings(path, section)
    narrow = not trains_base and section.dtype == "bfloat16"
    return empty_model(settings, section, dtype=torch.bfloat16 if narrow else torch.float32)


def meta_model(config: Config) -> nn.Module:
    """Builds the model that a run would train, with its adapters, on the meta device.

    It reads config.json alone and loads no weights. Raises ValueError if there is no such model or
    it cannot have these adapters.
    """
    base = meta_base(config.model, trains_base=not config.lora.enabled)
    with torch.device("meta"):
        return add_lora(base, config.lora, adapter_seed(config.train.seed))
