"""The trained model as one checkpoint: adapters merged into the base in float32."""

from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import Linear, LoraLayer
from safetensors import SafetensorError
from transformers import PreTrainedModel

from paint_engine.config.sections import ModelSection
from paint_engine.files import ADAPTER_CONFIG_FILE, new_directory
from paint_engine.model import load_tokenizer, resolve_model
from paint_engine.model.stored import load_weights, read_settings, stored_dtype


def merge_adapter(
    base: PreTrainedModel, checkpoint: Path, dtype: torch.dtype | None
) -> PreTrainedModel:
    """The base with the adapter's update added to its weights, in place.

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
    """The trained model: adapters merged, or the checkpoint's own weights.

    dtype: of all weights; None = that of the stored base.
    """
    path = resolve_model(section.name_or_path)
    if (checkpoint / ADAPTER_CONFIG_FILE).is_file():
        model = merge_adapter(load_weights(path, section, None), checkpoint, dtype)
    else:
        own = section.model_copy(update={"name_or_path": str(checkpoint)})
        model = load_weights(str(checkpoint), own, None)
        dtype = dtype or stored_dtype(read_settings(path, section))
    if dtype is not None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        model.config.dtype = dtype
    return model


def export(
    checkpoint: Path, output_dir: Path, section: ModelSection, dtype: torch.dtype | None
) -> None:
    """Writes the trained model with the base's tokenizer into `output_dir`, all of it or nothing.

    Raises ValueError where `output_dir` is not empty, where the base cannot be loaded, and where
    the disk is full.
    """
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"{output_dir} exists already: give a directory that is new or empty")
    tokenizer = load_tokenizer(section)
    model = build_model(checkpoint, section, dtype)
    try:
        with new_directory(output_dir) as unfinished:
            model.save_pretrained(str(unfinished))
            tokenizer.save_pretrained(str(unfinished))
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{output_dir} could not be written ({error}); nothing of it is left; make room, or "
            "give a directory elsewhere"
        ) from error
