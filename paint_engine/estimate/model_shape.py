"""The sizes of a model that determine memory and arithmetic. They need no weights."""

from dataclasses import dataclass

from peft import PeftModel
from torch import nn

from paint_engine.model import causal_lm, lm_head_weight
from paint_engine.model.sharding import decoder_layers


@dataclass(frozen=True)
class ModelShape:
    """Widths and counts of a model, in elements.

    `adapted`: names of a layer's modules that have adapters; empty if all weights are trained.
    `layer_parameters` and `adapter_parameters` count all layers. `root_parameters` counts the
    parameters outside the layers: embeddings, last norm, and the head unless it is tied to the
    embeddings.
    """

    num_layers: int
    hidden: int
    intermediate: int
    queries: int
    keys: int
    num_heads: int
    num_head_rows: int
    norms_heads: bool
    tied: bool
    adapted: frozenset[str]
    adapter_rank: int
    adapter_inputs: int
    layer_parameters: int
    root_parameters: int
    adapter_parameters: int
    largest_trained: int

    @property
    def base_parameters(self) -> int:
        """Number of parameters without adapters."""
        return self.layer_parameters + self.root_parameters

    @property
    def trained_parameters(self) -> int:
        """Number of trained parameters: the adapters, or all parameters if there are no
        adapters."""
        return self.adapter_parameters if self.adapted else self.base_parameters

    @property
    def head_parameters(self) -> int:
        """Number of parameters of the output head, tied or not."""
        return self.num_head_rows * self.hidden


def shape_of(model: nn.Module) -> ModelShape:
    """Returns the sizes of a causal language model, with or without adapters, before it is sharded.
    The model may be on the meta device."""
    inner, layers = causal_lm(model), decoder_layers(model)
    config = inner.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    is_peft = isinstance(model, PeftModel)
    num_adapter = sum(p.numel() for p in model.parameters() if p.requires_grad) if is_peft else 0
    num_in_layers = sum(p.numel() for layer in layers for p in layer.parameters()) - num_adapter
    # "mlp.down_proj.lora_A.default.weight", of shape (rank, inputs).
    adapters = {n: p for n, p in layers[0].named_parameters() if ".lora_A." in n}
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    num_total = sum(p.numel() for p in model.parameters())
    return ModelShape(
        num_layers=len(layers),
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        queries=config.num_attention_heads * head_dim,
        keys=config.num_key_value_heads * head_dim,
        num_heads=config.num_attention_heads,
        num_head_rows=lm_head_weight(model).shape[0],
        norms_heads=any(name.endswith("q_norm") for name, _ in layers[0].named_modules()),
        tied=inner.get_input_embeddings().weight is lm_head_weight(model),
        adapted=frozenset(name.partition(".lora_A.")[0].rpartition(".")[2] for name in adapters),
        adapter_rank=max((p.shape[0] for p in adapters.values()), default=0),
        adapter_inputs=sum(p.shape[1] for p in adapters.values()),
        layer_parameters=num_in_layers,
        root_parameters=num_total - num_in_layers - num_adapter,
        adapter_parameters=num_adapter,
        largest_trained=max(trained),
    )


def step_flops(
    shape: ModelShape,
    *,
    student_prompt: float,
    teacher_prompt: float,
    completion: float,
    checkpointing: bool,
) -> dict[str, float]:
    """Returns the floating-point operations of one rollout by part, for these lengths in tokens.

    A product of (M, K) and (K, N) counts 2 M K N; causal attention counts half of its square.
    Frozen weights have no gradient: their backward pass costs as much as the forward pass. The
    backward pass of trained weights costs twice that.
    """

    def attention(length: float) -> float:
        return 2 * shape.num_layers * shape.queries * length**2

    def forward(length: float, *, adapters: bool) -> float:
        weights = shape.layer_parameters + shape.adapter_parameters * adapters
        return 2 * weights * length + attention(length)

    length = student_prompt + completion
    student = forward(length, adapters=True)
    trained = shape.adapter_parameters or shape.layer_parameters
    # FlashAttention's backward pass has five products; the forward pass has two.
    backward = student + 1.5 * attention(length) + 2 * trained * length
    head = 2 * shape.head_parameters * completion
    return {
        "rollout": student + head,
        "teacher": forward(teacher_prompt + completion, adapters=False),
        "student": student,
        "loss": head * (3 if shape.adapted else 4),
        "backward": backward + student * checkpointing,
    }
