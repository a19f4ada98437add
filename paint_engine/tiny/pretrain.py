"""Pretrains the tiny models: `python -m paint_engine.tiny.pretrain [--slip-rate 0] [--output DIR]`.

The base gets the two properties that PAINT needs of a real one. Alone it is fallible: in the
unaided solutions of its training data, a share of the intermediate results is wrong, and later
steps use the wrong results. With a verified solution in its prompt, whole or partly hidden, it is
much better: those training solutions are correct, in other words than the shown one.

The bundled stronger teacher, which the preset opd-tiny distils from, is the same model but for
`--slip-rate 0`: it has seen correct solutions only. Its tokenizer is the base's.
"""

import argparse
import hashlib
import json
import math
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from paint_engine.config.bundled import TINY_BASE, TINY_TEACHER
from paint_engine.config.sections import PromptsSection
from paint_engine.files import new_files, write_json
from paint_engine.model import pick_device
from paint_engine.prompts.chat import encode_chat, student_text, teacher_text
from paint_engine.prompts.masking import OMISSION_MARKER, mask_solution
from paint_engine.tiny.problems import (
    PRETRAIN_BUCKETS,
    WordProblem,
    draw_drill,
    draw_problem,
    render_solution,
)
from paint_engine.tiny.tokenizer import train_tokenizer

# The paper's prompt, fixed here: the base is trained on these words, whatever the configuration
# says.
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
_PROMPTS = PromptsSection(instruction=INSTRUCTION)

SEED = 0
NUM_STEPS = 1300
BATCH_SIZE = 32
MICROBATCH_SIZE = 8
VOCAB_SIZE = 768
PEAK_LEARNING_RATE = 3e-3
MUON_LEARNING_RATE = 2e-2
WARMUP_STEPS = 50

SLIP_RATE = 0.08
DRILL_SHARE = 0.2
UNAIDED_SHARE = 0.35
# Shares of the privileged documents: the whole solution, a hidden suffix, a span hidden anywhere.
PLACEMENT_WEIGHTS = {"whole": 0.1, "suffix": 0.65, "random": 0.25}


@dataclass(frozen=True)
class Shape:
    """The settings that differ between the sizes of the base. Heads have 32 dimensions up to 2
    million parameters, then 64."""

    hidden_size: int
    num_heads: int
    num_key_value_heads: int
    num_layers: int = 4
    head_dim: int = 32


# "small" is the bundled base. A width of 96 is too small: see docs/decisions.md.
SIZES = {
    "small": Shape(128, 4, 2),
    "medium": Shape(160, 5, 1),
    "large": Shape(192, 6, 2),
    # For GPUs; not trained yet.
    "10m": Shape(320, 5, 1, num_layers=8, head_dim=64),
    "30m": Shape(512, 8, 4, num_layers=10, head_dim=64),
    "100m": Shape(768, 12, 6, num_layers=14, head_dim=64),
}


@dataclass(frozen=True)
class Document:
    """Token ids of a prompt and its completion. Both are trained on."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]


def draw_pretraining_problem(rng: random.Random) -> WordProblem:
    """Draws a problem whose arithmetic is in none of the splits."""
    while True:
        problem = draw_problem(rng)
        if problem.bucket in PRETRAIN_BUCKETS:
            return problem


def _user_text(problem: WordProblem, rng: random.Random, *, unaided: bool) -> str:
    if unaided:
        return student_text(problem.text, _PROMPTS)
    placements, weights = zip(*PLACEMENT_WEIGHTS.items(), strict=True)
    placement = rng.choices(placements, weights)[0]
    reference = render_solution(problem, rng)
    if placement == "whole":
        return teacher_text(problem.text, reference, _PROMPTS, whole=True)
    partial = mask_solution(
        reference, rng.uniform(0.1, 0.9), placement=placement, generator=rng, marker=OMISSION_MARKER
    )
    return teacher_text(problem.text, partial, _PROMPTS, whole=False)


def draw_document(
    tokenizer: PreTrainedTokenizerBase, rng: random.Random, slip_rate: float = SLIP_RATE
) -> Document:
    """Draws an unaided solution with slips, a correct one after a verified solution, or a drill."""
    kind = rng.random()
    if kind < DRILL_SHARE:
        return Document((), tuple(tokenizer.encode(draw_drill(rng) + "<|endoftext|>")))
    problem = draw_pretraining_problem(rng)
    unaided = kind < DRILL_SHARE + UNAIDED_SHARE
    prompt = _user_text(problem, rng, unaided=unaided)
    completion = render_solution(problem, rng, slip_rate=slip_rate if unaided else 0.0)
    return Document(
        encode_chat(tokenizer, prompt, thinking=False),
        tuple(tokenizer.encode(completion + "<|im_end|>")),
    )


def _train_tiny_tokenizer() -> PreTrainedTokenizerBase:
    rng = random.Random(f"paint-tiny-tokenizer-{SEED}")
    corpus = []
    for _ in range(3000):
        problem = draw_pretraining_problem(rng)
        corpus.append(_user_text(problem, rng, unaided=False))
        corpus.append(render_solution(problem, rng, slip_rate=SLIP_RATE))
    return train_tokenizer(corpus, VOCAB_SIZE)


def model_config(tokenizer: PreTrainedTokenizerBase, size: str = "small") -> Qwen3Config:
    """Returns Qwen3's architecture with 0.9, 1.3 or 1.9 million parameters, or 10, 30 or 100
    million."""
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
    num_steps: int,
    *,
    size: str = "small",
    slip_rate: float = SLIP_RATE,
    device: torch.device,
    log_every: int = 50,
) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerBase]:
    """Trains tokenizer and model from scratch. The result is the same on every run on one
    machine; the tokenizer is the same at any size and slip rate.

    slip_rate: the share of the intermediate results that are wrong in unaided solutions.
    """
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    tokenizer = _train_tiny_tokenizer()
    model = Qwen3ForCausalLM(model_config(tokenizer, size))
    torch.nn.Module.to(model, device)
    optimizers = _optimizers(model)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    rng = random.Random(f"paint-tiny-pretrain-{SEED}")
    started = time.monotonic()
    for step in range(num_steps):
        # Linear warm-up, then a cosine schedule to zero.
        warmup = min(1.0, (step + 1) / WARMUP_STEPS)
        scale = warmup * 0.5 * (1 + math.cos(math.pi * step / num_steps))
        documents = [draw_document(tokenizer, rng, slip_rate) for _ in range(BATCH_SIZE)]
        # Rows of similar length share a micro-batch, so little is padding.
        documents.sort(key=lambda d: len(d.prompt_ids) + len(d.completion_ids))
        num_tokens = sum(len(d.prompt_ids) + len(d.completion_ids) - 1 for d in documents)
        loss_sum = 0.0
        for start in range(0, BATCH_SIZE, MICROBATCH_SIZE):
            loss = _batch_loss(model, documents[start : start + MICROBATCH_SIZE]) / num_tokens
            loss.backward()
            loss_sum += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * scale
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % log_every == 0 or step + 1 == num_steps:
            elapsed_s = time.monotonic() - started
            print(
                f"step {step + 1}/{num_steps}  loss {loss_sum:.4f} nats  {elapsed_s:.0f} s",
                flush=True,
            )
    return model.eval(), tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain a tiny model of the laptop domain.")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument(
        "--slip-rate",
        type=float,
        default=SLIP_RATE,
        help="share of wrong intermediate results in unaided solutions; 0 for a teacher",
    )
    parser.add_argument("--output", type=Path, help="default: the bundled model's folder")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--num-steps", type=int, default=NUM_STEPS)
    arguments = parser.parse_args()
    output: Path | None = arguments.output
    if not 0 <= arguments.slip_rate < 1:
        parser.error(f"--slip-rate: got {arguments.slip_rate:g}; needs 0 to below 1")
    bundled = {("small", SLIP_RATE): TINY_BASE, ("small", 0.0): TINY_TEACHER}
    output = output or bundled.get((arguments.size, arguments.slip_rate))
    if output is None:
        parser.error(
            f"--size {arguments.size} with --slip-rate {arguments.slip_rate:g} is no bundled "
            "model; needs --output DIR"
        )
    # Deterministic algorithms need this setting on a GPU.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    started = time.monotonic()
    device = pick_device(arguments.device)
    model, tokenizer = pretrain(
        arguments.num_steps, size=arguments.size, slip_rate=arguments.slip_rate, device=device
    )
    with new_files(output) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
    weights = (output / "model.safetensors").read_bytes()
    record = {
        "command": f"python -m paint_engine.tiny.pretrain --size {arguments.size} "
        f"--slip-rate {arguments.slip_rate:g}",
        "num_steps": arguments.num_steps,
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
