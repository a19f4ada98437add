"""What an evaluation is of: a model, or a model with an adapter or a run's checkpoint; and the
engine that samples from it, without a trainer."""

import hashlib
import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import nn
from transformers import GenerationConfig

from paint_engine.checkpoint_files import list_checkpoints
from paint_engine.config import Config
from paint_engine.config_sections import LoraSection, ModelSection
from paint_engine.distributed import World
from paint_engine.dry_run import meta_model
from paint_engine.export import build_model, choose_checkpoint, find_base
from paint_engine.model import (
    causal_lm,
    lm_head_weight,
    load_base,
    pick_dtype,
    resolve_model,
)
from paint_engine.rollout import BuiltinEngine, RolloutEngine
from paint_engine.rollout_vllm import StoredModel, VllmEngine
from paint_engine.weights import ADAPTER_FILE

_ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Subject:
    """Subject(ModelSection(name_or_path="tiny"), adapter=Path("runs/a/checkpoints/step-40"),
            checkpoint=None)

    base: the model, or what an adapter or a checkpoint was trained from; its tokenizer is used.
    adapter: peft's files.
    checkpoint: the whole model in transformers' format, of a run that trained all weights.
    """

    base: ModelSection
    adapter: Path | None = None
    checkpoint: Path | None = None

    @property
    def weights(self) -> str:
        """Where the model's own weights are: a directory, or an id."""
        if self.checkpoint is not None:
            return str(self.checkpoint)
        return resolve_model(self.base.name_or_path)

    def identity(self, engine: str, dtype: torch.dtype) -> dict[str, Any]:
        """What tells these weights, and what samples from them, from others."""
        path = Path(self.weights)
        sizes = {file.name: file.stat().st_size for file in sorted(path.glob("*.safetensors"))}
        trained = self.adapter and self.adapter / ADAPTER_FILE
        return {
            "model": str(path.resolve()) if path.is_dir() else self.weights,
            "model_bytes": sum(sizes.values()) if path.is_dir() else None,
            "adapter": trained and hashlib.sha256(trained.read_bytes()).hexdigest(),
            "dtype": str(dtype).removeprefix("torch."),
            "engine": engine,
        }


def find_subject(
    model: str | None, adapter: str | None, dtype: str, *, trust_remote_code: bool
) -> Subject:
    """The model and the adapter that two flags name.

    model: "tiny", a directory or an id; None = what the adapter was trained from.
    adapter: a directory in peft's format, a checkpoint, or a run directory, then with :last (also
        where nothing is said), :best or :step-N after it.

    Raises ValueError where there is none such.
    """
    if model is None and adapter is None:
        raise ValueError("got neither --model nor --adapter; needs at least one of them")
    found = None if adapter is None else find_adapter(adapter)
    if found is None:
        section = ModelSection(name_or_path=model or "tiny")
    else:
        section = find_base(found, model)
    update: dict[str, Any] = {"trust_remote_code": section.trust_remote_code or trust_remote_code}
    if dtype != "auto":
        update["dtype"] = dtype
    section = section.model_copy(update=update)
    if found is None:
        return Subject(section)
    if not (found / _ADAPTER_CONFIG).is_file():
        return Subject(section, checkpoint=found)
    if not (found / ADAPTER_FILE).is_file():
        raise ValueError(
            f"--adapter {adapter}: {found} has no {ADAPTER_FILE}; needs peft's files with the "
            "weights in safetensors; save the adapter again with save_pretrained"
        )
    return Subject(section, adapter=found)


def find_adapter(text: str) -> Path:
    """The directory with the adapter, or with the checkpoint of a run that trained all weights."""
    path, which = Path(text), None
    if not path.is_dir() and ":" in text:
        place, _, which = text.rpartition(":")
        path = Path(place)
    if not path.is_dir():
        raise ValueError(
            f"--adapter {text}: no such directory; needs an adapter in peft's format, or a run "
            "directory, with :last, :best or :step-N after it"
        )
    if which is None and (path / _ADAPTER_CONFIG).is_file() and not list_checkpoints(path):
        return path
    return choose_checkpoint(path, which)


def skeleton(subject: Subject) -> nn.Module:
    """The model without its weights: its context, its head's size and its stop tokens."""
    section = subject.base.model_copy(update={"name_or_path": subject.weights})
    model = meta_model(Config(model=section, lora=LoraSection(enabled=False)))
    try:
        causal_lm(model).generation_config = GenerationConfig.from_pretrained(subject.weights)
    except OSError:
        # A model may come without; transformers then fills it in from the model's configuration.
        return model
    return model


def compute_dtype_of(subject: Subject, device: torch.device) -> torch.dtype:
    """What the evaluation computes in."""
    return pick_dtype(subject.base.dtype, device)


def build_engine(
    subject: Subject,
    shape: nn.Module,
    world: World,
    *,
    kind: Literal["vllm", "builtin"],
    max_model_len: int,
    max_sequences: int,
    gpu_memory_utilization: float,
    tensor_parallel_size: int,
) -> RolloutEngine:
    """What samples from the subject. A collective of all ranks.

    shape: `skeleton`'s.
    max_model_len: the longest prompt and completion together, in tokens.
    """
    dtype = compute_dtype_of(subject, world.device)
    if kind == "builtin":
        model = _load(subject, dtype, world.device)
        return BuiltinEngine(model, lambda: nullcontext(model), max_sequences)
    stored = StoredModel(
        head_size=lm_head_weight(shape).shape[0],
        dtype=dtype,
        tokenizer=resolve_model(subject.base.name_or_path, with_weights=False),
        adapter=subject.adapter,
        lora_rank=_adapter_rank(subject.adapter) if subject.adapter else 0,
    )
    engine = VllmEngine(
        stored,
        subject.weights,
        world,
        max_model_len=max_model_len,
        max_sequences=max_sequences,
        gpu_memory_utilization=gpu_memory_utilization,
        tensor_parallel_size=tensor_parallel_size,
        trust_remote_code=subject.base.trust_remote_code,
    )
    if subject.adapter is not None:
        engine.sync(0)
    return engine


def _adapter_rank(adapter: Path) -> int:
    config = json.loads((adapter / _ADAPTER_CONFIG).read_text())
    return max([config["r"], *(config.get("rank_pattern") or {}).values()])


def _load(subject: Subject, dtype: torch.dtype, device: torch.device) -> nn.Module:
    if subject.checkpoint is not None:
        model = build_model(subject.checkpoint, subject.base, dtype)
        return nn.Module.to(model, device).eval()
    base = load_base(subject.base, device)
    if subject.adapter is None:
        return base.eval()
    return PeftModel.from_pretrained(base, str(subject.adapter), torch_device=str(device)).eval()
