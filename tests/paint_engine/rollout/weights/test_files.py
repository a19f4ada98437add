"""Weights handed over as files: new names, one set kept, nothing left behind."""

import os
import stat
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from paint_engine.checkpoint.weights import gather_weights
from paint_engine.config.sections import LoraSection, ModelSection
from paint_engine.distributed import World
from paint_engine.files import ADAPTER_FILE
from paint_engine.files.processes import start_of
from paint_engine.model.forward import autocast, hidden_states, lm_head_weight
from paint_engine.model.load import load_base
from paint_engine.model.lora import add_lora
from paint_engine.model.packing import build_batch
from paint_engine.rollout.builtin import BuiltinEngine
from paint_engine.rollout.engine import SamplingParams
from paint_engine.rollout.mismatch import logprob_differences, mismatch_metrics
from paint_engine.rollout.weights import files as weight_files
from paint_engine.rollout.weights.files import WeightFiles
from paint_engine.types import Problem, Rollout, TrainExample

WORLD = World(0, 1, 0, torch.device("cpu"))


def test_each_write_has_a_new_name_and_replaces_the_one_before(
    lora_model: PeftModel, tmp_path: Path
) -> None:
    files = WeightFiles(lora_model, WORLD, str(tmp_path), per_node=True)
    # The same number twice, as when a run is resumed: still another name.
    first, second = files.write(7), files.write(7)
    assert first.name != second.name
    assert (first.serial, second.serial) == (1, 2)
    assert not first.directory.exists()
    stored = load_peft_weights(str(second.directory), device="cpu")
    assert stored.keys() and all(
        torch.equal(tensor, lora_model.get_parameter(name.replace(".weight", ".default.weight")))
        for name, tensor in stored.items()
    )
    again = WeightFiles(lora_model, WORLD, str(tmp_path), per_node=True)
    assert again.write(7).name not in {first.name, second.name}
    files.close()
    again.close()
    assert list(tmp_path.iterdir()) == []


def test_adapters_on_a_bfloat16_base_are_rounded_by_themselves(
    model_dir: Path, tmp_path: Path
) -> None:
    """As the trainer's products round them: after a step at 5e-6 the sum of base and adapters,
    rounded to bfloat16, is the base. A checkpoint has them in float32, twice the bytes."""
    section = ModelSection(name_or_path=str(model_dir), dtype="bfloat16")
    model = add_lora(load_base(section, WORLD.device), LoraSection(rank=4, alpha=8), seed=0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-6)
    with autocast(model):
        model(input_ids=torch.arange(20)[None]).logits.square().mean().backward()
    optimizer.step()
    files = WeightFiles(model, WORLD, str(tmp_path), per_node=True)
    stored = load_file(files.write(1).directory / ADAPTER_FILE)
    files.close()
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    saved = gather_weights(model)
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    num_bytes = [sum(tensor.nbytes for tensor in part.values()) for part in (stored, saved)]
    assert 2 * num_bytes[0] == num_bytes[1] > 0
    unchanged, entries = 0, 0
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        a, b = (stored[f"{name}.lora_{part}.weight"] for part in "AB")
        trained = module.lora_B["default"].weight
        assert isinstance(trained, torch.Tensor)
        assert torch.equal(b, trained.to(torch.bfloat16)) and b.any()
        weight = module.get_base_layer().weight
        assert isinstance(weight, torch.Tensor)
        moved = weight.float() + 2 * b.float() @ a.float()
        unchanged += int((moved.to(torch.bfloat16) == weight).sum())
        entries += weight.numel()
    assert unchanged > 0.99 * entries


def test_a_sampler_with_rounded_adapters_is_as_far_from_the_trainer(
    model_dir: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """`rollout_logprob_diff` of a sampler in bfloat16 that has the adapters as they travel, and of
    one that has them in float32."""
    section = ModelSection(name_or_path=str(model_dir), dtype="bfloat16")

    def student() -> PeftModel:
        model = add_lora(load_base(section, WORLD.device), LoraSection(rank=4, alpha=8), seed=0)
        assert isinstance(model, PeftModel)
        return model

    trained, sampler = student(), student()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    files = WeightFiles(trained, WORLD, str(tmp_path), per_node=True)
    as_sent = load_peft_weights(str(files.write(1).directory), device="cpu")
    files.close()
    params = SamplingParams(1.1, 0.95, 20, 24, (), len(tokenizer))
    prompts = [tuple(range(20, 24 + i)) for i in range(8)]

    def difference(weights: dict[str, torch.Tensor]) -> float:
        set_peft_model_state_dict(sampler, weights)
        engine = BuiltinEngine(sampler, sampler.disable_adapter, max_sequences=8)
        completions = engine.generate(prompts, range(8), params)
        rollouts = [
            Rollout(Problem("p", "", "", ""), prompt, c.token_ids, c.logprobs, c.truncated, "")
            for prompt, c in zip(prompts, completions, strict=True)
        ]
        packed = build_batch([TrainExample(rollout) for rollout in rollouts]).student
        with torch.no_grad(), autocast(trained):
            states = hidden_states(trained, packed, attention="padded")
            head = lm_head_weight(trained)
            found = logprob_differences(states, head, rollouts, params)
        return mismatch_metrics([[d for part in found for d in part.tolist()]])[
            "rollout_logprob_diff"
        ]

    before = difference(gather_weights(trained))
    assert 0 < before < 0.05
    assert abs(difference(as_sent) - before) < 1e-3
    # What a sampler without the adapters would show.
    without = {name: torch.zeros_like(tensor) for name, tensor in as_sent.items()}
    assert difference(without) > 10 * before


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target_modules": ["q_proj"], "use_dora": True}, "have use_dora = true, which vLLM"),
        ({"target_modules": ["embed_tokens"]}, "have adapters on the embeddings or the head"),
    ],
)
def test_adapters_that_vllm_does_not_load_are_refused_at_the_start(
    base: PreTrainedModel, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    with warnings.catch_warnings():
        # peft's advice on adapters on tied embeddings.
        warnings.simplefilter("ignore")
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    with pytest.raises(ValueError, match=r"--rollout\.engine builtin") as refused:
        WeightFiles(model, WORLD, str(tmp_path), per_node=True)
    assert said in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_an_exception_that_ends_the_process_leaves_nothing(tmp_path: Path, model_dir: Path) -> None:
    script = f"""
import torch
from paint_engine.config.sections import LoraSection, ModelSection
from paint_engine.distributed import World
from paint_engine.files.processes import start_of
from paint_engine.model.load import load_base
from paint_engine.model.lora import add_lora
from paint_engine.rollout.weights import files as weight_files
from paint_engine.rollout.weights.files import WeightFiles

device = torch.device("cpu")
model = load_base(ModelSection(name_or_path={str(model_dir)!r}), device)
model = add_lora(model, LoraSection(rank=4, alpha=8), seed=0)
files = WeightFiles(model, World(0, 1, 0, device), {str(tmp_path)!r}, per_node=True)
print(files.write(1).directory.is_dir())
raise RuntimeError("out of memory")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr
    assert "out of memory" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_goes_and_nothing_else(
    lora_model: PeftModel, tmp_path: Path
) -> None:
    mine = WeightFiles(lora_model, WORLD, str(tmp_path), per_node=True)
    machine = mine.write(1).directory.parent.name.split("-")[3]
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    dead = f"paint-{process.pid}-s4711"
    # Of a process that is gone, and of one whose id this process has got since.
    orphans = [f"{dead}-{machine}-00c0ffee", f"paint-{os.getpid()}-s4711-{machine}-00c0ffee"]
    kept = [
        # Of a process that lives: this one, and init.
        f"paint-{os.getpid()}-s{start_of(os.getpid())}-{machine}-00c0ffee",
        f"paint-1-s{start_of(1)}-{machine}-00c0ffee",
        # Of another machine, container or boot; and whatever is not ours.
        f"{dead}-{'0' * 8}-00c0ffee",
        f"{dead}-{machine}-00c0ffee.bak",
        f"{dead}-notes",
        "paint-runs",
    ]
    for name in [*orphans, *kept]:
        (tmp_path / name / "3").mkdir(parents=True)
        (tmp_path / name / "3" / "adapter_model.safetensors").write_bytes(b"weights")
    other = WeightFiles(lora_model, WORLD, str(tmp_path), per_node=True)
    other.close()
    assert not any((tmp_path / name).exists() for name in orphans)
    assert all((tmp_path / name / "3" / "adapter_model.safetensors").exists() for name in kept)
    assert mine.write(2).directory.exists()
    mine.close()


def modes(directory: Path) -> set[str]:
    return {oct(stat.S_IMODE(path.stat().st_mode)) for path in (directory, *directory.iterdir())}


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_whoever_may_read_the_named_directory_may_read_the_weights(
    umask: int, lora_model: PeftModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a server under another user must; in shared memory nobody else may."""
    expected = {
        0o755: {"0o755", "0o644"},
        0o750: {"0o750", "0o640"},
        0o711: {"0o700", "0o600"},
        0o700: {"0o700", "0o600"},
    }
    before = os.umask(umask)
    try:
        for mode, found in expected.items():
            tmp_path.chmod(mode)
            files = WeightFiles(lora_model, WORLD, str(tmp_path), per_node=True)
            assert modes(files.write(1).directory) == found, oct(mode)
            files.close()
        tmp_path.chmod(0o1777)
        monkeypatch.setattr(weight_files, "_SHARED_MEMORY", tmp_path)
        files = WeightFiles(lora_model, WORLD, None, per_node=True)
        written = files.write(1).directory
        assert modes(written) == {"0o700", "0o600"}
        assert modes(written.parent) == {"0o700"}
        files.close()
    finally:
        os.umask(before)


def test_a_link_with_the_name_of_a_left_over_is_not_followed(
    lora_model: PeftModel, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("kept")
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    name = f"paint-{process.pid}-s4711-{weight_files._machine_digits()}-{8 * '0'}"
    (tmp_path / name).symlink_to(outside)
    WeightFiles(lora_model, WORLD, str(tmp_path), per_node=True).close()
    assert [path.name for path in tmp_path.iterdir()] == ["outside"]
    assert (outside / "file").read_text() == "kept"
