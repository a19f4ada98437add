"""LoRA adapters on the base."""

import re
from collections.abc import Sequence, Set
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from paint_engine.config.sections import ALL_LINEAR, LoraSection
from paint_engine.model.forward import compute_dtype

# peft's own switch on its layers.
_CASTS_INPUT = "cast_input_dtype_enabled"
# A Mamba layer reads these weights past their forward pass, in fused kernels among others, so an
# adapter on them would be left out. Such a layer has parameters `A_log` and `D`.
_READ_BY_MAMBA = ("out_proj", "x_proj", "dt_proj")
# peft refuses one of such a pair without the other.
_PAIRS = ("gate_proj", "up_proj", "w1", "w3")


@dataclass(frozen=True)
class Targets:
    """What peft is told: names of modules, which also match as the end of a full name, and a
    regular expression of full names that they are not to match.

    `layers`: full names of the layers that get adapters by that.
    """

    names: list[str]
    excluded: str | None
    layers: frozenset[str]


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _matches(full_name: str, name: str) -> bool:
    # peft's rule.
    return full_name == name or full_name.endswith(f".{name}")


def _layers_read_past_forward(model: PreTrainedModel) -> set[str]:
    return {
        f"{name}.{child}" if name else child
        for name, module in model.named_modules()
        if hasattr(module, "A_log") and hasattr(module, "D")
        for child, _ in module.named_children()
        if child in _READ_BY_MAMBA
    }


def _taken_for_experts(model: PreTrainedModel, names: Set[str]) -> set[str]:
    """Returns which names peft takes for the weights of experts, which are one tensor each. It does
    so also where a linear layer, such as a shared expert's, has the name."""
    config = LoraConfig(target_modules=[*names, *_PAIRS])
    convert_peft_config_for_transformers(config, model, None)
    assert isinstance(config.target_modules, set)
    return set(names) - config.target_modules


def _linear_layers(model: PreTrainedModel) -> set[str]:
    """Returns the full names of the text decoder's linear layers that can have adapters, without
    the output head."""
    inside = set(model.get_decoder().modules()) - {model.get_output_embeddings()}
    linear = {
        name
        for name, module in model.named_modules()
        if module in inside and isinstance(module, nn.Linear | Conv1D)
    }
    linear -= _layers_read_past_forward(model)
    experts = _taken_for_experts(model, set(map(_last, linear)))
    return {name for name in linear if _last(name) not in experts}


def _embeddings(model: PreTrainedModel) -> set[str]:
    """Returns the full name of the input embeddings, which have adapters only where one asks for
    them by name."""
    embeddings = model.get_input_embeddings()
    return {name for name, module in model.named_modules() if module is embeddings}


def _check_head(model: PreTrainedModel, names: Sequence[str]) -> None:
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear), type(head)
    # "lm_head", and "embed_tokens" if the two are tied.
    holders = {
        _last(name)
        for name, module in model.named_modules()
        if getattr(module, "weight", None) is head.weight
    }
    if refused := holders & set(names):
        raise ValueError(
            f"--lora.target_modules: got {', '.join(sorted(refused))}, which holds the output "
            "head; needs layers below it, since the loss reads the head as one plain matrix; "
            "leave it out"
        )


def _check_names(model: PreTrainedModel, names: Sequence[str], linear: set[str]) -> None:
    """Raises ValueError for a name without a linear layer that adapters can be put on, except that
    of the embeddings."""
    layers = linear | _embeddings(model)
    unmatched = [name for name in names if not any(_matches(layer, name) for layer in layers)]
    if not unmatched:
        return
    wrong = set(map(_last, unmatched))
    experts = _taken_for_experts(model, wrong) | wrong.intersection(
        _last(name.removesuffix(".weight"))
        for name, weight in model.get_decoder().named_parameters()
        if weight.ndim == 3
    )
    read = {_last(layer) for layer in _layers_read_past_forward(model)}
    notes = ""
    if experts:
        notes += (
            f" {', '.join(sorted(experts))} stand for weights that are one tensor of all experts, "
            "which gets no adapter."
        )
    if bypassed := read & wrong:
        notes += (
            f" Mamba layers read {', '.join(sorted(bypassed))} past the adapters, which would not "
            "be trained."
        )
    raise ValueError(
        f"--lora.target_modules: got {', '.join(unmatched)}, which no linear layer of the decoder "
        f"of {type(model).__name__} is called; needs some of "
        f"{', '.join(sorted(set(map(_last, linear))))}; use these names, or "
        f"--lora.target_modules {ALL_LINEAR} for all of them.{notes}"
    )


def peft_targets(model: PreTrainedModel, names: Sequence[str]) -> Targets:
    """Returns what peft is told for these names of `lora.target_modules`.

    Layers of the same name outside of the text decoder, as in a vision tower, get no adapters:
    nothing would train them.

    Raises ValueError for the output head, and for names that match no linear layer.
    """
    linear = _linear_layers(model)
    if tuple(names) == (ALL_LINEAR,):
        names = sorted(set(map(_last, linear)))
    _check_head(model, names)
    _check_names(model, names, linear)
    found = {
        layer for layer, _ in model.named_modules() if any(_matches(layer, name) for name in names)
    }
    layers = frozenset(found & (linear | _embeddings(model)))
    return Targets(list(names), _pattern(found - layers, layers), layers)


def _pattern(excluded: Set[str], kept: Set[str]) -> str | None:
    """Returns a regular expression of the excluded full names, or None. The layers' numbers are
    left open where no kept name matches then."""
    patterns = set()
    for name in excluded:
        escaped = re.escape(name)
        every_layer = re.sub(r"\d+", r"\\d+", escaped)
        clashes = any(re.fullmatch(every_layer, other) for other in kept)
        patterns.add(escaped if clashes else every_layer)
    return "|".join(sorted(patterns)) or None


def add_lora(
    model: PreTrainedModel, section: LoraSection, seed: int
) -> PreTrainedModel | PeftModel:
    """Adds float32 adapters to the model. With LoRA off, returns the model with all weights of its
    text decoder and its head trainable.

    seed: seeds A's initial values. B starts at zero, so the first step's student is the base.

    Raises ValueError as `peft_targets` does.
    """
    if not section.enabled:
        _freeze_what_text_leaves_out(model)
        return model
    targets = peft_targets(model, section.target_modules)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=targets.names,
        exclude_modules=targets.excluded,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type="CAUSAL_LM",
    )
    # The model stays in evaluation mode except during the student's pass of a training step.
    adapted = get_peft_model(model, config).eval()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    if layers.keys() != targets.layers:
        # peft translates names for some architectures.
        differing = sorted({_last(name) for name in layers.keys() ^ targets.layers})
        raise ValueError(
            f"--lora.target_modules: got {', '.join(section.target_modules)}, but peft treats "
            f"{', '.join(differing)} of {type(model).__name__} in another way; leave these names "
            "out"
        )
    for layer in layers.values():
        # By default, peft casts each layer's input to float32 and keeps that copy for the backward
        # pass. With the switch off, autocast rounds the adapter and no copy is kept.
        setattr(layer, _CASTS_INPUT, compute_dtype(model) == torch.float32)
    return adapted


def _freeze_what_text_leaves_out(model: PreTrainedModel) -> None:
    """Freezes what text does not pass, such as a vision tower: it would have no gradient."""
    modules = filter(None, (model.get_decoder(), model.get_output_embeddings()))
    passed = {id(parameter) for module in modules for parameter in module.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in passed:
            parameter.requires_grad_(False)
