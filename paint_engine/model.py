"""Loading the base and its tokenizer, putting LoRA on it, and its hidden states at completion
positions."""

from pathlib import Path

import torch
from jaxtyping import Float
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from paint_engine.batch import pad_sequences
from paint_engine.config import LoraSection, ModelSection
from paint_engine.types import PackedSequences

TINY_BASE = Path(__file__).parent / "tiny" / "base"


def pick_device(name: str) -> torch.device:
    """ "auto" is the GPU where there is one. ValueError for "cuda" without one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "train.device is 'cuda', but this machine has no usable CUDA device: "
            "use --train.device cpu or auto"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _pick_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if bf16 else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def _resolve(name_or_path: str) -> str:
    """The bundled base for "tiny"; a directory is checked for what a model needs."""
    if name_or_path == "tiny":
        return str(TINY_BASE)
    path = Path(name_or_path)
    if not path.is_dir():
        return name_or_path
    present = {file.name for file in path.iterdir()}
    if "config.json" not in present:
        needed = "config.json (the model's configuration)"
    elif not present & {"tokenizer.json", "tokenizer.model", "vocab.json"}:
        needed = "tokenizer (tokenizer.json, tokenizer.model or vocab.json)"
    elif not any(name.endswith(".safetensors") for name in present):
        needed = "weights in safetensors files"
    else:
        return name_or_path
    raise ValueError(
        f"model directory {name_or_path} has no {needed}; it holds "
        f"{', '.join(sorted(present)) or 'nothing'}: save the model and the tokenizer there with "
        "save_pretrained, or name another with --model.name_or_path"
    )


def _load_failure(what: str, name: str, error: Exception) -> ValueError:
    remedy = (
        "a file in that directory is damaged or not of this model; save or fetch it again"
        if name == "tiny" or Path(name).is_dir()
        else "it is neither a local directory nor reachable on the hub; check "
        "--model.name_or_path and the network"
    )
    return ValueError(
        f"{what} {name!r} could not be loaded ({type(error).__name__}: {error}): {remedy}"
    )


def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """The base's tokenizer. ValueError where there is none, or where it has no chat template."""
    path = _resolve(section.name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=section.trust_remote_code)
    except OSError as error:
        raise _load_failure("tokenizer of", section.name_or_path, error) from error
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer of {section.name_or_path} has no chat template, which the prompts of "
            "student and teacher are built with: use an instruct model, or add a "
            "chat_template.jinja beside it"
        )
    return tokenizer


def _check_head(model: PreTrainedModel, name: str) -> None:
    """The losses read the head as one plain matrix: logits = hidden states @ weight^T."""
    head = model.get_output_embeddings()
    text_config = model.config.get_text_config()
    neutral = {"logits_scaling": 1.0, "logit_scale": 1.0, "final_logit_softcapping": None}
    changed = [
        f"{key} = {value}"
        for key, plain in neutral.items()
        if (value := getattr(text_config, key, plain)) not in (plain, None)
    ]
    if not isinstance(head, nn.Linear) or head.bias is not None:
        changed.append("a head that is not a linear layer without bias")
    if changed:
        raise ValueError(
            f"model {name} has {', '.join(changed)}: the losses need logits that are a plain "
            "product of hidden states and head, as in Qwen3 or Llama; use such a model"
        )


def load_base(
    section: ModelSection, device: torch.device, *, trains_base: bool = False
) -> PreTrainedModel:
    """The base on `device`, safetensors only, attention by SDPA.

    trains_base: the base's own weights are trained; they are then kept in float32, for at such
    learning rates bfloat16 rounds most updates away.
    """
    path = _resolve(section.name_or_path)
    if trains_base and section.dtype == "bfloat16":
        raise ValueError(
            "model.dtype is 'bfloat16' with lora.enabled = false: the trained weights need float32 "
            "(bfloat16 loses small updates); use --model.dtype float32, or train adapters"
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32 if trains_base else _pick_dtype(section.dtype, device),
            trust_remote_code=section.trust_remote_code,
            use_safetensors=True,
            attn_implementation="sdpa",
        )
    except (OSError, SafetensorError) as error:
        raise _load_failure("model", section.name_or_path, error) from error
    _check_head(model, section.name_or_path)
    nn.Module.to(model, device)
    return model


def add_lora(
    model: PreTrainedModel, section: LoraSection, seed: int
) -> PreTrainedModel | PeftModel:
    """The model with float32 adapters to train, or the model itself, all trainable, where LoRA is
    off.

    seed: of A's initial values (B starts at zero, so the first step's student is the base).

    Raises ValueError for adapters on the output head.
    """
    if not section.enabled:
        return model
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear), type(head)
    # "lm_head", and "embed_tokens" where the two are tied.
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
    # Evaluation mode is the state of rest; the training step leaves it for the student's pass.
    return get_peft_model(model, config).eval()


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The causal language model inside, with its adapters in place."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(inner, PreTrainedModel)
    return inner


def lm_head_weight(model: nn.Module) -> Float[Tensor, "V H"]:
    """The output projection; the input embeddings where the two are tied."""
    head = causal_lm(model).get_output_embeddings()
    assert isinstance(head, nn.Linear), type(head)
    return head.weight


def max_context(model: nn.Module) -> int:
    """The number of positions that the model was built for, in tokens."""
    return causal_lm(model).config.max_position_embeddings


def hidden_states(
    model: nn.Module, sequences: PackedSequences, *, attention: str
) -> Float[Tensor, "N H"]:
    """Final hidden states (after the last norm) at the loss positions.

    attention: "padded" runs the sequences as rows of a rectangle, "packed" as one row whose
    positions restart, which transformers recognises only without a mask and without a cache.
    """
    backbone = causal_lm(model).base_model
    if attention == "packed":
        output = backbone(
            input_ids=sequences.token_ids[None],
            position_ids=sequences.position_ids[None],
            use_cache=False,
        )
        return output.last_hidden_state[0, sequences.loss_positions]
    assert attention == "padded", attention
    padded = pad_sequences(sequences)
    # Causal attention with the padding on the right: no real token sees it, so no mask is needed,
    # and positions count up through the padding (a restart there would read as packing).
    output = backbone(input_ids=padded.token_ids, use_cache=False)
    return output.last_hidden_state.flatten(0, 1)[padded.loss_positions]
