"""The program that `test_teacher_ranks` starts: python teacher_ranks.py WORK_DIR MODELS_DIR

Two ranks train with a moving teacher, sharded, beside one process that does the same; then its mean
is saved and restored at several numbers of ranks. What differs goes into WORK_DIR/report.json.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from forked_ranks import on_ranks
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from paint_engine.checkpoint.load import load_checkpoint
from paint_engine.checkpoint.save import save_checkpoint
from paint_engine.checkpoint.weights import whole
from paint_engine.config.sections import LoraSection, ModelSection
from paint_engine.distributed import World, gather_objects
from paint_engine.model.forward import hidden_states
from paint_engine.model.load import load_base
from paint_engine.model.lora import add_lora
from paint_engine.model.packing import pack_sequences
from paint_engine.model.sharding import checkpoint_activations, shard_model, unsharded
from paint_engine.model.teachers import EmaTeacher, FixedTeacher, LiveTeacher, Teacher

CPU = torch.device("cpu")
NUM_STEPS = 3
# What a case's student is scored by, beside the base.
MAKE: dict[str, Callable[[nn.Module], Teacher]] = {
    "ema": lambda model: EmaTeacher(model, decay=0.5),
    "live": LiveTeacher,
}
PROBE = pack_sequences([(5, 6, 7), (9,)], [(1, 2), (3, 4, 5, 6)])


@dataclass(frozen=True)
class Case:
    """at_root: adapters on the embeddings too, which sharding keeps with the root."""

    teacher: str = "ema"
    dtype: str = "float32"
    at_root: bool = False
    checkpointed: bool = False
    fault: str = ""


CASES = [
    Case(),
    Case(dtype="bfloat16", checkpointed=True),
    Case(at_root=True),
    Case("live"),
    Case("live", at_root=True),
]
FAULTS = [
    Case(fault="mean put into new storage"),
    Case(at_root=True, fault="root kept gathered"),
]


def build(
    models: Path, *, dtype: str = "float32", at_root: bool = False, rank: int = 2
) -> nn.Module:
    """Rank 2 over 4 processes: two of them hold nothing of A."""
    section = ModelSection(name_or_path=str(models / "untied"), dtype=dtype)
    targets = ["q_proj", "down_proj", *(["embed_tokens"] if at_root else [])]
    lora = LoraSection(rank=rank, alpha=8, target_modules=tuple(targets))
    return add_lora(load_base(section, CPU), lora, seed=0)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def train_step(model: nn.Module, teacher: Teacher, fixed: FixedTeacher, share: float) -> Tensor:
    """One step down the gradient's signs; what the teacher's pass gave, which is the very first.

    share: of the loss that this rank has.
    """
    with teacher.scoring() as scorer:
        scored = hidden_states(scorer, PROBE, attention="padded")
    with fixed.scoring() as scorer:
        base = hidden_states(scorer, PROBE, attention="padded")
    with teacher.scoring() as scorer, unsharded(scorer):
        sampled = hidden_states(scorer, PROBE, attention="padded")
    with teacher.scoring() as scorer:
        again = hidden_states(scorer, PROBE, attention="padded")
    states = hidden_states(model, PROBE, attention="padded")
    # Each pass has a part in what the ranks' students become.
    target = scored + sampled + again - 2 * base
    (share * (states - target).square().sum()).backward()
    with torch.no_grad():
        for parameter in trained(model).values():
            assert parameter.grad is not None
            parameter.sub_(0.03 * parameter.grad.sign())
            parameter.grad = None
    teacher.update()
    return scored


def put_new_storage(self: EmaTeacher, values: list[Tensor]) -> None:
    """What suffices where nothing is sharded."""
    for parameter, value in zip(self._parameters, values, strict=True):
        local = parameter.data
        if isinstance(local, DTensor):
            local._local_tensor = value
        else:
            parameter.data = value


def run_case(case: Case, world: World, models: Path) -> dict[str, float]:
    """How far the teacher's states, the student's weights and the means are from those of one
    process, over all steps; and how far the teacher has moved, relative to where it is."""
    model, alone = (build(models, dtype=case.dtype, at_root=case.at_root) for _ in range(2))
    if case.checkpointed:
        checkpoint_activations(model)
    shard_model(model, world)
    teachers, fixed = [MAKE[case.teacher](m) for m in (model, alone)], FixedTeacher(model)
    found = {"states": 0.0, "students": 0.0, "means": 0.0, "moved": 0.0}
    first: list[Tensor] = []
    for _ in range(NUM_STEPS):
        scored = train_step(model, teachers[0], fixed, float(world.is_main))
        expected = train_step(alone, teachers[1], FixedTeacher(alone), 1.0)
        first = first or [expected]
        found["states"] += (scored - expected).norm().item() / expected.norm().item()
        found["moved"] = (expected - first[0]).norm().item() / expected.norm().item()
        for (name, parameter), other in zip(
            trained(model).items(), trained(alone).values(), strict=True
        ):
            assert isinstance(parameter, DTensor), name
            found["students"] += (whole(parameter.detach()) - other).norm().item()
    sharded, single = teachers
    if isinstance(sharded, EmaTeacher) and isinstance(single, EmaTeacher):
        for mean, other in zip(sharded.shadow, single.shadow, strict=True):
            assert isinstance(mean, DTensor) and mean.dtype == torch.float32
            found["means"] += (whole(mean) - other).norm().item()
    return {name: max(gather_objects(value)) for name, value in found.items()}


def run_fault(case: Case, world: World, models: Path) -> dict[str, float]:
    """The case with a mistake, which must show."""
    reshard = FSDPModule.reshard

    def skip_the_teachers(self: FSDPModule) -> None:
        if sys._getframe(1).f_code is not EmaTeacher._put.__code__:
            reshard(self)

    patch = (
        mock.patch.object(EmaTeacher, "_put", put_new_storage)
        if case.fault == "mean put into new storage"
        else mock.patch.object(FSDPModule, "reshard", skip_the_teachers)
    )
    with patch:
        return run_case(case, world, models)


def step_together(world: World, work: Path, models: Path) -> dict[str, Any]:
    """What the main rank reports."""
    return {
        "cases": [run_case(case, world, models) for case in CASES],
        "faults": {case.fault: run_fault(case, world, models) for case in FAULTS},
    }


# ---- checkpoints ---------------------------------------------------------------------------------


LAYOUTS = ((1, "replicate"), (2, "full"), (2, "replicate"), (4, "full"))


def build_trained(
    models: Path, world: World, shard: str, num_steps: int
) -> tuple[nn.Module, torch.optim.Optimizer, EmaTeacher]:
    model = build(models, at_root=True)
    if shard == "full":
        shard_model(model, world)
    assert isinstance(model, PeftModel)
    ema = EmaTeacher(model, decay=0.5)
    optimizer = torch.optim.AdamW(trained(model).values(), lr=0.01)
    for _ in range(num_steps):
        model(input_ids=torch.arange(12)[None]).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
    return model, optimizer, ema


def save_all(world: World, work: Path, models: Path) -> None:
    """A checkpoint of each layout at this number of ranks, with its means beside it."""
    for size, shard in LAYOUTS:
        if size != world.size:
            continue
        model, optimizer, ema = build_trained(models, world, shard, 2)
        run_dir = work / f"{size}-{shard}"
        run_dir.mkdir(exist_ok=True)
        save_checkpoint(run_dir, model, optimizer, {"step": 2}, keep=1, world=world, teacher=ema)
        means = {str(i): whole(mean).clone() for i, mean in enumerate(ema.shadow)}
        if world.is_main:
            save_file(means, run_dir / "means.safetensors")


def load_all(world: World, work: Path, models: Path) -> dict[str, list[str]]:
    """Which means came back differently, for each pair of layouts."""
    outcome: dict[str, list[str]] = {}
    for size, shard in LAYOUTS:
        if size != world.size:
            continue
        model, optimizer, ema = build_trained(models, world, shard, 0)
        for saved_size, saved_shard in LAYOUTS:
            for mean in ema.shadow:
                mean.zero_()
            run_dir = work / f"{saved_size}-{saved_shard}"
            load_checkpoint(run_dir, model, optimizer, world=world, warn=print, teacher=ema)
            truth = load_file(run_dir / "means.safetensors")
            differing = [
                name
                for name, mean in zip(truth, (ema.shadow[int(n)] for n in truth), strict=True)
                if not torch.equal(whole(mean), truth[name])
            ]
            students = [whole(parameter.detach()) for parameter in trained(model).values()]
            if all(torch.equal(students[int(n)], truth[n]) for n in truth):
                differing.append("the mean is the student")
            outcome[f"{run_dir.name} at {size}-{shard}"] = differing
    return outcome


if __name__ == "__main__":
    torch.set_num_threads(1)
    work, models = Path(sys.argv[1]), Path(sys.argv[2])
    report = on_ranks(2, step_together, work, models)
    for size in (1, 2, 4):
        on_ranks(size, save_all, work, models)
    report["restored"] = {}
    for size in (1, 2, 4):
        report["restored"] |= on_ranks(size, load_all, work, models)
    (work / "report.json").write_text(json.dumps(report))
