"""Estimates the memory of a training step on one device, from the model's shape alone.

It counts each tensor that PyTorch's allocator holds. Memory outside the allocator is a set of named
constants. Decoder layers are those of Qwen3 and Llama: two norms, attention, a gated MLP. Of other
architectures, weights, trained parameters and the sampler's cache are counted as they are; what a
layer keeps for its backward pass is approximate. H is the hidden size, I the MLP's, Q and K the
total widths of queries and of keys, and a the bytes of one number in the compute dtype.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from paint_engine.config.schema import Config
from paint_engine.estimate.model_shape import ModelShape
from paint_engine.recipes import draws, keeps_base, recipe_of
from paint_engine.rollout import vllm_is_installed
from paint_kernels._plan import BLOCK_BUFFERS, BLOCK_ELEMENTS, head_group_rows, most_rows

GIB = 2**30
"""bytes of a GiB, the unit in which memory is sold and shown"""
CUDA_CONTEXT_BYTES = 500_000_000
"""the driver and the loaded kernels: 300 MB and more (pytorch issue 107667)"""
NCCL_BYTES = 700_000_000
"""a process group's buffers: 544 MB with 2 A100s, 688 MB with 4 (nccl issue 964)"""
ALLOCATOR_SLACK = 0.05
"""memory that the caching allocator may hold beyond its tensors, as a share of them; an
allowance"""

_FLOAT32 = 4
_EVALUATION = "an evaluation"
_GATHERED_LAYERS = 2
"""FSDP gathers the next layer while one layer computes"""


@dataclass(frozen=True)
class Lengths:
    """Token counts of one rollout: both prompts and the completion."""

    student_prompt: int
    teacher_prompt: int
    completion: int


@dataclass(frozen=True)
class Microbatch:
    """Token counts of one forward pass. `completion_tokens` of the student's tokens are in the
    loss."""

    student_tokens: int
    teacher_tokens: int
    completion_tokens: int


def largest_microbatch(config: Config, lengths: Lengths, num_ranks: int) -> Microbatch:
    """Returns the largest micro-batch with rollouts up to `lengths`.

    A rollout above `train.max_tokens_per_microbatch` is a micro-batch of its own.
    """
    most, rows = config.train.max_tokens_per_microbatch, -(-config.train.batch_size // num_ranks)

    def tokens(prompt: int) -> int:
        one = prompt + lengths.completion
        return max(one, min(most, rows * one))

    student = tokens(lengths.student_prompt)
    return Microbatch(
        student, tokens(lengths.teacher_prompt), min(student, rows * lengths.completion)
    )


@dataclass(frozen=True)
class Setting:
    """The parts of a configuration that the estimate depends on.

    compute_bytes: bytes of one number in matrix products.
    residual_bytes: bytes of one number in the residual stream.
    served_top_k: tokens that the teacher's server lists; None without a server.
    own_losses: gradients of each token by losses beside the one to each teacher.
    """

    trains_all: bool
    second_pass: bool
    copies_base: bool
    other_adapters: bool
    compute_bytes: int
    residual_bytes: int
    dropout: bool
    dense_mask: bool
    checkpointing: bool
    on_gpu: bool
    num_ranks: int
    replicas: int
    sharded: bool
    colocated_vllm: bool
    served_top_k: int | None = None
    own_losses: int = 0

    @property
    def shards(self) -> int:
        """Number of ranks that share one copy of the weights."""
        return self.num_ranks // self.replicas if self.sharded else 1

    @property
    def casts_weights(self) -> bool:
        """Whether autocast keeps low-precision copies of float32 weights for the backward pass.
        FSDP gathers whole weights in the low-precision dtype instead, but not adapters."""
        return self.compute_bytes < _FLOAT32 and not (self.trains_all and self.sharded)


def setting_of(config: Config, num_ranks: int, *, on_gpu: bool) -> Setting:
    """Returns the setting of a configuration on `num_ranks` devices. "auto" is bfloat16 on a
    GPU."""
    dtype, parallel, rollout = config.model.dtype, config.parallel, config.rollout
    compute = 2 if dtype == "bfloat16" or (dtype == "auto" and on_gpu) else _FLOAT32
    trains_all = not config.lora.enabled
    sharded = num_ranks > 1 and parallel.shard == "full"
    moves = config.teacher.weights == "ema" or config.teacher.refresh_every is not None
    recipe = recipe_of(config)
    in_process = draws(config) and rollout.url is None and rollout.engine != "builtin"
    return Setting(
        trains_all=trains_all,
        second_pass=recipe.second_pass is not None,
        copies_base=trains_all and keeps_base(config),
        other_adapters=config.lora.enabled and moves,
        compute_bytes=compute,
        # Float32 embeddings start a float32 stream, which autocast does not change.
        residual_bytes=_FLOAT32 if trains_all and not sharded else compute,
        dropout=config.lora.enabled and config.lora.dropout > 0,
        dense_mask=config.model.attention == "packed",
        checkpointing=parallel.activation_checkpointing,
        on_gpu=on_gpu,
        num_ranks=num_ranks,
        replicas=parallel.replicas,
        sharded=sharded,
        colocated_vllm=on_gpu and in_process and (rollout.engine == "vllm" or vllm_is_installed()),
        served_top_k=recipe.served_top_k,
        own_losses=recipe.head_work(1).losses - 1,
    )


def layer_activation_bytes(shape: ModelShape, setting: Setting) -> int:
    """Returns the bytes that one decoder layer keeps per token for its backward pass.

    With adapters on all seven matrices in bfloat16, this is 12 H + 8 Q + 8 K + 8 I plus small
    terms. A norm keeps its input in float32. If its weight is trained, it also keeps its output
    before the weight. Of layers of several kinds, this is the mean. Linear attention and Mamba
    count three times their width: before the convolution, after it, and after the activation.
    """
    a, trained = setting.compute_bytes, setting.trains_all
    hidden, queries, keys = shape.hidden, shape.queries, shape.keys

    def linear_inputs(width: int, *names: str) -> int:
        if trained:
            # If the stream is wider than the products, each product has its own low-precision copy.
            copies = len(names) if setting.residual_bytes > a else 1
            return copies * a * width
        adapted = shape.adapted.intersection(names)
        return a * width if adapted and not setting.dropout else 0

    norm = _FLOAT32 + (setting.residual_bytes if trained else 0)
    size = 2 * hidden * norm
    size += linear_inputs(hidden, "q_proj", "k_proj", "v_proj")
    size += linear_inputs(hidden, "gate_proj", "up_proj")
    # Queries, keys, values, the result, and one log-sum-exp per head.
    attention = 2 * a * (queries + keys) + _FLOAT32 * shape.num_heads
    if shape.norms_heads:
        attention += (queries + keys) * (_FLOAT32 + (a if trained else 0))
    size += attention * shape.num_attention // shape.num_layers + 3 * a * shape.recurrent
    # Gate, up, the activation, and their product if the next matrix is trained.
    size += 3 * a * shape.intermediate + linear_inputs(shape.intermediate, "down_proj")
    size += a * shape.adapter_rank * shape.adapters_per_layer
    if not setting.dropout:
        size += a * shape.other_adapter_inputs
    else:
        # The input of each adapter, and its dropout mask; on a CPU the mask is stored as numbers.
        size += (a + (1 if setting.on_gpu else a)) * shape.adapter_inputs
    return size


def _activations(shape: ModelShape, setting: Setting, batch: Microbatch) -> dict[str, int]:
    """Returns the bytes kept at the end of the student's pass, and the bytes that one layer's pass
    adds."""
    tokens, a, hidden = batch.student_tokens, setting.compute_bytes, shape.hidden
    layer = tokens * layer_activation_bytes(shape, setting)
    if setting.dense_mask:
        layer += a * tokens**2
    casts = 2 * (shape.adapter_parameters or shape.layer_parameters) * setting.casts_weights
    last_norm = tokens * hidden * (_FLOAT32 + setting.residual_bytes * setting.trains_all)
    inputs = tokens * hidden * setting.residual_bytes
    # The gradients of two inner activations of the MLP; with adapters, also the stream's gradient.
    backward = 2 * a * shape.intermediate + (0 if setting.trains_all else _FLOAT32 * hidden)
    one_layer = layer + casts // shape.num_layers
    return {
        "kept": last_norm + shape.num_layers * (inputs if setting.checkpointing else one_layer),
        "recomputed": one_layer if setting.checkpointing else 0,
        # Autocast holds every low-precision copy until its pass ends.
        "casts": casts if setting.checkpointing else 0,
        "backward": tokens * backward,
    }


@dataclass(frozen=True)
class Teachers:
    """The teachers that are other models, by their shapes; empty if there are none.

    routed: each rollout is scored by one of them, else by all.
    """

    shapes: Sequence[ModelShape] = ()
    routed: bool = False

    @property
    def num_losses(self) -> int:
        """Number of losses of each token, one for each teacher that scores it."""
        return 1 if self.routed else max(1, len(self.shapes))

    @property
    def width(self) -> int:
        """Number of hidden entries of one token, of all teachers that score it, at most."""
        widths = [shape.hidden for shape in self.shapes]
        return max(widths) if self.routed else sum(widths)


def _loss(
    shape: ModelShape, setting: Setting, batch: Microbatch, teachers: Teachers
) -> dict[str, int]:
    """Returns the bytes of the fused loss: its chunks while it runs, and the gradients that
    remain."""
    num_rows, num_columns = batch.completion_tokens, shape.num_head_rows
    device = torch.device("cuda" if setting.on_gpu and torch.cuda.is_available() else "meta")
    most = most_rows(num_columns, shape.hidden, device if setting.on_gpu else torch.device("cpu"))
    rows = min(most, num_rows)
    head_is_narrow = setting.compute_bytes < _FLOAT32 and not (
        setting.trains_all and not setting.sharded
    )
    chunks = 2 * rows * num_columns * _FLOAT32
    if not setting.on_gpu:
        chunks += BLOCK_BUFFERS * min(BLOCK_ELEMENTS, rows * num_columns) * _FLOAT32
    elif head_is_narrow:
        # The gradient with respect to the logits, and the head, in float16.
        kept = head_group_rows(rows, num_rows) if setting.trains_all else rows
        chunks += 2 * kept * num_columns + 2 * shape.head_parameters
        chunks += 2 * sum(teacher.head_parameters for teacher in teachers.shapes)
    else:
        chunks += rows * num_columns * _FLOAT32
    of = "both roles" if setting.second_pass else "the student"
    # The rows of routed rollouts are taken out for each teacher.
    own_width = shape.hidden * (2 if teachers.routed else 1)
    teacher_width = (teachers.width if teachers.shapes else shape.hidden) * setting.second_pass
    one_token = setting.residual_bytes * own_width + setting.compute_bytes * teacher_width
    number = teachers.num_losses + setting.own_losses
    head_gradients = shape.head_parameters * _FLOAT32 * setting.trains_all
    # An id and its log-probability, both of 4 bytes, of each listed token and of the rollout's own.
    listed = 0 if setting.served_top_k is None else setting.served_top_k + 1
    return {
        "the server's top-k": num_rows * listed * 8,
        f"hidden states of {of}": num_rows * one_token,
        "loss: chunks of logits": chunks,
        "loss: gradient rows": num_rows * shape.hidden * _FLOAT32 * number,
        "loss: gradient of the head": head_gradients * max(number, len(teachers.shapes)),
    }


def _weights(shape: ModelShape, setting: Setting, teachers: Teachers) -> dict[str, int]:
    """Returns the bytes of the weights and of the optimizer's two moments that one rank holds."""
    a, shards, frozen = setting.compute_bytes, setting.shards, not setting.trains_all
    trained = _FLOAT32 * shape.trained_parameters
    own_head = 0 if shape.tied else a * shape.head_parameters

    def frozen_copy(model: ModelShape) -> int:
        # Its root stays gathered, because no backward pass runs through it to free it.
        return a * (model.base_parameters // shards + model.root_parameters * setting.sharded)

    return {
        "frozen base": (a * shape.base_parameters - own_head) // shards * frozen,
        "frozen parts": _FLOAT32 * (shape.base_parameters - shape.trained_parameters) // shards
        if setting.trains_all
        else 0,
        "frozen head": own_head // shards * frozen,
        "trained weights": trained // shards,
        "optimizer": 2 * trained // shards,
        "teacher's copy": frozen_copy(shape) * setting.copies_base,
        "teachers' weights": sum(map(frozen_copy, teachers.shapes)),
        "teacher's running mean": trained // shards * setting.other_adapters,
    }


def _gradients(shape: ModelShape, setting: Setting, *, several: bool) -> int:
    """Returns the bytes of the trained weights' float32 gradients. Gradients of sharded adapters
    stay whole until the last of several micro-batches is added."""
    trained = _FLOAT32 * shape.trained_parameters
    whole = several and setting.sharded and not setting.trains_all
    return trained // setting.shards + trained * whole


def _gathered(shape: ModelShape, setting: Setting) -> tuple[int, int]:
    """Returns the bytes that FSDP gathers for one layer, and for the weights outside the layers,
    which stay gathered for the loss."""
    a = setting.compute_bytes
    layer = (a * shape.layer_parameters + _FLOAT32 * shape.adapter_parameters) // shape.num_layers
    return layer * setting.sharded, a * shape.root_parameters * setting.sharded


def cache_row_bytes(shape: ModelShape, length: int, number_bytes: int) -> int:
    """Returns the bytes that a sampler caches of one text of so many tokens.

    number_bytes: of one number of keys and values; recurrent states are in float32.
    """
    num_cached = sum(min(length, window or length) for window in shape.windows)
    return 2 * num_cached * shape.keys * number_bytes + _FLOAT32 * shape.state_elements


def _sampling(
    shape: ModelShape, setting: Setting, config: Config, lengths: Lengths
) -> dict[str, int]:
    """Returns the bytes of the built-in sampler: its cache at its longest, the logits and their
    sort. With sharding, each rank also holds whole weights."""
    if not draws(config) or setting.colocated_vllm or config.rollout.url is not None:
        return {}
    a = setting.compute_bytes
    share = -(-config.train.batch_size // setting.num_ranks)
    rows = min(config.rollout.max_sequences, share)
    runs = []
    if recipe_of(config).samples:
        runs.append((lengths.student_prompt + config.rollout.max_new_tokens, rows))
    if config.teacher.reason_first:
        # The teacher's prompt with the rationale is about as long as the request and the rationale.
        runs.append((lengths.teacher_prompt, rows))
    if config.eval.enabled:
        longest = lengths.student_prompt + config.eval.longest_completion
        runs.append((longest, config.eval.max_sequences))

    cache = max(rows * cache_row_bytes(shape, length, a) for length, rows in runs)
    # Float32 logits, the sorted logits, and their order as int64.
    logits = max(rows for _, rows in runs) * shape.num_head_rows * (2 * _FLOAT32 + 8)
    whole = (a * shape.base_parameters + _FLOAT32 * shape.adapter_parameters) * setting.sharded
    return {"sampler: cache": cache, "sampler: logits": logits, "sampler: whole weights": whole}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by part. `held` is held throughout; `phases` has what each phase of a step adds."""

    held: Mapping[str, int]
    phases: Mapping[str, Mapping[str, int]]
    outside: Mapping[str, int]
    """outside PyTorch's allocator, and its slack"""
    device_memory_bytes: int | None
    beside: Mapping[str, int] = field(default_factory=dict)
    """bytes that phases take outside the allocator, more than `outside` has"""

    def _phase_bytes(self, name: str) -> int:
        return sum(self.phases[name].values()) + self.beside.get(name, 0)

    @property
    def peak_phase(self) -> str:
        """The phase that takes the most memory."""
        return max(self.phases, key=self._phase_bytes)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all tensors at their peak, which `torch.cuda.max_memory_allocated` should
        report."""
        return sum(self.held.values()) + max(sum(parts.values()) for parts in self.phases.values())

    @property
    def total_bytes(self) -> int:
        """Bytes of everything at the peak, including the shares of other processes and
        libraries."""
        peak = self._phase_bytes(self.peak_phase)
        return sum(self.held.values()) + peak + sum(self.outside.values())

    def table(self) -> str:
        """Returns one line per part, in GiB. Phases follow each other, so only the largest
        counts."""
        lines = _rows(self.held)
        for name, parts in self.phases.items():
            mark = "  <- peak" if name == self.peak_phase else ""
            lines.append(f"{self._phase_bytes(name) / GIB:9.3f}  while: {name}{mark}")
            more = {"vLLM, more than for rollouts": self.beside.get(name, 0)}
            lines += [f"  {line}" for line in _rows({**parts, **more})]
        lines += _rows(self.outside)
        total = f"{self.total_bytes / GIB:9.3f}  at the peak"
        if self.device_memory_bytes is not None:
            total += f", of {self.device_memory_bytes / GIB:.1f}"
        return "\n".join([*lines, total])


def _rows(parts: Mapping[str, int]) -> list[str]:
    return [f"{size / GIB:9.3f}  {name}" for name, size in parts.items() if size]


def estimate_memory(
    shape: ModelShape,
    *,
    config: Config,
    lengths: Lengths,
    num_ranks: int,
    device_memory_bytes: int | None,
    teachers: Sequence[ModelShape] = (),
) -> MemoryEstimate:
    """Estimates the largest memory that a run takes of each device, with rollouts up to `lengths`.

    device_memory_bytes: memory of one GPU; None if the run is on a CPU.
    teachers: the shapes of those that are other models.
    """
    on_gpu = device_memory_bytes is not None
    setting = setting_of(config, num_ranks, on_gpu=on_gpu)
    batch = largest_microbatch(config, lengths, num_ranks)
    rollouts_a_rank = -(-config.train.batch_size // num_ranks)
    several = batch.student_tokens < rollouts_a_rank * (lengths.student_prompt + lengths.completion)
    others = Teachers(teachers, config.teacher.route_column is not None)
    held = _weights(shape, setting, others)
    phases = _phases(shape, setting, batch, others, several=several)
    if recipe_of(config).second_pass is None:
        del phases["the teacher's pass"]
    if sampling := _sampling(shape, setting, config, lengths):
        phases["sampling" if recipe_of(config).samples else "evaluation"] = sampling
    outside, beside = {}, {}
    if device_memory_bytes is not None:
        tensors = MemoryEstimate(held, phases, {}, None).allocated_bytes
        share = config.rollout.gpu_memory_utilization * setting.colocated_vllm
        own = evaluation_share(config)
        if setting.colocated_vllm and own is not None:
            # The rollouts' engine has ended by then, and the allocator's cache is given back.
            phases = {**phases, _EVALUATION: {}}
            beside = {_EVALUATION: math.ceil(max(0.0, own - share) * device_memory_bytes)}
        outside = {
            "vLLM": math.ceil(share * device_memory_bytes),
            "CUDA context": CUDA_CONTEXT_BYTES,
            "NCCL": NCCL_BYTES * (num_ranks > 1),
            "allocator's slack": math.ceil(ALLOCATOR_SLACK * tensors),
        }
    return MemoryEstimate(held, phases, outside, device_memory_bytes, beside)


def evaluation_share(config: Config) -> float | None:
    """Returns the share of a GPU that vLLM of the evaluations' own takes; None without one."""
    return config.eval.gpu_memory_utilization if config.eval.enabled else None


def _teachers_pass(
    shape: ModelShape, setting: Setting, batch: Microbatch, teachers: Teachers
) -> dict[str, int]:
    """Returns the bytes of one layer's pass, with its weights gathered; of several teachers, of the
    one that takes most. The weights outside the layers of other models are held."""
    scoring = teachers.shapes or (shape,)
    sizes = []
    for model in scoring:
        layer, root = _gathered(model, setting)
        sizes.append(
            {
                "FSDP: gathered embeddings and head": 0 if teachers.shapes else root,
                "FSDP: gathered layers": _GATHERED_LAYERS * layer,
                "activations: one layer": batch.teacher_tokens * _one_layer(model, setting),
            }
        )
    return max(sizes, key=lambda parts: sum(parts.values()))


def _one_layer(shape: ModelShape, setting: Setting) -> int:
    """Returns the bytes per token that are live at the same time without gradients: three
    activations of the MLP, five numbers per hidden entry."""
    return setting.compute_bytes * (3 * shape.intermediate + 5 * shape.hidden)


def _phases(
    shape: ModelShape,
    setting: Setting,
    batch: Microbatch,
    teachers: Teachers,
    *,
    several: bool,
) -> dict[str, Mapping[str, int]]:
    a, trains_all = setting.compute_bytes, setting.trains_all
    activations, loss = _activations(shape, setting, batch), _loss(shape, setting, batch, teachers)
    layer, root = _gathered(shape, setting)
    gathered = {"FSDP: gathered embeddings and head": root}
    layers = gathered | {"FSDP: gathered layers": _GATHERED_LAYERS * layer}
    gradients = {"gradients": _gradients(shape, setting, several=several)}
    earlier = gradients if several else {}
    kept = {"activations: kept": activations["kept"]}
    left = {name: size for name, size in loss.items() if name != "loss: chunks of logits"}
    one_layer = _one_layer(shape, setting)
    in_reduction = (a + _FLOAT32) * shape.layer_parameters // shape.num_layers
    # On a GPU, PyTorch updates all weights in one operation, with one temporary of the same size.
    # For sharded weights and on a CPU, it updates them one by one, with two temporaries.
    trained = temporaries = _FLOAT32 * shape.trained_parameters
    if setting.sharded or not setting.on_gpu:
        temporaries = 2 * _FLOAT32 * shape.largest_trained // setting.shards
    phases: dict[str, Mapping[str, int]] = {
        "the teacher's pass": earlier
        | _teachers_pass(shape, setting, batch, teachers)
        | {"the student's adapters": trained // setting.shards * setting.other_adapters},
        "the student's pass": earlier
        | layers
        | kept
        | {
            "activations: one layer": batch.student_tokens * one_layer * setting.checkpointing,
            "narrow copies of weights": activations["casts"],
        },
        "the loss": earlier | gathered | kept | loss,
        "the backward pass": gradients
        | layers
        | kept
        | left
        | {
            "activations: one layer, recomputed": activations["recomputed"],
            "gradients of activations": activations["backward"],
            "FSDP: gradients in reduction": in_reduction * setting.sharded * trains_all,
        },
        "the optimizer": gradients | {"temporaries": temporaries},
    }
    if trains_all:
        # The gradients of the head and of the embeddings are computed separately. If the two are
        # tied, one waits for the other. FSDP holds them in their own dtype, and in float32 for the
        # sum.
        apart = _FLOAT32 * (2 if several or shape.tied else 1)
        waiting = shape.root_parameters * (a + _FLOAT32 if setting.sharded else apart)
        phases["the embeddings' gradient"] = gradients | gathered | {"its parts": waiting}
    return phases
