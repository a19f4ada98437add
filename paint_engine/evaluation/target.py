"""The target of an evaluation: a model, a model with an adapter, or a run's checkpoint; and the
engine that samples from it."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import nn

from paint_engine.checkpoint.adapters.config import largest_rank, read_adapter_config
from paint_engine.checkpoint.adapters.fit import (
    check_adapter,
    check_vllm_loads,
    quiet_peft,
    require_weights,
)
from paint_engine.checkpoint.choose import (
    choose_checkpoint,
    find_base,
    named_model,
    recorded_base,
    recorded_section,
)
from paint_engine.checkpoint.directory import list_checkpoints, split_place
from paint_engine.checkpoint.merge import load_whole
from paint_engine.config.bundled import BUNDLED
from paint_engine.config.schema import Config
from paint_engine.config.sections import LoraSection, ModelSection, PromptsSection
from paint_engine.distributed import World
from paint_engine.files import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    EVALUATIONS_DIRECTORY,
    MANIFEST_FILE,
    MODEL_CONFIG_FILE,
    check_no_devices,
)
from paint_engine.model import (
    causal_lm,
    hub_commit,
    is_on_hub,
    lm_head_weight,
    load_base,
    meta_model,
    resolve_model,
)
from paint_engine.model.load import pick_dtype
from paint_engine.model.probe import check_forward, set_logit_scale
from paint_engine.model.stored import check_stored, set_generation_config
from paint_engine.prompts.chat import student_text
from paint_engine.rollout import RolloutEngine
from paint_engine.rollout.builtin import BuiltinEngine
from paint_engine.rollout.vllm_engine import StoredModel, VllmEngine

# Files that change the outcome, apart from the weights. The tokenizer's are in the base's
# directory, since checkpoints have none.
_MODEL_FILES = (MODEL_CONFIG_FILE, "generation_config.json")
_TOKENIZER_FILES = (
    *("tokenizer*", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"),
    "chat_template.*",
)
# Counted only if --trust-remote-code runs them.
_CODE_FILES = ("*.py",)
_NUM_DIGITS = 16
# Bytes hashed at the start, the middle and the end of each tensor.
_PIECE_BYTES = 4096
# A safetensors file begins with the length of its header, little-endian.
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class Target:
    """Target(ModelSection(name_or_path="tiny"), adapter=Path("runs/a/checkpoints/step-40"),
            checkpoint=None)

    base: the model, or what the adapter or checkpoint was trained from; its tokenizer is used.
    adapter: a directory in peft's format.
    checkpoint: a whole model in transformers' format, from a run that trained all weights.
    """

    base: ModelSection
    adapter: Path | None = None
    checkpoint: Path | None = None

    @property
    def trained(self) -> Path | None:
        """The adapter or the checkpoint; None for a model as it is."""
        return self.adapter or self.checkpoint

    @property
    def weights(self) -> str:
        """The directory or the id of the model's weights, adapters apart."""
        if self.checkpoint is not None:
            return str(self.checkpoint)
        return resolve_model(self.base)

    def identity(self, engine: str, dtype: torch.dtype) -> dict[str, Any]:
        """Identifies these weights and what samples from them: the commit of a model from the hub,
        once it is in the cache, digests of local files by name, the dtype and the engine.

        Reads a small part of the weights, on every rank. Raises ValueError where a weights file
        cannot be read.
        """
        path, on_hub = Path(self.weights), is_on_hub(self.base)
        base = resolve_model(self.base, with_weights=False)
        # The commit stands for the files of a model from the hub, pinned or not.
        is_local = path.is_dir() and (self.checkpoint is not None or not on_hub)
        small = [path / name for name in _MODEL_FILES] if is_local else []
        code = _CODE_FILES if self.base.trust_remote_code else ()
        for pattern in () if on_hub else (*_TOKENIZER_FILES, *code):
            small += Path(base).glob(pattern)
        if self.adapter is not None:
            small += [self.adapter / ADAPTER_CONFIG_FILE, self.adapter / ADAPTER_FILE]
        return {
            "model": str(path.resolve()) if is_local else self.base.name_or_path,
            "commit": hub_commit(self.base),
            "weights": _weights_digest(path) if is_local else None,
            **{file.name: _digest(file.read_bytes()) for file in sorted(small) if file.is_file()},
            "dtype": str(dtype).removeprefix("torch."),
            "engine": engine,
        }


def find_target(
    model: str | None,
    adapter: str | None,
    dtype: str,
    *,
    trust_remote_code: bool,
    revision: str | None = None,
) -> Target:
    """Returns the target that --model and --adapter name, at least one of which is given.

    model: "tiny", a directory or an id; None = the model that the adapter was trained from.
    adapter: a directory in peft's format, a checkpoint, or a run directory, which :last (the
        default), :best or :STEP may follow.
    trust_remote_code: the code of `model` may run.
    revision: of a model from the hub; None = the one that the adapter was trained from, or the
        newest.

    Raises ValueError where there is no such model or adapter, or where code would run that the
    command line has not named.
    """
    assert model is not None or adapter is not None
    found = None if adapter is None else find_adapter(adapter)
    if found is None:
        given = {"name_or_path": model, "revision": revision}
        section = named_model(given | {"trust_remote_code": trust_remote_code})
    else:
        section = find_base(found, model, revision, trust_remote_code=trust_remote_code)
    if dtype != "auto":
        section = section.model_copy(update={"dtype": dtype})
    if found is None:
        return Target(section)
    if not (found / ADAPTER_CONFIG_FILE).is_file():
        return Target(section, checkpoint=found)
    require_weights(found)
    return Target(section, adapter=found)


def find_adapter(text: str) -> Path:
    """The directory of the adapter, or of a checkpoint with all weights, that --adapter names."""
    path, which = split_place(text)
    if which is not None and which.isdecimal():
        which = f"step-{which}"
    checkpoints = list_checkpoints(path) if path.is_dir() else []
    if which is None and (path / ADAPTER_CONFIG_FILE).is_file() and not checkpoints:
        return path
    if not checkpoints and (which is not None or not (path / MANIFEST_FILE).is_file()):
        raise ValueError(f"--adapter {text}: {_no_adapter(path)}")
    return choose_checkpoint(path, which, f"--adapter {text}")


def _no_adapter(path: Path) -> str:
    """Returns why there is no adapter at the path, and what to give instead."""
    if (path / ADAPTER_CONFIG_FILE).is_file() or (path / MANIFEST_FILE).is_file():
        return f"{path} is one adapter, not a run directory with several; give it without a colon"
    if (path / MODEL_CONFIG_FILE).is_file():
        return f"{path} is a whole model, not an adapter; give it as --model {path}"
    return (
        f"{path} {'holds no adapter' if path.is_dir() else 'is no directory'}; needs an adapter in "
        "peft's format, a checkpoint, or a run directory with checkpoints, which :last, :best or "
        ":STEP may follow"
    )


def mismatched_base(target: Target) -> str | None:
    """The model that the adapter was trained on, by its run's configuration or its own, if that is
    not the target's base; else, or if neither names one, None."""
    if target.adapter is None:
        return None
    recorded = recorded_base(target.adapter)
    if recorded is None or _place(recorded.name_or_path) == _place(target.base.name_or_path):
        return None
    return recorded.name_or_path


def mismatched_prompts(target: Target, asked: PromptsSection) -> PromptsSection | None:
    """The prompts that the target was trained with, if its student prompt differs from the
    evaluation's; else, or without the run's configuration, None."""
    trained = target.trained
    recorded = trained and recorded_section(trained.resolve(), "prompts", PromptsSection)
    if recorded is None:
        return None
    same = student_text("{problem}", recorded) == student_text("{problem}", asked)
    return None if same else recorded


def _place(name_or_path: str) -> str:
    path = Path(BUNDLED.get(name_or_path, name_or_path))
    return str(path.resolve()) if path.is_dir() else name_or_path


def default_directory(target: Target, deciding: Mapping[str, Any]) -> Path:
    """A directory that depends on all that determines the samples, but not on the benchmarks. Its
    name begins with the model's, the adapter's, or the run's and its checkpoint's.

    deciding: the target's identity and the settings, JSON-serialisable.
    """
    trained = target.trained
    if trained is None:
        # So that "." gets the directory's own name.
        name = Path(os.path.abspath(target.base.name_or_path)).name
    else:
        trained = trained.resolve()
        run_dir = trained.parent.parent
        name = trained.name
        if trained in list_checkpoints(run_dir):
            name = f"{run_dir.name}-{name}"
    digest = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()
    return Path(EVALUATIONS_DIRECTORY) / f"{name}-{digest[:8]}"


def check_target(target: Target, engine: str) -> None:
    """Raises ValueError where the adapter does not fit its base, or where the engine cannot load
    it."""
    if engine == "vllm" and target.checkpoint is not None and target.base.trust_remote_code:
        raise ValueError(
            f"--adapter {target.checkpoint} holds all weights and a copy of the model's code, "
            "which vLLM would run in place of that of --model; use --engine builtin, or export it "
            "and give the export as --model"
        )
    if target.adapter is None:
        return
    check_adapter(target.adapter, causal_lm(skeleton(target)), target.base.name_or_path)
    if engine == "vllm":
        check_vllm_loads(target.adapter)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:_NUM_DIGITS]


def _weights_digest(directory: Path) -> str:
    """A digest of each file's header and of pieces of every tensor. It differs for other weights,
    without reading all of them."""
    found = hashlib.sha256()
    check_no_devices(directory)
    for file in sorted(directory.glob("*.safetensors")):
        found.update(file.name.encode())
        try:
            for piece in _pieces(file):
                found.update(piece)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} cannot be read ({error}); save or fetch it again") from error
    return found.hexdigest()[:_NUM_DIGITS]


def _pieces(file: Path) -> Iterator[bytes]:
    # safe_open checks the header, and that the tensors fill the rest of the file.
    with safe_open(file, framework="pt"):
        pass
    with file.open("rb") as opened:
        header = opened.read(int.from_bytes(opened.read(_LENGTH_BYTES), "little"))
        yield header
        start = opened.tell()
        tensors = json.loads(header)
        tensors.pop("__metadata__", None)
        for tensor in tensors.values():
            begin, end = tensor["data_offsets"]
            last = max(begin, end - _PIECE_BYTES)
            for place in (begin, (begin + last) // 2, last):
                opened.seek(start + place)
                yield opened.read(min(_PIECE_BYTES, end - begin))


def skeleton(target: Target) -> nn.Module:
    """The model on the meta device, without weights, for its context, head and stop tokens."""
    section = target.base
    # Where code is run, it is the base's, also for a checkpoint with a copy of it.
    if not (section.trust_remote_code and target.checkpoint is not None):
        section = section.model_copy(update={"name_or_path": target.weights, "revision": None})
    model = meta_model(Config(model=section, lora=LoraSection(enabled=False)))
    set_generation_config(causal_lm(model), target.weights)
    return model


def compute_dtype_of(target: Target, device: torch.device) -> torch.dtype:
    """The dtype of the evaluation's arithmetic."""
    return pick_dtype(target.base.dtype, device)


def build_engine(
    target: Target,
    shape: nn.Module,
    world: World,
    *,
    kind: Literal["vllm", "builtin"],
    max_model_len: int,
    max_sequences: int,
    gpu_memory_utilization: float,
    tensor_parallel_size: int,
) -> RolloutEngine:
    """Loads the target into the engine that samples from it. A collective.

    shape: `skeleton`'s.
    max_model_len: the longest prompt and completion together, in tokens.
    """
    dtype = compute_dtype_of(target, world.device)
    if kind == "builtin":
        model = _load(target, dtype, world.device)
        return BuiltinEngine(model, lambda: nullcontext(model), max_sequences)
    check_stored(target.weights, target.base)
    stored = StoredModel(
        head_size=lm_head_weight(shape).shape[0],
        dtype=dtype,
        tokenizer=resolve_model(target.base, with_weights=False),
        adapter=target.adapter,
        lora_rank=largest_rank(read_adapter_config(target.adapter)) if target.adapter else 0,
    )
    engine = VllmEngine(
        stored,
        target.weights,
        world,
        max_model_len=max_model_len,
        max_sequences=max_sequences,
        gpu_memory_utilization=gpu_memory_utilization,
        tensor_parallel_size=tensor_parallel_size,
        trust_remote_code=target.base.trust_remote_code,
    )
    if target.adapter is not None:
        engine.sync(0)
    return engine


def _load(target: Target, dtype: torch.dtype, device: torch.device) -> nn.Module:
    if target.checkpoint is not None:
        model = load_whole(target.checkpoint, target.base, dtype)
        set_logit_scale(model, f"model {target.weights}")
        model = nn.Module.to(model, device)
    else:
        model = load_base(target.base, device)
    check_forward(model, "padded", f"model {target.weights}")
    if target.adapter is not None:
        with quiet_peft():
            model = PeftModel.from_pretrained(model, str(target.adapter), torch_device=str(device))
    return model.eval()
