"""What the tests of checkpoints share: a small model that is trained by steps, saved and loaded by
one rank."""

from pathlib import Path

import torch
from torch import Tensor, nn

from paint_engine.checkpoint.load import load_checkpoint
from paint_engine.checkpoint.save import save_checkpoint
from paint_engine.config.sections import LoraSection, ModelSection
from paint_engine.distributed import World
from paint_engine.model.load import load_base
from paint_engine.model.lora import add_lora

CPU = torch.device("cpu")
ALONE = World(rank=0, size=1, local_rank=0, device=CPU)

Trained = tuple[nn.Module, torch.optim.Optimizer]


def build(
    model_dir: Path, *, lora: bool, seed: int = 0, rank: int = 4, device: torch.device = CPU
) -> Trained:
    base = load_base(ModelSection(name_or_path=str(model_dir), dtype="float32"), device)
    model = add_lora(base, LoraSection(enabled=lora, rank=rank, alpha=8), seed)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """One step on a loss that reaches every trainable weight."""
    ids = torch.randint(0, 300, (1, 12), generator=torch.Generator().manual_seed(seed))
    model(input_ids=ids.to(next(model.parameters()).device)).logits.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def save(
    run_dir: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, keep: int = 2
) -> Path:
    state = {"step": step, "seconds_train": 0.1, "data": {"epoch": 1}}
    return save_checkpoint(run_dir, model, optimizer, state, keep=keep, world=ALONE)


def load(
    run_dir: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int | None, list[str]]:
    """The step that was restored, and what was warned of."""
    warned: list[str] = []
    state = load_checkpoint(run_dir, model, optimizer, world=ALONE, warn=warned.append)
    return (None if state is None else state["step"]), warned


def flip_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
