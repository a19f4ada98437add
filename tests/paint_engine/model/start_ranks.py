"""The program that `test_sharded_start` starts: python start_ranks.py WORK_DIR MODELS_DIR

Two ranks load the models of MODELS_DIR and divide their weights; what they found goes into
WORK_DIR/report.json.
"""

import gc
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from forked_ranks import fork, on_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3Config

from paint_engine.checkpoint.weights import whole
from paint_engine.config.sections import LoraSection, ModelSection
from paint_engine.distributed import World, barrier, gather_objects
from paint_engine.model import stored
from paint_engine.model.forward import LOGIT_SCALE, causal_lm
from paint_engine.model.load import load_base
from paint_engine.model.lora import add_lora
from paint_engine.model.sharding import shard_model
from paint_engine.model.teachers import FixedTeacher

CPU = torch.device("cpu")
LARGE = "large"
NUM_LARGE_BYTES = 4 * (14 * (4 * 512 * 512 + 3 * 512 * 2048) + 2 * 340 * 512)


def refuse(self: object, index: object) -> Tensor:
    raise AssertionError("read by a rank that is not the main one")


def load(
    name: str, models: Path, dtype: str, *, lora: bool, ranks: World | None
) -> list[nn.Module]:
    """The student, and the copy of its base if it trains all weights."""
    section = ModelSection(name_or_path=str(models / name), dtype=dtype)
    base = load_base(section, CPU, trains_base=not lora, ranks=ranks, say=lambda text: None)
    student = add_lora(base, LoraSection(enabled=lora, rank=2, alpha=8), seed=3)
    copied = FixedTeacher(student).copy
    loaded = [student] if copied is None else [student, copied]
    for module in loaded if ranks is not None else ():
        shard_model(module, ranks)
    return loaded


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Whole, by every name that a tensor has: a tied one has two. A collective."""
    inner = causal_lm(model)
    named = [*inner.named_parameters(remove_duplicate=False), *inner.named_buffers()]
    return {name: whole(tensor.detach()).clone() for name, tensor in named}


def differing(ours: nn.Module, alone: nn.Module) -> list[str]:
    found, wanted = tensors(ours), tensors(alone)
    wrong = [n for n in found | wanted if n not in found or n not in wanted]
    for name in found.keys() & wanted.keys():
        same = found[name].dtype == wanted[name].dtype and torch.equal(found[name], wanted[name])
        wrong += [] if same else [name]
    if ours.training != alone.training:
        wrong.append("training")
    inner, other = causal_lm(ours), causal_lm(alone)
    for name in ("name_or_path", LOGIT_SCALE, "generation_config", "config"):
        if str(getattr(inner, name)) != str(getattr(other, name)):
            wrong.append(name)
    trained = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (ours, alone)]
    return wrong if trained[0] == trained[1] else [*wrong, "what is trained"]


def compare(world: World, work: Path, models: Path) -> dict[str, Any]:
    """What differs from one process, on any rank, by model, dtype and kind of training."""
    report = {}
    for name in sorted(path.name for path in models.iterdir() if path.name not in ("bad", LARGE)):
        for dtype, lora in (("float32", True), ("bfloat16", True), ("bfloat16", False)):
            reads = refuse if world.rank else stored._Apart.__getitem__
            with mock.patch.object(stored._Apart, "__getitem__", reads):
                ours = load(name, models, dtype, lora=lora, ranks=world)
            alone = load(name, models, dtype, lora=lora, ranks=None)
            wrong = [part for pair in zip(ours, alone, strict=True) for part in differing(*pair)]
            for model in ours:
                parts = [p.numel() - p.to_local().numel() for p in model.parameters()]
                wrong += [] if all(parts) else ["not divided"]
            report[f"{name} {dtype} {lora}"] = gather_objects(wrong)
    return report


def refusals(world: World, work: Path, models: Path) -> list[str]:
    """What each rank says of a weight that is not finite, which only the main rank sees."""
    try:
        load("bad", models, "float32", lora=True, ranks=world)
        message = "loaded"
    except ValueError as error:
        message = str(error)
    return gather_objects(message)


def start(world: World, work: Path, models: Path) -> None:
    """Starts twice: what the first start leaves is at rest before the second, a large one."""
    load("tied", models, "float32", lora=True, ranks=world)
    # Touches every object, so that no page is shared with the parent from here on.
    gc.collect()
    barrier()
    if world.is_main:
        (work / "at rest").touch()
    while not (work / "measured").exists():
        time.sleep(0.01)
    load(LARGE, models, "float32", lora=True, ranks=world)
    barrier()


def pss_bytes() -> int:
    """Memory of all child processes: what is shared counts by its share."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    total = 0
    for child in children:
        lines = Path(f"/proc/{child}/smaps_rollup").read_text().splitlines()
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def peak_bytes(work: Path, models: Path) -> int:
    """By how much the memory of both ranks together grew at most in the second start."""
    samples: list[int] = []
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(0.005):
            if not (work / "at rest").exists():
                continue
            try:
                samples.append(pss_bytes())
            except (FileNotFoundError, ProcessLookupError):
                # A rank that has just ended.
                continue
            (work / "measured").touch()

    thread = threading.Thread(target=sample)
    thread.start()
    on_ranks(2, start, work, models)
    ended.set()
    thread.join()
    return max(samples) - samples[0]


def save_large(directory: Path, like: Path) -> None:
    """A model of 236 MB in float32, whose matrices are of 4 MiB at most."""
    config = Qwen3Config(
        vocab_size=340,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=14,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=False,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    for file in like.iterdir():
        if not (directory / file.name).exists() and file.suffix != ".safetensors":
            (directory / file.name).symlink_to(file.resolve())


def main(work: Path, models: Path) -> None:
    torch.set_num_threads(1)
    # In a process of its own: what it frees would stay in the heap that the ranks get.
    os.waitpid(fork(lambda: save_large(models / LARGE, models / "tied")), 0)
    for name, change in (("bad", float("nan")), ("twice", None)):
        (models / name).mkdir()
        for file in (models / "tied").resolve().iterdir():
            if file.suffix != ".safetensors":
                (models / name / file.name).symlink_to(file)
        weights = load_file(models / "tied" / "model.safetensors")
        if change is None:
            # Some published models store a tied head too.
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        else:
            weights["model.norm.weight"][3] = change
        save_file(weights, models / name / "model.safetensors", metadata={"format": "pt"})
    report = {
        "differing": on_ranks(2, compare, work, models),
        "refusals": on_ranks(2, refusals, work, models),
        "peak": peak_bytes(work, models) / NUM_LARGE_BYTES,
    }
    (work / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
