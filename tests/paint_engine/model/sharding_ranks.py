"""The program that `test_sharding` starts: python sharding_ranks.py WORK_DIR MODELS_DIR

Three ranks run every case, sharded, and the main rank runs it again as one process; four ranks do
so with two copies of the weights. What differs goes into WORK_DIR/report.json.
"""

import json
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from forked_ranks import on_ranks
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from paint_engine.checkpoint.weights import gather_weights, whole
from paint_engine.config.schema import Config
from paint_engine.config.sections import LoraSection, ModelSection
from paint_engine.distributed import World, gather_objects, sum_gradients, sum_over_ranks
from paint_engine.model.forward import autocast, causal_lm, hidden_states, lm_head_weight
from paint_engine.model.load import load_base
from paint_engine.model.lora import add_lora
from paint_engine.model.packing import build_batch, pack_sequences
from paint_engine.model.sharding import (
    checkpoint_activations,
    shard_model,
    sync_gradients,
    unsharded,
)
from paint_engine.model.teachers import FixedTeacher
from paint_engine.recipes import LossInputs, SecondPass
from paint_engine.recipes.paint import Paint
from paint_engine.training.microbatches import plan_microbatches
from paint_engine.types import PackedSequences, Problem, Rollout, TeacherView, TrainExample

NUM_RANKS = 3
CPU = torch.device("cpu")
VOCAB_SIZE = 340
Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """kind: "lora" in float64, "lora bf16" (float32 adapters on a bfloat16 base) or "all weights"
    in float64.

    shard: "full", "replicate", or "hybrid": two copies, each over half of the ranks.
    max_tokens: of a micro-batch; at 1 each rollout is one, and a rank has one without rollouts.
    fault: what to do wrong, to see that it would be seen.
    """

    kind: str = "lora"
    tied: bool = True
    checkpointed: bool = False
    max_tokens: int = 10_000
    reduction: str = "sequence_mean"
    shard: str = "full"
    samples_first: bool = False
    fault: str = ""


CASES = [
    *(
        Case(kind, tied, recomputed, max_tokens, samples_first=not recomputed)
        for kind, tied in (
            ("lora", True),
            ("lora bf16", True),
            ("all weights", True),
            ("all weights", False),
        )
        for recomputed, max_tokens in ((False, 10_000), (True, 1))
    ),
    Case("lora", tied=False, max_tokens=1),
    Case("all weights", tied=False, max_tokens=1, reduction="token_mean"),
    *(Case(kind, max_tokens=1, shard="replicate") for kind in ("lora", "lora bf16", "all weights")),
    Case("lora", max_tokens=1, shard="replicate", reduction="token_mean"),
]
HYBRID = [
    Case(kind, tied, recomputed, max_tokens, shard="hybrid", samples_first=not recomputed)
    for kind, tied, recomputed, max_tokens in (
        ("lora", True, False, 1),
        ("lora bf16", True, True, 10_000),
        ("all weights", True, False, 1),
        ("all weights", False, True, 1),
    )
]
FAULTS = [
    Case("all weights", max_tokens=1, fault="gradients averaged"),
    Case("lora", max_tokens=1, fault="denominators of the rank"),
    Case("lora", max_tokens=1, fault="only the last micro-batch"),
    Case("lora", max_tokens=1, fault="teacher with adapters"),
]


def make_items() -> list[TrainExample]:
    """Five rollouts for three ranks, one of them without a token."""
    rng = random.Random(0)
    items = []
    for student, teacher, completion in ((5, 11, 4), (1, 4, 0), (9, 1, 1), (2, 20, 12), (3, 3, 7)):
        asked, shown, answered = (
            tuple(rng.randrange(VOCAB_SIZE) for _ in range(n))
            for n in (student, teacher, completion)
        )
        nothing = (0.0,) * completion
        rollout = Rollout(Problem("p", "", "", ""), asked, answered, nothing, False, "")
        items.append(TrainExample(rollout, teacher_view=TeacherView(shown, "", 0.35)))
    return items


def load(case: Case, models: Path) -> PreTrainedModel:
    half = case.kind == "lora bf16"
    directory = models / ("tied" if case.tied else "untied")
    section = ModelSection(name_or_path=str(directory), dtype="bfloat16" if half else "float32")
    base = load_base(section, CPU)
    if not half:
        nn.Module.to(base, torch.float64)
        # What load_base notes, which knows no float64.
        setattr(base, "paint_compute_dtype", torch.float64)  # noqa: B010
    return base


def build(case: Case, models: Path) -> nn.Module:
    """The model to train, its adapters as after some training."""
    section = LoraSection(rank=4, alpha=8, enabled=case.kind != "all weights")
    model = add_lora(load(case, models), section, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    if case.kind != "lora bf16":
        nn.Module.to(model, torch.float64)
    return model


def trained(model: nn.Module) -> Gradients:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def loss_of(
    model: nn.Module,
    student: Tensor,
    teacher: Tensor,
    teacher_head: Tensor | None,
    bounds: Tensor,
    case: Case,
    denominator: int,
) -> Tensor:
    recipe = Paint(Config.model_validate({"objective": {"reduction": case.reduction}}))
    with autocast(model):
        return recipe.loss(
            LossInputs(
                student_hidden_states=student,
                lm_head_weight=lm_head_weight(model),
                second_passes=(SecondPass(teacher, teacher_head),),
                completion_ids=torch.empty(len(student)),
                cu_seqlens=bounds,
                examples=(),
                old_logprobs=None,
                vocab_size=VOCAB_SIZE,
                denominator=denominator,
            )
        ).loss


def size_of(items: Sequence[TrainExample], case: Case) -> int:
    if case.reduction == "sequence_mean":
        return len(items)
    return sum(len(item.rollout.completion_ids) for item in items)


def step(
    case: Case,
    model: nn.Module,
    teacher: FixedTeacher,
    mine: Sequence[Sequence[TrainExample]],
    items: Sequence[TrainExample],
) -> float:
    """The gradients of one step, as the training loop takes them; its loss over all ranks."""
    loss, denominator = 0.0, size_of(items, case)
    if case.fault == "denominators of the rank":
        denominator = size_of([item for group in mine for item in group], case)
    model.train()
    for place, group in enumerate(mine):
        batch = build_batch(group or items[:1])
        sync_gradients(model, last=place == len(mine) - 1)
        with teacher.scoring() as scorer:
            if case.fault == "teacher with adapters":
                for layer in teacher._layers:
                    layer._disable_adapters = False
            states = hidden_states(scorer, batch.teacher, attention="padded")
            head = None if scorer is model else lm_head_weight(scorer)
        student = hidden_states(model, batch.student, attention="padded")
        part = loss_of(model, student, states, head, batch.cu_seqlens, case, denominator)
        if case.fault == "only the last micro-batch" and place < len(mine) - 1:
            part = part * 0.0
        (part if group else 0.0 * part).backward()
        loss += part.item() if group else 0.0
    sum_gradients(list(trained(model).values()))
    model.eval()
    return sum_over_ranks({"loss": loss})["loss"]


@dataclass(frozen=True)
class Alone:
    """What one process computes.

    gradients: summed in float64, which adds up bfloat16 numbers without rounding.
    slack: for each element, how far a float32 sum of the same parts may be from that, whatever
        their order: (n - 1) u / (1 - (n - 1) u) times the sum of |part|, u = 2**-24 (Higham,
        "Accuracy and Stability of Numerical Algorithms", section 4.2). 0 for a single part.
    """

    loss: float
    gradients: Gradients
    slack: Gradients


def step_alone(
    case: Case,
    model: nn.Module,
    untrained: nn.Module,
    groups: Sequence[Sequence[TrainExample]],
) -> Alone:
    """The same of all rollouts, in plain terms. In float64 as one batch; bfloat16's rounding is
    that of the groups.

    A micro-batch's gradients are bfloat16 numbers on a bfloat16 base, and the ranks add them up in
    float32. That is exact unless the parts of one element are more than 2**16 apart; then the sum
    depends on the order, which only the process group knows.
    """
    items, loss = [item for group in groups for item in group], 0.0
    parts = groups if case.kind == "lora bf16" else [items]
    sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in trained(model).items()}
    magnitudes = {name: torch.zeros_like(total) for name, total in sums.items()}
    for group in parts:
        batch = build_batch(group)
        with torch.no_grad():
            states = hidden_states(untrained, batch.teacher, attention="padded")
            head = None if case.kind != "all weights" else lm_head_weight(untrained)
        student = hidden_states(model, batch.student, attention="padded")
        size = size_of(items, case)
        part = loss_of(model, student, states, head, batch.cu_seqlens, case, size)
        part.backward()
        loss += part.item()
        for name, parameter in trained(model).items():
            assert parameter.grad is not None, name
            sums[name] += parameter.grad
            magnitudes[name] += parameter.grad.abs()
            parameter.grad = None
    unit = (len(parts) - 1) * 2.0**-24
    slack = {name: unit / (1 - unit) * total for name, total in magnitudes.items()}
    return Alone(loss, sums, slack)


def update(model: nn.Module, gradients: Gradients) -> None:
    """One step down the gradient, long enough to be seen in the next one."""
    with torch.no_grad():
        for name, parameter in trained(model).items():
            parameter.sub_(0.1 * gradients[name])
            parameter.grad = None


def probe() -> PackedSequences:
    return pack_sequences([(5, 6, 7), (9,)], [(1, 2), (3, 4, 5, 6)])


def sample(model: nn.Module, teacher: FixedTeacher, rank: int) -> list[Tensor]:
    """What the built-in sampler does: passes of each rank's own number, none on some, on weights
    that are whole inside and split again after."""
    states = []
    with torch.no_grad(), unsharded(model):
        states += [hidden_states(model, probe(), attention="padded") for _ in range(rank)]
    with teacher.scoring() as scorer, unsharded(scorer):
        for _ in range(2 - rank):
            states.append(hidden_states(scorer, probe(), attention="padded"))
    for module in (model, scorer) if isinstance(causal_lm(model), FSDPModule) else ():
        assert all(isinstance(parameter, DTensor) for parameter in module.parameters())
    return states


def distance(actual: Tensor, expected: Tensor, slack: Tensor | float = 0.0) -> float:
    """Relative, in norm, of what exceeds the slack; the absolute one where nothing is expected."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    errors = (actual.double() - expected.double()).abs() - slack
    error, scale = errors.clamp(min=0.0).norm(), expected.double().norm()
    return (error / scale if scale else error).item()


def compare(
    actual: Gradients, expected: Gradients, slack: Gradients | None = None
) -> tuple[float, str]:
    assert actual.keys() == expected.keys(), actual.keys() ^ expected.keys()
    slack = slack or dict.fromkeys(expected, torch.zeros(()))
    return max((distance(actual[name], expected[name], slack[name]), name) for name in expected)


def prepare(case: Case, model: nn.Module, world: World) -> FixedTeacher:
    """The teacher of a model that is sharded and recomputed as the case says."""
    teacher = FixedTeacher(model)
    if case.checkpointed:
        checkpoint_activations(model)
    if case.shard != "replicate":
        for module in filter(None, (model, teacher.copy)):
            shard_model(module, world, replicas=2 if case.shard == "hybrid" else 1)
    for module in model.modules():
        if case.fault == "gradients averaged" and isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(world.size)
    return teacher


class PeftsOwnSwitch(FixedTeacher):
    """The teacher with the adapters off as peft turns them off."""

    @contextmanager
    def scoring(self) -> Iterator[nn.Module]:
        assert isinstance(self._model, PeftModel)
        self._model.eval()
        with self._model.disable_adapter(), torch.no_grad():
            yield self._model
        self._model.train()


def run_case(case: Case, world: World, models: Path) -> dict[str, Any]:
    """Two steps with an update between them; the largest differences from one process."""
    items = make_items()
    plan = plan_microbatches(items, case.max_tokens, world.size, padded=True)
    groups = [group for rank in plan for group in rank if group]
    model, alone, untrained = build(case, models), build(case, models), load(case, models)
    teacher = prepare(case, model, world)
    errors: dict[str, Any] = {"loss": 0.0, "gradients": 0.0, "sampled": 0.0, "missing": []}
    errors["empty"] = sum(not group for rank in plan for group in rank)
    for number in (0, 1):
        if number or case.samples_first:
            sampled = sample(model, teacher, world.rank)
            wanted = sample(alone, FixedTeacher(alone), world.rank)
            if case.kind == "all weights":
                with torch.no_grad():
                    base = hidden_states(untrained, probe(), attention="padded")
                wanted = wanted[: world.rank] + [base] * (2 - world.rank)
            found = max(map(distance, sampled, wanted))
            errors["sampled"] = max(errors["sampled"], *gather_objects(found))
        loss = step(case, model, teacher, plan[world.rank], items)
        expected = step_alone(case, alone, untrained, groups)
        errors["loss"] = max(errors["loss"], abs(loss - expected.loss) / abs(expected.loss))
        gradients: Gradients = {}
        mine: Gradients = {}
        for name, parameter in trained(model).items():
            assert parameter.grad is not None, name
            assert parameter.grad.dtype == parameter.dtype, (name, parameter.grad.dtype)
            assert isinstance(parameter, DTensor) == (case.shard != "replicate"), name
            mine[name], gradients[name] = parameter.grad, whole(parameter.grad)
        errors["missing"] += [name for name, g in expected.gradients.items() if not g.any()]
        found, name = compare(gradients, expected.gradients, expected.slack)
        if found >= errors["gradients"]:
            errors |= {"gradients": found, "where": name}
        update(model, mine)
        # The ranks' gradients, so that both take the next step from the same weights.
        update(alone, gradients)
    weights, kept = gather_weights(model, keep=world.is_main), gather_weights(alone)
    if world.is_main:
        errors["weights"], _ = compare(weights, kept)
    else:
        assert weights == {}
    return errors


class Communication(TorchDispatchMode):
    """How often each operator of the process group is called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.counts[func._opname] += 1
        return func(*args, **(kwargs or {}))


def count_gathers(world: World, models: Path) -> dict[str, list[Counter[str]]]:
    """All-gathers and reduce-scatters of one micro-batch, of few tokens and of many."""
    counts: dict[str, list[Counter[str]]] = {}
    for kind in ("lora", "all weights"):
        case = Case(kind)
        model = build(case, models)
        teacher = prepare(case, model, world)
        counts[kind] = []
        for items in (make_items()[:1], make_items() * 40):
            with Communication() as seen:
                step(case, model, teacher, [items], items)
            counts[kind].append(seen.counts)
    return counts


def score_first(world: World, models: Path) -> dict[str, Any]:
    """The teacher's pass as the first of all, where FSDP also rounds: ours, and peft's switch."""
    rounding = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    case, found = Case("lora bf16"), {}
    with mock.patch("paint_engine.model.sharding.MixedPrecisionPolicy", return_value=rounding):
        found["ours"] = run_case(case, world, models)
        with mock.patch(f"{__name__}.FixedTeacher", PeftsOwnSwitch):
            try:
                found["peft's"] = run_case(case, world, models)
            except RuntimeError as error:
                found["peft's"] = str(error)
    return found


def everything(world: World, work: Path, models: Path) -> dict[str, Any]:
    """What the main rank reports."""
    return {
        "cases": [run_case(case, world, models) for case in CASES],
        "faults": {case.fault: run_case(case, world, models) for case in FAULTS},
        "gathers": count_gathers(world, models),
        "score first": score_first(world, models),
    }


def hybrid(world: World, work: Path, models: Path) -> dict[str, Any]:
    """The cases with two copies of the weights; how many elements of the first a rank holds."""
    model = build(HYBRID[0], models)
    prepare(HYBRID[0], model, world)
    weight = next(model.parameters())
    assert isinstance(weight, DTensor)
    held = gather_objects(weight.to_local().numel() / weight.numel())
    return {"cases": [run_case(case, world, models) for case in HYBRID], "held": held}


if __name__ == "__main__":
    torch.set_num_threads(1)
    work = Path(sys.argv[1])
    report = on_ranks(NUM_RANKS, everything, work, Path(sys.argv[2]))
    report["hybrid"] = on_ranks(4, hybrid, work, Path(sys.argv[2]))
    (work / "report.json").write_text(json.dumps(report))
