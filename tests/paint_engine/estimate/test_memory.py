"""The estimate against the bytes that tensors really take: a whole step on a CPU, and the same at
Qwen3's sizes with tensors that have a size but no contents."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, LlamaConfig, Qwen3Config, Qwen3ForCausalLM

from paint_engine.config.external import teacher_models
from paint_engine.config.schema import Config
from paint_engine.config.sections import (
    EvalSection,
    LoraSection,
    ModelSection,
    ObjectiveSection,
    ParallelSection,
    RolloutSection,
    TeacherSection,
    TrainSection,
)
from paint_engine.estimate import memory
from paint_engine.estimate.memory import Lengths, MemoryEstimate, estimate_memory
from paint_engine.estimate.model_shape import shape_of
from paint_engine.model.forward import (
    autocast,
    backbone_states,
    causal_lm,
    hidden_states,
    lm_head_weight,
)
from paint_engine.model.load import load_base, meta_model
from paint_engine.model.lora import add_lora
from paint_engine.model.packing import build_batch
from paint_engine.model.sharding import checkpoint_activations, decoder_layers
from paint_engine.model.teachers import ExternalTeacher, FixedTeacher, Panel, Teacher
from paint_engine.recipes import LossInputs, SecondPass, recipe_of
from paint_engine.training.optim import build_optimizer
from paint_engine.types import PackedSequences, TrainBatch, TrainExample
from paint_kernels import _matmul, _sources
from paint_kernels._heads import Heads, Projection
from paint_kernels._ops import paint_loss
from paint_kernels._plan import most_rows
from paint_kernels._settings import takes_fields

QWEN3: dict[str, Any] = {"vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8}
QWEN3_17B = QWEN3 | {
    "hidden_size": 2048,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "intermediate_size": 6144,
    "tie_word_embeddings": True,
}
QWEN3_4B = QWEN3 | {
    "hidden_size": 2560,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "intermediate_size": 9728,
    "tie_word_embeddings": True,
}
QWEN3_8B = QWEN3 | {
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "intermediate_size": 12288,
    "tie_word_embeddings": False,
}
SMALL: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 768,
}
TOLERANCE = 0.12
GPU_BYTES = 80 * 2**30


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and their peak.

    The opaque loss is looked into: `loss` runs in its place, under the same count.
    """

    def __init__(self, loss: Callable[..., Any]) -> None:
        super().__init__()
        self.loss, self.alive, self.now, self.peak = loss, {}, 0, 0

    def _drop(self, key: int, size: int) -> None:
        del self.alive[key]
        self.now -= size

    def count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive[key] = weakref.ref(storage, lambda _: self._drop(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.paint_kernels.paint_loss.default:
            with self, torch.no_grad():
                out = self.loss(*args, **(kwargs or {}))
        else:
            out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.count(leaf)
        return out


@takes_fields
def gpu_loss(
    student: Tensor,
    teacher: Tensor,
    heads: Heads,
    cu_seqlens: Tensor,
    token_weights: Tensor,
    zero_weight: Tensor | None,
    temperatures: Tensor | None,
    given_selection: Tensor | None,
    with_hidden: bool,
    with_weight: bool,
    with_bias: bool,
    *settings: object,
) -> tuple[Tensor, ...]:
    """The buffers of the loss on a GPU, filled by nobody."""
    num_rows = len(student)
    rows = min(num_rows, most_rows(*heads.lm_head_weight.shape, torch.device("meta")))
    source = _sources.HiddenSource(
        Projection(student, heads.student, None, "triton"),
        Projection(teacher, heads.teacher, None, "triton"),
        token_weights,
        rows_per_chunk=rows,
        temperature=1.1,
        with_hidden_gradient=with_hidden,
        with_weight_gradient=with_weight,
        backend="triton",
    )
    source.logits(slice(0, rows))
    gradient = source.gradient(slice(0, rows), rows)
    assert gradient is not None
    source.keep_gradient(slice(0, rows), gradient)
    source.finish()
    new = student.new_empty
    return (
        new((), dtype=torch.float32),
        new((6, num_rows), dtype=torch.float32),
        new((num_rows,), dtype=torch.bool),
        source.grad_hidden,
        source.grad_weight,
        source.grad_bias,
    )


def run_steps(
    model: nn.Module,
    teacher: Teacher,
    config: Config,
    batch: TrainBatch,
    live: LiveBytes,
    states: Callable[[nn.Module, PackedSequences], Tensor],
    items: Sequence[TrainExample] = (),
) -> int:
    """The peak of the second of two training steps: the optimizer's moments exist by then."""
    optimizer = build_optimizer(model, config.optim)
    optimizer.defaults["foreach"] = optimizer.param_groups[0]["foreach"] = live.loss is gpu_loss
    if config.parallel.activation_checkpointing:
        checkpoint_activations(model)
    model.train()
    for _ in range(2):
        live.peak = live.now
        passes = []
        for place, member in enumerate(teacher.members):
            scored = batch.teachers[place]
            with member.scoring() as scorer:
                own = states(scorer, scored.sequences)
                head = None if scorer is model else lm_head_weight(scorer)
                passes.append(SecondPass(own, head, member.weight, scored.rollouts))
        student_states = states(model, batch.student)
        with autocast(model):
            output = recipe_of(config).loss(
                LossInputs(
                    student_hidden_states=student_states,
                    lm_head_weight=lm_head_weight(model),
                    second_passes=tuple(passes),
                    completion_ids=batch.completion_ids,
                    cu_seqlens=batch.cu_seqlens,
                    examples=items,
                    old_logprobs=None,
                    vocab_size=lm_head_weight(model).shape[0],
                    denominator=config.train.batch_size,
                )
            )
        output.loss.backward()
        del output, student_states, passes, own, head
        optimizer.step()
        optimizer.zero_grad()
    return live.peak


def padded_states(model: nn.Module, sequences: PackedSequences) -> Tensor:
    return hidden_states(model, sequences, attention="padded")


def rows_of_one_length(model: nn.Module, sequences: PackedSequences) -> Tensor:
    """As padding leaves them, without a look at the bounds."""
    rows = sequences.token_ids.view(len(sequences.cu_seqlens) - 1, -1)
    states = backbone_states(model, input_ids=rows, use_cache=False)
    return states.flatten(0, 1)[sequences.loss_positions]


def make_config(
    directory: Path, lengths: Lengths, rows: int, *, lora: bool = True, **model: Any
) -> Config:
    """One micro-batch of `rows` rollouts of these lengths, and next to no sampling."""
    longest = max(lengths.student_prompt, lengths.teacher_prompt) + lengths.completion
    checkpointing = model.pop("checkpointing", False)
    return Config(
        model=ModelSection(name_or_path=str(directory), **model),
        lora=LoraSection(enabled=lora, rank=16),
        rollout=RolloutSection(
            engine="builtin", max_new_tokens=lengths.completion, max_sequences=1
        ),
        train=TrainSection(batch_size=rows, max_tokens_per_microbatch=rows * longest),
        parallel=ParallelSection(activation_checkpointing=checkpointing),
        eval=EvalSection(enabled=False),
    )


def estimated(
    model: nn.Module, config: Config, lengths: Lengths, memory_bytes: int | None
) -> MemoryEstimate:
    return estimate_memory(
        shape_of(model),
        config=config,
        lengths=lengths,
        num_ranks=1,
        device_memory_bytes=memory_bytes,
    )


def check_a_real_step(config: Config, lengths: Lengths, items: Sequence[TrainExample]) -> None:
    """Compares the bytes of a step against the fixed teacher with the estimate."""
    lora, batch, live = config.lora.enabled, build_batch(items), LiveBytes(paint_loss._init_fn)
    with live:
        base = load_base(config.model, torch.device("cpu"), trains_base=not lora)
        model = add_lora(base, config.lora, 0)
        expected = estimated(model, config, lengths, None)
        teacher = FixedTeacher(model)
        for tensor in (*model.parameters(), *(teacher.copy or nn.Module()).parameters()):
            live.count(tensor)
        peak = run_steps(model, teacher, config, batch, live, padded_states, items)
    assert peak == pytest.approx(expected.allocated_bytes, rel=TOLERANCE), expected.table()


def save_small_model(directory: Path) -> None:
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**SMALL, dtype="float32")).save_pretrained(directory)
    (directory / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_real_step_takes_what_is_estimated(
    dtype: str,
    lora: bool,
    checkpointing: bool,
    tmp_path: Path,
    examples: Callable[..., list[TrainExample]],
) -> None:
    lengths, rows = Lengths(32, 64, 96), 4
    save_small_model(tmp_path)
    config = make_config(
        tmp_path, lengths, rows, lora=lora, dtype=dtype, checkpointing=checkpointing
    )
    check_a_real_step(config, lengths, examples((32,) * rows, (64,) * rows, (96,) * rows))


@pytest.mark.parametrize("lora", [True, False])
def test_a_real_step_with_two_losses_takes_what_is_estimated(
    lora: bool, tmp_path: Path, examples: Callable[..., list[TrainExample]]
) -> None:
    lengths, rows = Lengths(32, 64, 96), 4
    save_small_model(tmp_path)
    config = make_config(tmp_path, lengths, rows, lora=lora, dtype="float32")
    config = config.model_copy(update={"objective": ObjectiveSection(name="grpo_paint")})
    items = [
        replace(item, advantage=1.0) for item in examples((32,) * rows, (64,) * rows, (96,) * rows)
    ]
    check_a_real_step(config, lengths, items)


TEACHERS: tuple[dict[str, Any], ...] = (
    {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6},
    {"hidden_size": 192, "intermediate_size": 640, "tie_word_embeddings": True},
)


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("kind", ["one", "mixed", "routed"])
def test_a_real_step_with_external_teachers_takes_what_is_estimated(
    kind: str, lora: bool, tmp_path: Path, examples: Callable[..., list[TrainExample]]
) -> None:
    lengths, rows = Lengths(32, 64, 96), 4
    directories = [tmp_path / name for name in ("student", "first", "second")]
    for directory, sizes in zip(directories, ({}, *TEACHERS), strict=True):
        torch.manual_seed(0)
        Qwen3ForCausalLM(Qwen3Config(**SMALL | sizes, dtype="float32")).save_pretrained(directory)
        (directory / "tokenizer.json").write_text("{}")
    student, *others = directories
    others = others[:1] if kind == "one" else others
    section = TeacherSection(
        weights="external",
        models=tuple(map(str, others)),
        route_column="domain" if kind == "routed" else None,
    )
    config = make_config(student, lengths, rows, lora=lora, dtype="float32")
    config = config.model_copy(update={"teacher": section})
    items = []
    for row, item in enumerate(examples((32,) * rows, (64,) * rows, (96,) * rows)):
        assert item.teacher_view is not None
        ids = item.teacher_view.prompt_ids
        places = (row % 2,) if kind == "routed" else tuple(range(len(others)))
        view = replace(
            item.teacher_view, scorers=places, other_prompt_ids=(ids,) * (len(places) - 1)
        )
        items.append(replace(item, teacher_view=view))
    batch, live = build_batch(items), LiveBytes(paint_loss._init_fn)
    with live:
        base = load_base(config.model, torch.device("cpu"), trains_base=not lora)
        model, members = add_lora(base, config.lora, 0), []
        for given in teacher_models(config):
            frozen = load_base(given.section, torch.device("cpu")).requires_grad_(False)
            members.append(ExternalTeacher(given.name, frozen, "padded", given.weight))
        expected = estimate_memory(
            shape_of(model),
            config=config,
            lengths=lengths,
            num_ranks=1,
            device_memory_bytes=None,
            teachers=[shape_of(member.model) for member in members],
        )
        for tensor in (*model.parameters(), *(p for m in members for p in m.model.parameters())):
            live.count(tensor)
        peak = run_steps(model, Panel(members), config, batch, live, padded_states)
    assert peak == pytest.approx(expected.allocated_bytes, rel=TOLERANCE), expected.table()
    held = sum(p.numel() * 4 for member in members for p in member.model.parameters())
    assert expected.held["teachers' weights"] == held and expected.held["teacher's copy"] == 0


def causal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Keeps what flash attention keeps, and never a mask."""
    assert attention_mask is None
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2), None


AttentionInterface.register("causal_without_mask", causal_attention)


def empty_weights(model: nn.Module) -> None:
    """Weights of the mode that is active, in place of those on the meta device; tied ones stay
    tied."""
    causal_lm(model).set_attn_implementation("causal_without_mask")
    known: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is None:
                    continue
                if id(old) not in known:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    is_weight = isinstance(old, nn.Parameter)
                    known[id(old)] = nn.Parameter(new, old.requires_grad) if is_weight else new
                tensors[name] = known[id(old)]  # pyright: ignore[reportArgumentType]


@contextmanager
def without_contents(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors that have sizes alone; the loss takes its path for half precision on a GPU."""
    patch.setattr(_matmul, "runs_in_half", lambda states, weight: states.dtype == weight.dtype)
    patch.setattr(_matmul, "half_product", lambda a, b, out, add: None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


@pytest.mark.parametrize(
    ("published", "num_layers", "checkpointing", "rows"),
    [
        (QWEN3_17B, 6, False, 4),
        (QWEN3_17B, 3, True, 32),
        (QWEN3_4B, 6, False, 4),
        (QWEN3_4B, 6, True, 4),
        (QWEN3_8B, 6, False, 4),
        (QWEN3_8B, 3, True, 32),
    ],
)
def test_a_step_at_the_sizes_of_qwen3_takes_what_is_estimated(
    published: dict[str, Any],
    num_layers: int,
    checkpointing: bool,
    rows: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    examples: Callable[..., list[TrainExample]],
) -> None:
    sizes: dict[str, Any] = published | {"num_hidden_layers": num_layers}
    Qwen3Config(**sizes).save_pretrained(tmp_path)
    lengths = Lengths(256, 768, 512)
    config = make_config(tmp_path, lengths, rows, dtype="bfloat16", checkpointing=checkpointing)
    model = meta_model(config)
    expected = estimated(model, config, lengths, GPU_BYTES)
    batch = build_batch(examples((256,) * rows, (768,) * rows, (512,) * rows))
    live = LiveBytes(gpu_loss)
    with without_contents(monkeypatch), live:
        empty_weights(model)
        peak = run_steps(model, FixedTeacher(model), config, batch, live, rows_of_one_length)
    assert peak == pytest.approx(expected.allocated_bytes, rel=TOLERANCE), expected.table()


def kept_bytes(layer: nn.Module, shape_hidden: int, num_tokens: int, model: nn.Module) -> int:
    """Of the tensors that autograd keeps of one layer, weights and their narrow copies aside."""
    inner = causal_lm(model)
    dtype = next(p.dtype for p in model.parameters() if not p.requires_grad)
    states = torch.empty(1, num_tokens, shape_hidden, dtype=dtype, requires_grad=True) * 1
    rotary = inner.get_submodule("model.rotary_emb")(states, torch.arange(num_tokens)[None])
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with autocast(model), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        layer(states, position_embeddings=rotary, attention_mask=None, use_cache=False)
    weights = {tuple(p.shape) for p in model.parameters()}
    weights |= {shape[::-1] for shape in weights}
    for shared in rotary:
        kept.pop(shared.untyped_storage()._cdata, None)
    own = [tensor for tensor in kept.values() if tuple(tensor.shape) not in weights]
    return sum(tensor.untyped_storage().nbytes() for tensor in own)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("targets", "dropout"),
    [
        (("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), 0.0),
        (("q_proj", "v_proj"), 0.0),
        (("q_proj", "v_proj"), 0.1),
        (("up_proj", "down_proj"), 0.1),
    ],
)
def test_a_layer_keeps_what_the_formula_says(
    family: str, dtype: str, targets: tuple[str, ...], dropout: float, tmp_path: Path
) -> None:
    family_config = {"qwen3": Qwen3Config, "llama": LlamaConfig}[family]
    family_config(**SMALL).save_pretrained(tmp_path)
    config = Config(
        model=ModelSection(name_or_path=str(tmp_path), dtype=dtype),  # pyright: ignore
        lora=LoraSection(rank=24, dropout=dropout, target_modules=targets),
    )
    model = meta_model(config).train()
    shape = shape_of(model)
    num_tokens = 90
    with FakeTensorMode(allow_non_fake_inputs=True):
        empty_weights(model)
        kept = kept_bytes(decoder_layers(model)[1], shape.hidden, num_tokens, model)
    setting = memory.setting_of(config, 1, on_gpu=False)
    expected = memory.layer_activation_bytes(shape, setting)
    assert kept / num_tokens == pytest.approx(expected, rel=0.02)
