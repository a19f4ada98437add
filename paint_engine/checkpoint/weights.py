"""The trained weights as unsharded tensors, and as files for peft, transformers and vLLM."""

from pathlib import Path

from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from paint_engine.files import ADAPTER_FILE, MODEL_FILE
from paint_engine.model import causal_lm


def whole(tensor: Tensor) -> Tensor:
    """The unsharded tensor. A collective for a DTensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """The trained weights as they lie on this rank, perhaps sharded, by name.

    With adapters: theirs, float32, under peft's names ("base_model.model.model.layers.0.self_attn.
    q_proj.lora_A.weight"). Without: all of the causal language model's, under its own names; a tied
    head is left out, as transformers does.
    """
    if isinstance(model, PeftModel):
        # "auto" would ask the hub whether the vocabulary was resized; it never is here.
        return get_peft_model_state_dict(model, save_embedding_layers=False)
    tied = set(causal_lm(model)._tied_weights_keys or ())
    tied = tied if causal_lm(model).config.get_text_config().tie_word_embeddings else set()
    return {n: t for n, t in causal_lm(model).state_dict().items() if n not in tied}


def gather_weights(model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """Copies of the trained weights, unsharded, on the CPU. A collective: every rank calls it.

    keep: False = this rank takes part, and the result is empty.
    """
    gathered = {}
    for name, tensor in trained_weights(model).items():
        # An unsharded tensor on the CPU is cloned, since training changes it in place.
        full = whole(tensor.detach())
        if keep:
            gathered[name] = full.cpu() if full.is_cuda else full.clone()
    return gathered


def write_weights(model: nn.Module, weights: dict[str, Tensor], directory: Path) -> None:
    """Writes gathered weights, on one rank: an adapter in peft's format, or a whole model in
    transformers'.

    directory: exists, without files of these names.
    """
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    if isinstance(model, PeftModel):
        save_file(weights, directory / ADAPTER_FILE, metadata={"format": "pt"})
        config = model.peft_config["default"]
        was_inference = config.inference_mode
        config.inference_mode = True
        config.save_pretrained(str(directory))
        config.inference_mode = was_inference
        return
    inner = causal_lm(model)
    save_file(weights, directory / MODEL_FILE, metadata={"format": "pt"})
    inner.config.save_pretrained(str(directory))
    if inner.generation_config is not None:
        # Not save_pretrained, which refuses some settings of published models.
        inner.generation_config.to_json_file(directory / "generation_config.json")
