"""examples/minimal_loop.py: the engine's prompts, the reference's loss, the same run twice."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from paint_engine.config.bundled import TINY_BASE
from paint_engine.config.sections import PromptsSection
from paint_engine.prompts import chat
from paint_engine.prompts.anchors import overlap
from paint_engine.prompts.masking import OMISSION_MARKER, mask_ratio, mask_solution
from paint_engine.tiny.problems import load_split
from paint_kernels import reference

EXAMPLE = Path(__file__).parents[2] / "examples" / "minimal_loop.py"
BASE = json.loads((TINY_BASE / "config.json").read_text())
STOP, PADDING = BASE["eos_token_id"], BASE["pad_token_id"]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("minimal_loop", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY_BASE)


@pytest.fixture
def model() -> Any:
    """Adapters that are not at their initial values, where student and base would be one."""
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(TINY_BASE)
    return get_peft_model(
        base, LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    )


def test_prompts_are_the_engine_s(example: ModuleType, tokenizer: Any) -> None:
    prompts = PromptsSection()
    for problem in load_split("train", 4):
        completion = problem.solution[: len(problem.solution) // 2]
        student = chat.encode_student_prompt(tokenizer, problem, prompts, thinking=False)
        assert tuple(example.encode_student_prompt(tokenizer, problem)) == student
        ratio = mask_ratio(overlap(completion, problem.solution), 0.3, 0.4)
        partial = mask_solution(problem.solution, ratio)
        teacher, _ = chat.encode_teacher_prompt(
            tokenizer, problem, partial, prompts, marker=OMISSION_MARKER
        )
        assert tuple(example.encode_teacher_prompt(tokenizer, problem, completion)) == teacher


def test_rollouts_end_with_the_stop_token_or_are_cut(
    example: ModuleType, model: Any, tokenizer: Any
) -> None:
    torch.manual_seed(0)
    with model.disable_adapter():
        rollouts = example.roll_out(model, tokenizer, load_split("train", 16), 90)
    lengths = [len(rollout.completion_ids) for rollout in rollouts]
    assert min(lengths) < max(lengths) == 90, lengths
    for rollout in rollouts:
        *before, last = rollout.completion_ids
        assert STOP not in before and PADDING not in before
        assert last == STOP or len(rollout.completion_ids) == 90


def test_the_loss_and_its_gradient_are_the_reference_s(
    example: ModuleType, model: Any, tokenizer: Any
) -> None:
    """By full logits of the models' own forward passes, in float64, the teacher a base of its
    own."""
    torch.manual_seed(0)
    model.double()
    rollouts = example.roll_out(model, tokenizer, load_split("train", 3), 48)
    loss = example.backward(model, rollouts)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradient = torch.cat([parameter.grad.flatten() for parameter in trained])

    teacher = AutoModelForCausalLM.from_pretrained(TINY_BASE).double()
    losses = []
    for rollout in rollouts:
        logits = []
        for scored, prompt_ids in (
            (model, rollout.prompt_ids),
            (teacher, rollout.teacher_prompt_ids),
        ):
            ids = torch.tensor([prompt_ids + rollout.completion_ids])
            logits.append(scored(ids).logits[0, len(prompt_ids) - 1 : -1])
        bounds = torch.tensor([0, len(rollout.completion_ids)])
        losses.append(reference.paint_loss_from_logits(*logits, bounds, temperature=1.1).loss)
    expected = torch.stack(losses).mean()
    expected_gradient = torch.autograd.grad(expected, trained)

    assert loss == pytest.approx(expected.item(), rel=1e-9)
    flat = torch.cat([part.flatten() for part in expected_gradient])
    # The model's norms compute in float32: where its inputs differ by 1e-16, a rounding may flip.
    assert ((gradient - flat).norm() / flat.norm()).item() < torch.finfo(torch.float32).eps


def test_a_run_trains_the_adapter_and_repeats_to_the_bit(run_example: Any, tmp_path: Path) -> None:
    adapters, outputs = [], []
    for name in ("first", "second"):
        options = ["--steps", 2, "--batch-size", 4, "--max-new-tokens", 48]
        outputs.append(run_example("minimal_loop.py", *options, "--output", tmp_path / name))
        adapters.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert outputs[0] == outputs[1]
    assert adapters[0] == adapters[1]
    losses = re.findall(r"^step (\d): loss (-?\d+\.\d{6}) over \d+ tokens$", outputs[0], re.M)
    assert [step for step, _ in losses] == ["0", "1"]
    assert all(float(loss) != 0 for _, loss in losses)
    weights = load_file(tmp_path / "first" / "adapter_model.safetensors")
    # B starts at zero, so that what it is now is what it has learnt.
    moved = [weight.abs().max().item() for name, weight in weights.items() if "lora_B" in name]
    assert len(moved) == 7 * BASE["num_hidden_layers"] and min(moved) > 0
