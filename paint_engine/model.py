"""Loading the base and its tokenizer, putting LoRA on it, sharding it, and its hidden states at
completion positions."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from jaxtyping import Float
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from paint_engine.attention import packed_arguments
from paint_engine.batch import pad_sequences
from paint_engine.config_sections import LoraSection, ModelSection
from paint_engine.distributed import World
from paint_engine.types import PackedSequences

TINY_BASE = Path(__file__).parent / "tiny" / "base"

# Set on a causal language model: the dtype that its products run in, and the bound form of
# `_backbone_states` that FSDP wraps.
_COMPUTE_DTYPE = "paint_compute_dtype"
_BACKBONE = "paint_backbone_states"
# peft's own switch on its layers.
_CASTS_INPUT = "cast_input_dtype_enabled"


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


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a name; "auto" is bfloat16 on a GPU that has it, else float32."""
    if name == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if bf16 else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def resolve_model(name_or_path: str, *, with_weights: bool = True) -> str:
    """The bundled base for "tiny"; a directory is checked for what a model needs.

    Raises ValueError for a directory that lacks a part.
    """
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
    elif with_weights and not any(name.endswith(".safetensors") for name in present):
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
    path = resolve_model(section.name_or_path, with_weights=False)
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
    section: ModelSection,
    device: torch.device,
    *,
    trains_base: bool = False,
    on_cpu: bool = False,
) -> PreTrainedModel:
    """The base on `device`, safetensors only, attention by SDPA.

    section.dtype: of the arithmetic, and of the weights unless they are trained.
    trains_base: the base's own weights are trained; they are then kept in float32, for at such
    learning rates bfloat16 rounds most updates away.
    on_cpu: leave it there, to be sharded onto devices of that kind.
    """
    path = resolve_model(section.name_or_path)
    dtype = pick_dtype(section.dtype, device)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32 if trains_base else dtype,
            trust_remote_code=section.trust_remote_code,
            use_safetensors=True,
            attn_implementation="sdpa",
        )
    except (OSError, SafetensorError) as error:
        raise _load_failure("model", section.name_or_path, error) from error
    _check_head(model, section.name_or_path)
    setattr(model, _COMPUTE_DTYPE, dtype)
    if not on_cpu:
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
    adapted = get_peft_model(model, config).eval()
    for layer in adapted.modules():
        if isinstance(layer, BaseTunerLayer):
            # peft would cast each layer's input to the adapter's float32 and keep that copy for the
            # backward pass; autocast rounds the adapter instead, and the input is kept once.
            setattr(layer, _CASTS_INPUT, compute_dtype(model) == torch.float32)
    return adapted


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


def compute_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that matrix products run in; trained weights are float32 whatever it is."""
    return getattr(causal_lm(model), _COMPUTE_DTYPE, causal_lm(model).dtype)


def autocast(model: nn.Module) -> torch.autocast:
    """Rounds float32 weights to the model's dtype of arithmetic, where that is a narrower one."""
    inner, dtype = causal_lm(model), compute_dtype(model)
    narrow = dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(inner.device.type, dtype, enabled=narrow)


def _backbone_states(self: PreTrainedModel, **inputs: Any) -> Float[Tensor, "B T H"]:
    with autocast(self):
        return self.base_model(**inputs).last_hidden_state


def backbone_states(model: nn.Module, **inputs: Any) -> Float[Tensor, "B T H"]:
    """The final hidden states (after the last norm) of the model without its head.

    Every pass goes through here: sharded, it enters at the root, where FSDP gathers the weights
    that belong to no layer (embeddings, last norm, head) and keeps them until the backward pass, so
    that the head is gathered once for a loss.
    """
    inner = causal_lm(model)
    if isinstance(inner, FSDPModule):
        return getattr(inner, _BACKBONE)(**inputs)
    return _backbone_states(inner, **inputs)


def hidden_states(
    model: nn.Module, sequences: PackedSequences, *, attention: str
) -> Float[Tensor, "N H"]:
    """Final hidden states (after the last norm) at the loss positions.

    attention: "padded" runs the sequences as rows of a rectangle, any other of pick_attention's
    answers as one row whose positions restart.
    """
    if attention != "padded":
        states = backbone_states(model, **packed_arguments(sequences, attention))
        return states[0, sequences.loss_positions]
    padded = pad_sequences(sequences)
    # Causal attention with the padding on the right: no real token sees it, so no mask is needed,
    # and positions count up through the padding (a restart there would read as packing).
    states = backbone_states(model, input_ids=padded.token_ids, use_cache=False)
    return states.flatten(0, 1)[padded.loss_positions]


def checkpoint_activations(model: nn.Module) -> None:
    """Recomputes each decoder layer in the backward pass, in place of keeping what it computed."""
    inner = causal_lm(model)
    # Renamed in transformers 5.20; both take the settings of torch.utils.checkpoint first.
    enable = getattr(inner, "activation_checkpointing_enable", None)
    (enable or inner.gradient_checkpointing_enable)({"use_reentrant": False})


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The blocks that sharding treats as units, in order."""
    inner = causal_lm(model)
    names = set(inner._no_split_modules or ())
    return [module for module in inner.modules() if type(module).__name__ in names]


def shard_model(model: nn.Module, world: World) -> None:
    """Splits the weights over all ranks (FSDP2), decoder layer by decoder layer, the rest as one.

    Gradients are added up over the ranks and not averaged, for the losses are divided by the whole
    step's rollouts or tokens. Where float32 weights are trained in bfloat16 arithmetic, they are
    gathered in bfloat16 and their gradients summed in float32.
    """
    inner = causal_lm(model)
    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy()
    if not isinstance(model, PeftModel) and inner.dtype != compute_dtype(model):
        policy = MixedPrecisionPolicy(compute_dtype(model), torch.float32)
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    fully_shard(inner, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
    setattr(inner, _BACKBONE, MethodType(_backbone_states, inner))
    register_fsdp_forward_method(inner, _BACKBONE)
    for module in _sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        # gloo has no operator that scales while it adds, which the factor would ask for.
        module.set_force_sum_reduction_for_comms(True)


def _sharded_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def sync_gradients(model: nn.Module, *, last: bool) -> None:
    """Whether the backward pass that comes adds up the ranks' gradients of a sharded model.

    Adapters' gradients are small: they are added up once, after the step's last micro-batch. Those
    of a whole model are not, and each micro-batch's are split over the ranks at once.
    """
    inner = causal_lm(model)
    if isinstance(inner, FSDPModule) and isinstance(model, PeftModel):
        inner.set_requires_gradient_sync(last)


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Whole weights on every rank. Passes inside need no other rank, so each may run its own
    number of them."""
    sharded = _sharded_modules(model)
    root = causal_lm(model)
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.set_reshard_after_forward(module is not root, recurse=False)
            module.reshard()
