"""LoRA adapters on the base."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from paint_engine.config.sections import LoraSection
from paint_engine.model.forward import compute_dtype

# peft's own switch on its layers.
_CASTS_INPUT = "cast_input_dtype_enabled"


def add_lora(
    model: PreTrainedModel, section: LoraSection, seed: int
) -> PreTrainedModel | PeftModel:
    """Adds float32 adapters to the model. With LoRA off, returns the model with all weights
    trainable.

    seed: seeds A's initial values. B starts at zero, so the first step's student is the base.

    Raises ValueError for adapters on the output head.
    """
    if not section.enabled:
        return model
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear), type(head)
    # "lm_head", and "embed_tokens" if the two are tied.
    holders = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if getattr(module, "weight", None) is head.weight
    }
    if refused := holders & set(section.target_modules):
        raise ValueError(
            f"--lora.target_modules: got {', '.join(sorted(refused))}, which holds the output "
            "head; needs layers below it, since the loss reads the head as one plain matrix; "
            "leave it out"
        )
    torch.manual_seed(seed)
    config = LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=list(section.target_modules),
        task_type="CAUSAL_LM",
    )
    # The model stays in evaluation mode except during the student's pass of a training step.
    adapted = get_peft_model(model, config).eval()
    for layer in adapted.modules():
        if isinstance(layer, BaseTunerLayer):
            # By default, peft casts each layer's input to float32 and keeps that copy for the
            # backward pass. With the switch off, autocast rounds the adapter and no copy is kept.
            setattr(layer, _CASTS_INPUT, compute_dtype(model) == torch.float32)
    return adapted
