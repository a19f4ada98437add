"""Part "steps" of the GPU check: a few PAINT training steps at the shape of Qwen3-1.7B.

The weights are random and bfloat16, the LoRA adapters float32; student and teacher share the base.
The stages are timed separately: `loss` is the loss and its gradient with respect to the hidden
states, `backward` the backward pass of the model.
"""

import functools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from bench.gpu.job import Job
from bench.losses import PAINT, Inputs, our_loss, plain_loss

LORA_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NUM_STEPS, NUM_SEQUENCES, LEARNING_RATE = 5, 4, 5e-6
FIRST_LOSS_LIMIT = 1e-2
"""largest relative difference of the two losses of the first step, which have the same target"""


@dataclass(frozen=True)
class Lengths:
    student_prompt: int
    teacher_prompt: int
    completion: int


Loss = Callable[[Inputs], Tensor]


def qwen3_config(on_gpu: bool) -> tuple[Qwen3Config, Lengths, int]:
    """Returns the model's configuration, the sequences' lengths and the adapters' rank."""
    lengths = Lengths(256, 768, 1024) if on_gpu else Lengths(8, 24, 32)
    config = Qwen3Config(
        vocab_size=151936 if on_gpu else 512,
        hidden_size=2048 if on_gpu else 64,
        intermediate_size=6144 if on_gpu else 128,
        num_hidden_layers=28 if on_gpu else 2,
        num_attention_heads=16 if on_gpu else 4,
        num_key_value_heads=8 if on_gpu else 2,
        head_dim=128 if on_gpu else 16,
        tie_word_embeddings=True,
    )
    return config, lengths, 64 if on_gpu else 4


def build_model(config: Qwen3Config, rank: int, device: torch.device) -> PeftModel:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    lora = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=LORA_LAYERS, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, lora).train()
    assert isinstance(adapted, PeftModel)
    nn.Module.to(adapted, device)
    return adapted


def hidden_states(model: PeftModel, token_ids: Tensor, num_completion: int) -> Tensor:
    """Returns (sequences x completion, H): final hidden states at the positions that predict the
    completion."""
    base = model.get_base_model()
    assert isinstance(base, PreTrainedModel)
    output = base.base_model(input_ids=token_ids, use_cache=False)
    return output.last_hidden_state[:, -num_completion - 1 : -1].flatten(0, 1)


def head_weight(model: PeftModel) -> Tensor:
    base = model.get_base_model()
    assert isinstance(base, PreTrainedModel)
    head = base.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    return head.weight


def make_batch(config: Qwen3Config, lengths: Lengths, step: int, device: torch.device):
    """Builds student and teacher sequences with different prompts and the same completions."""
    generator = torch.Generator(device).manual_seed(step)

    def tokens(number: int) -> Tensor:
        size = (NUM_SEQUENCES, number)
        return torch.randint(config.vocab_size, size, generator=generator, device=device)

    completion = tokens(lengths.completion)
    student = torch.cat([tokens(lengths.student_prompt), completion], dim=1)
    teacher = torch.cat([tokens(lengths.teacher_prompt), completion], dim=1)
    return student, teacher, completion


class Stages:
    """Milliseconds of each stage of a step, measured with CUDA events on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.found = device, {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self.found[name] = lambda: start.elapsed_time(end)
        else:
            begin = time.perf_counter()
            yield
            passed = 1e3 * (time.perf_counter() - begin)
            self.found[name] = lambda: passed

    def milliseconds(self) -> dict[str, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return {name: read() for name, read in self.found.items()}


def train_step(
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor, Tensor],
    loss_of: Loss,
) -> dict[str, Any]:
    student_ids, teacher_ids, completion = batch
    num_completion = completion.shape[1]
    stages = Stages(completion.device)
    with stages.stage("student forward"):
        student = hidden_states(model, student_ids, num_completion)
    with stages.stage("teacher forward"), torch.no_grad(), model.disable_adapter():
        teacher = hidden_states(model, teacher_ids, num_completion)
    weight = head_weight(model)
    bounds = torch.arange(0, completion.numel() + 1, num_completion, dtype=torch.int32)
    with stages.stage("loss"):
        leaf = student.detach().requires_grad_()
        loss = loss_of(Inputs(leaf, teacher, weight, bounds, completion.flatten()))
        loss.backward()
    with stages.stage("backward"):
        student.backward(leaf.grad)
    with stages.stage("optimizer"):
        optimizer.step()
        optimizer.zero_grad()
    milliseconds = stages.milliseconds()
    step_s = sum(milliseconds.values()) / 1e3
    return {
        "loss": loss.item(),
        "ms": milliseconds,
        "step_ms": 1e3 * step_s,
        "completion_tokens_per_s": completion.numel() / step_s,
        "tokens_per_s": (student_ids.numel() + teacher_ids.numel()) / step_s,
    }


def adapters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def copies(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: p.detach().to("cpu", copy=True) for name, p in parameters.items()}


def changed(parameters: dict[str, nn.Parameter], before: dict[str, Tensor]) -> list[str]:
    return [
        name for name, p in parameters.items() if not torch.equal(p.detach().cpu(), before[name])
    ]


def run_steps(
    model: PeftModel, config: Qwen3Config, lengths: Lengths, loss_of: Loss, num_steps: int
) -> dict[str, Any]:
    """Trains the given adapters; returns all losses, the stages of the median step and peak
    memory."""
    adapters = adapters_of(model)
    device = next(iter(adapters.values())).device
    optimizer = torch.optim.AdamW(adapters.values(), lr=LEARNING_RATE, weight_decay=0.0)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    steps = []
    for step in range(num_steps):
        batch = make_batch(config, lengths, step, device)
        steps.append(train_step(model, optimizer, batch, loss_of))
        print(f"  step {step}: loss {steps[-1]['loss']:.5f}, {steps[-1]['step_ms']:.0f} ms")
    median = sorted(steps[1:] or steps, key=lambda step: step["step_ms"])[len(steps[1:]) // 2]
    found = {"losses": [step["loss"] for step in steps], **median}
    del found["loss"]
    if device.type == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    return found


def check(found: dict[str, Any], base_changed: list[str], adapters_changed: list[str], number: int):
    """Raises ValueError if a loss is not finite or if not exactly the adapters changed."""
    if not all(math.isfinite(loss) for loss in found["losses"]):
        raise ValueError(f"losses are {found['losses']}; all must be finite")
    if base_changed:
        raise ValueError(
            f"{len(base_changed)} weights of the base changed, such as {base_changed[0]}"
        )
    if len(adapters_changed) != number:
        raise ValueError(f"{len(adapters_changed)} of {number} adapter weights changed; all must")


def our_steps(
    job: Job, model: PeftModel, config: Qwen3Config, lengths: Lengths, num_steps: int
) -> dict[str, Any]:
    adapters = adapters_of(model)
    base = {name: p for name, p in model.named_parameters() if name not in adapters}
    before, adapters_before = copies(base), copies(adapters)
    loss_of = functools.partial(our_loss, objective=PAINT)
    found = run_steps(model, config, lengths, loss_of, num_steps)
    check(found, changed(base, before), changed(adapters, adapters_before), len(adapters))
    for name, p in adapters.items():
        p.data.copy_(adapters_before[name])
    return {**found, "adapter_weights_changed": len(adapters)}


def plain_steps(
    model: PeftModel, config: Qwen3Config, lengths: Lengths, first_loss: float
) -> dict[str, Any]:
    """Takes two steps with the full logits from the same adapters.

    ValueError if the first loss is not that of `paint_loss`.
    """
    try:
        loss_of = functools.partial(plain_loss, objective=PAINT)
        found = run_steps(model, config, lengths, loss_of, 2)
    except torch.cuda.OutOfMemoryError:
        return {"out_of_memory": True}
    difference = abs(found["losses"][0] - first_loss) / max(abs(first_loss), 1e-9)
    if not difference <= FIRST_LOSS_LIMIT:
        raise ValueError(f"the first loss is {found['losses'][0]}, that of paint_loss {first_loss}")
    return {**found, "difference_of_first_loss": difference}


def described(found: dict[str, Any]) -> str:
    if "out_of_memory" in found:
        return "out of memory"
    stages = ", ".join(f"{name} {ms:.0f}" for name, ms in found["ms"].items())
    text = f"{found['step_ms']:.0f} ms per step ({stages})"
    text += f", {found['completion_tokens_per_s']:,.0f} completion tokens/s"
    if "peak_bytes" in found:
        text += f", peak {found['peak_bytes'] / 1e9:.1f} GB"
    return text


def run(job: Job) -> str:
    config, lengths, rank = qwen3_config(job.device.type == "cuda")
    model = build_model(config, rank, job.device)
    num_base = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    job.save(lengths=vars(lengths), num_sequences=NUM_SEQUENCES, rank=rank, base_weights=num_base)
    num_steps = 2 if job.quick else NUM_STEPS
    call = functools.partial(our_steps, job, model, config, lengths, num_steps)
    ours = job.attempt("paint_loss", call)
    if ours is None:
        return "failed with paint_loss"
    call = functools.partial(plain_steps, model, config, lengths, ours["losses"][0])
    plain = job.attempt("plain", call)
    lines = {"paint_loss": ours, "plain loss": plain}
    texts = [f"{name}: {described(found)}" for name, found in lines.items() if found is not None]
    return "; ".join(texts)
