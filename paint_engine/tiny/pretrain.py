"""Pretrains the tiny models: `python -m paint_engine.tiny.pretrain [--teacher] [--output DIR]`.

The base learns to write like a fallible writer (`paint_engine.tiny.writer`), alone and with a
reference in its prompt, whole, partly hidden, or of another problem. What that gives it is measured
by `python -m paint_engine.tiny.properties`.

Its last steps are a stage of their own (`STAGES`), for the reference's way (docs/decisions.md).
The bundled stronger teacher, which the preset opd-tiny distils from, is the base after more steps
on the solutions of a writer without slips.
"""

import argparse
import hashlib
import json
import math
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from paint_engine.config.bundled import TINY_BASE, TINY_TEACHER
from paint_engine.files import new_files, write_json
from paint_engine.model import pick_device
from paint_engine.tiny.documents import Document, Mixture, draw_document, draw_solution
from paint_engine.tiny.tokenizer import train_tokenizer
from paint_engine.tiny.writer import Habits

SEED = 0
BATCH_SIZE = 32
MICROBATCH_SIZE = 8
VOCAB_SIZE = 768
PEAK_LEARNING_RATE = 3e-3
MUON_LEARNING_RATE = 2e-2
WARMUP_STEPS = 50


@dataclass(frozen=True)
class Stage:
    """A part of the pretraining, with optimizers, a schedule and documents of its own.

    name: seeds the documents.
    rate: the share of the peak learning rates that it begins at.
    """

    name: str
    num_steps: int
    mixture: Mixture = field(default_factory=Mixture)
    rate: float = 1.0


POLISH = Mixture(unaided=0.3, aided=0.55, control=0.15, follows_any=True)
WITHOUT_SLIPS = replace(POLISH, habits=Habits(slip=0.0, confirmed_slip=0.0))
STAGES = (Stage("pretrain", 3000), Stage("polish", 300, POLISH, rate=0.3))
TEACHER_STAGES = (Stage("teacher", 300, WITHOUT_SLIPS, rate=0.3),)


@dataclass(frozen=True)
class Shape:
    """The settings that differ between the sizes of the base."""

    hidden_size: int
    num_heads: int
    num_key_value_heads: int
    num_layers: int = 4
    head_dim: int = 32


# "small" is the bundled base.
SIZES = {
    "small": Shape(128, 4, 2, num_layers=5),
    # For GPUs; not trained yet.
    "10m": Shape(320, 5, 1, num_layers=8, head_dim=64),
    "30m": Shape(512, 8, 4, num_layers=10, head_dim=64),
}


def _train_tiny_tokenizer() -> PreTrainedTokenizerBase:
    rng = random.Random(f"paint-tiny-tokenizer-{SEED}")
    corpus = []
    for _ in range(3000):
        corpus += draw_solution(rng, STAGES[0].mixture)
    return train_tokenizer(corpus, VOCAB_SIZE)


def model_config(tokenizer: PreTrainedTokenizerBase, size: str = "small") -> Qwen3Config:
    """Returns Qwen3's architecture with 1.1, 10 or 30 million parameters."""
    shape = SIZES[size]
    stop, padding = tokenizer.encode("<|im_end|><|endoftext|>")
    return Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=shape.hidden_size,
        intermediate_size=3 * shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        bos_token_id=None,
        eos_token_id=stop,
        pad_token_id=padding,
        dtype="float32",
    )


def _batch_loss(model: Qwen3ForCausalLM, documents: list[Document]) -> Tensor:
    """Returns the summed cross-entropy over every token but the first. Rows are padded on the
    right."""
    length = max(len(d.prompt_ids) + len(d.completion_ids) for d in documents)
    ids = torch.zeros(len(documents), length, dtype=torch.long)
    labels = torch.full((len(documents), length), -100)
    for row, document in enumerate(documents):
        end = len(document.prompt_ids + document.completion_ids)
        ids[row, :end] = torch.tensor(document.prompt_ids + document.completion_ids)
        labels[row, : end - 1] = ids[row, 1:end]
    ids, labels = ids.to(model.device), labels.to(model.device)
    # Under causal attention no token attends to padding on its right, so no mask is needed.
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    learned = labels != -100
    return F.cross_entropy(model.lm_head(hidden[learned]), labels[learned], reduction="sum")


def _optimizers(model: Qwen3ForCausalLM) -> tuple[torch.optim.Optimizer, ...]:
    """Builds Muon for the layers' matrices, and AdamW for embeddings and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return (
        torch.optim.Muon(matrices, lr=MUON_LEARNING_RATE, weight_decay=0.01),
        torch.optim.AdamW(others, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    )


def pretrain(
    stages: Sequence[Stage],
    *,
    size: str = "small",
    start: Path | None = None,
    device: torch.device,
    log_every: int = 50,
) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerBase]:
    """Trains tokenizer and model from scratch, or a teacher from a base. With one thread, the
    result is the same on every run on one machine; the tokenizer is the same at any size.

    start: directory of the base that becomes the teacher; None for a new base.
    """
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    if start is None:
        tokenizer = _train_tiny_tokenizer()
        model = Qwen3ForCausalLM(model_config(tokenizer, size))
    else:
        tokenizer = AutoTokenizer.from_pretrained(start)
        model = Qwen3ForCausalLM.from_pretrained(start).train()
    torch.nn.Module.to(model, device)
    for stage in stages:
        _train(model, tokenizer, stage, log_every)
    return model.eval(), tokenizer


def _train(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, stage: Stage, log_every: int
) -> None:
    rng = random.Random(f"paint-tiny-{stage.name}-{SEED}")
    optimizers = _optimizers(model)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    started, num_steps = time.monotonic(), stage.num_steps
    for step in range(num_steps):
        # Linear warm-up, then a cosine schedule to zero.
        warmup = min(1.0, (step + 1) / WARMUP_STEPS)
        scale = warmup * 0.5 * (1 + math.cos(math.pi * step / num_steps)) * stage.rate
        documents = [draw_document(tokenizer, rng, stage.mixture) for _ in range(BATCH_SIZE)]
        loss = _accumulate(model, documents)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * scale
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % log_every == 0 or step + 1 == num_steps:
            elapsed_s = time.monotonic() - started
            print(
                f"{stage.name}: step {step + 1}/{num_steps}  loss {loss:.4f} nats  "
                f"{elapsed_s:.0f} s",
                flush=True,
            )


def _accumulate(model: Qwen3ForCausalLM, documents: list[Document]) -> float:
    """Adds the gradient of the documents' mean loss per token; returns that loss in nats."""
    # Rows of similar length share a micro-batch, so little is padding.
    documents = sorted(documents, key=lambda d: len(d.prompt_ids) + len(d.completion_ids))
    num_tokens = sum(len(d.prompt_ids) + len(d.completion_ids) - 1 for d in documents)
    loss_sum = 0.0
    for first in range(0, len(documents), MICROBATCH_SIZE):
        loss = _batch_loss(model, documents[first : first + MICROBATCH_SIZE]) / num_tokens
        loss.backward()
        loss_sum += loss.item()
    return loss_sum


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Pretrain a tiny model of the laptop domain.")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument(
        "--teacher",
        action="store_true",
        help="train the bundled base further, into the teacher of opd-tiny",
    )
    parser.add_argument("--output", type=Path, help="default: the bundled model's folder")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu")
    parser.add_argument("--num-steps", type=int, help="of each stage, for a try; needs --output")
    arguments = parser.parse_args()
    size, num_steps = arguments.size, arguments.num_steps
    if size != "small" and (arguments.teacher or arguments.output is None):
        parser.error(f"--size {size} is no bundled model; needs --output DIR, and no --teacher")
    if num_steps is not None and (num_steps < 1 or arguments.output is None):
        parser.error(f"--num-steps: got {num_steps}; needs 1 or more, and --output DIR")
    return arguments


def _command(arguments: argparse.Namespace, device: torch.device) -> str:
    """Returns the shortest command that makes the same model."""
    size, num_steps = arguments.size, arguments.num_steps
    parts = ["python -m paint_engine.tiny.pretrain"]
    parts += [f"--size {size}"] if size != "small" else []
    parts += ["--teacher"] if arguments.teacher else []
    parts += [f"--device {device.type}"] if device.type != "cpu" else []
    parts += [f"--num-steps {num_steps}"] if num_steps is not None else []
    return " ".join(parts)


def main() -> None:
    arguments = _arguments()
    teacher, num_steps = arguments.teacher, arguments.num_steps
    output: Path = arguments.output or (TINY_TEACHER if teacher else TINY_BASE)
    stages = TEACHER_STAGES if teacher else STAGES
    if num_steps is not None:
        stages = [replace(stage, num_steps=num_steps) for stage in stages]
    # Sums then have the same order on any number of cores.
    torch.set_num_threads(1)
    # Deterministic algorithms need this setting on a GPU.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    started, device = time.monotonic(), pick_device(arguments.device)
    model, tokenizer = pretrain(
        stages, size=arguments.size, start=TINY_BASE if teacher else None, device=device
    )
    with new_files(output) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
    weights = (output / "model.safetensors").read_bytes()
    record = {
        "command": _command(arguments, device),
        "num_steps": sum(stage.num_steps for stage in stages),
        "num_parameters": model.num_parameters(),
        "sha256": hashlib.sha256(weights).hexdigest(),
        "seconds": round(time.monotonic() - started),
        "torch": torch.__version__,
        "num_threads": torch.get_num_threads(),
    }
    write_json(output / "pretraining.json", record)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
