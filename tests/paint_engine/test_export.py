"""Export: the merged model computes what base and adapter computed, rounded once; nothing half
written; mistakes told in one message."""

import json
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from exit_codes import exit_code
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

import paint_engine.checkpoint
from paint_engine import export
from paint_engine.checkpoint import choose
from paint_engine.checkpoint.choose import choose_checkpoint, find_base
from paint_engine.checkpoint.directory import mark_best
from paint_engine.checkpoint.exported import add_older_names
from paint_engine.checkpoint.save import save_checkpoint
from paint_engine.config.sections import LoraSection, ModelSection
from paint_engine.distributed import World
from paint_engine.files import remove_at_once
from paint_engine.model.load import load_base
from paint_engine.model.lora import add_lora

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, CPU)
IDS = torch.arange(3, 40)[None]


def make_run(
    run_dir: Path, base_dir: Path, *, lora: bool = True, size: float = 0.1, step: int = 1
) -> nn.Module:
    """A run directory with one checkpoint of a model whose update has entries of that size."""
    base = load_base(ModelSection(name_or_path=str(base_dir), dtype="float32"), CPU)
    model = add_lora(base, LoraSection(enabled=lora, rank=4, alpha=8), seed=0)
    generator = torch.Generator().manual_seed(step)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            parameter.data += size * torch.randn(parameter.shape, generator=generator)
    run_dir.mkdir(exist_ok=True)
    (run_dir / "config.toml").write_text(f"[model]\nname_or_path = {json.dumps(str(base_dir))}\n")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    save_checkpoint(run_dir, model, optimizer, {"step": step}, keep=9, world=ALONE)
    return model


run_export = partial(exit_code, export.main)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


@torch.no_grad()
def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """W + scaling * B A in float64 by the formula, under the base's names."""
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    merged = {}
    for name, weight in state.items():
        if name.endswith("base_layer.weight"):
            a = state[name.replace("base_layer", "lora_A.default")]
            b = state[name.replace("base_layer", "lora_B.default")]
            name, weight = name.replace("base_layer.", ""), weight + 8 / 4 * b @ a
        if "lora_" not in name:
            merged[name.removeprefix("base_model.model.")] = weight
    return merged


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_exported_model_computes_what_was_trained(
    tied: bool, lora: bool, model_dir: Path, untied_model_dir: Path, tmp_path: Path
) -> None:
    base_dir = model_dir if tied else untied_model_dir
    model = make_run(tmp_path / "run", base_dir, lora=lora)
    assert run_export(tmp_path / "run", tmp_path / "out") == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert exported.dtype == torch.float32
    torch.testing.assert_close(logits(exported), logits(model), rtol=0, atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(base_dir)
    assert (logits(exported) - logits(base)).abs().max() > 0.1
    head, embeddings = exported.get_output_embeddings(), exported.get_input_embeddings()
    assert head is not None and embeddings is not None
    assert (head.weight is embeddings.weight) == tied
    stored = load_file(tmp_path / "out/model.safetensors")
    assert ("lm_head.weight" in stored) != tied
    assert not any("lora" in name for name in stored)


def test_the_tokenizer_with_its_template_and_the_stop_tokens_come_along(
    model_dir: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    make_run(tmp_path / "run", model_dir)
    assert run_export(tmp_path / "run", tmp_path / "out") == 0
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": "How many kites?"}]
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.apply_chat_template(messages) == tokenizer.apply_chat_template(messages)
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.eos_token_id
    assert not list(tmp_path.glob(".*"))


def test_settings_that_transformers_refuses_to_save_come_along(
    model_dir: Path, tmp_path: Path
) -> None:
    """As some published models have them."""
    base_dir = shutil.copytree(model_dir, tmp_path / "base")
    file = base_dir / "generation_config.json"
    changed = json.loads(file.read_text()) | {"temperature": 0.6, "do_sample": False}
    file.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="Fix these issues"):
        GenerationConfig.from_dict(changed).save_pretrained(tmp_path / "refused")
    make_run(tmp_path / "run", base_dir)
    assert run_export(tmp_path / "run", tmp_path / "out") == 0
    written = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert (written["temperature"], written["eos_token_id"]) == (0.6, changed["eos_token_id"])


def test_both_releases_of_transformers_find_their_names(model_dir: Path, tmp_path: Path) -> None:
    """`make test-transformers4` has the readers themselves."""
    make_run(tmp_path / "run", model_dir)
    assert run_export(tmp_path / "run", tmp_path / "out") == 0
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000
    assert config["torch_dtype"] == config["dtype"] == "float32"
    settings = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]


def test_scaled_rotary_embeddings_have_both_names() -> None:
    full = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    sliding = {"rope_type": "default", "rope_theta": 1e4}
    nested = {"sliding_attention": sliding, "full_attention": full}
    text = {"model_type": "gemma3_text", "rope_parameters": nested}
    older = {
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    assert add_older_names(text) == text | older
    whole = {"model_type": "gemma3", "text_config": text}
    assert add_older_names(whole) == whole | {"text_config": text | older}
    experts = {"model_type": "qwen3_moe", "num_local_experts": 4}
    assert add_older_names(experts) == experts | {"num_experts": 4}


def to_bfloat16(base_dir: Path, directory: Path) -> Path:
    """The same model, stored in bfloat16."""
    shutil.copytree(base_dir, directory)
    AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.bfloat16).save_pretrained(directory)
    return directory


def test_a_bfloat16_export_is_the_exact_sum_rounded_once(model_dir: Path, tmp_path: Path) -> None:
    base_dir = to_bfloat16(model_dir, tmp_path / "base")
    model = make_run(tmp_path / "run", base_dir)
    assert run_export(tmp_path / "run", tmp_path / "out", "--dtype", "bfloat16") == 0
    stored = load_file(tmp_path / "out/model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    exact = merged_weights(model)
    for name, tensor in stored.items():
        # Half of bfloat16's spacing, 2^-8 relative, and float32's own rounding before it.
        error = (tensor.double() - exact[name]).abs()
        assert (error <= exact[name].abs() * 2**-8 * (1 + 1e-4) + 1e-6).all(), name


def test_the_default_keeps_an_update_that_a_sum_in_bfloat16_loses(
    model_dir: Path, tmp_path: Path
) -> None:
    base_dir = to_bfloat16(model_dir, tmp_path / "base")
    # Some twenty steps at a learning rate of 5e-6.
    model = make_run(tmp_path / "run", base_dir, size=1e-4)
    assert run_export(tmp_path / "run", tmp_path / "out") == 0
    stored = load_file(tmp_path / "out/model.safetensors")
    base, exact = load_file(base_dir / "model.safetensors"), merged_weights(model)
    lost, kept = [], []
    for name in stored:
        delta = exact[name] - base[name].double()
        if not delta.any():
            continue
        in_bfloat16 = base[name] + delta.to(torch.bfloat16)
        lost.append((in_bfloat16.double() - exact[name]).norm() / delta.norm())
        kept.append((stored[name].double() - exact[name]).norm() / delta.norm())
    assert len(kept) == 14
    assert max(kept) < 1e-3
    assert min(lost) > 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_fine_tuning_is_exported_and_its_update_counted(
    dtype: torch.dtype, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base_dir = to_bfloat16(model_dir, tmp_path / "base")
    model = make_run(tmp_path / "run", base_dir, lora=False, size=1e-4)
    named = [] if dtype == torch.float32 else ["--dtype", "bfloat16"]
    assert run_export(tmp_path / "run", tmp_path / "out", *named) == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    expected = dict(model.named_parameters())
    for name, parameter in exported.named_parameters():
        assert torch.equal(parameter, expected[name].to(dtype)), name
    printed = capsys.readouterr().out
    share, num_updated, num_tensors, error = survival(printed, dtype)
    assert num_tensors == len(expected) and num_updated <= sum(map(torch.numel, expected.values()))
    assert (share == 100, error < 1e-6) == (dtype == torch.float32,) * 2


def survival(printed: str, dtype: torch.dtype) -> tuple[float, int, int, float]:
    """What the command says of a dtype: share in percent, updated weights, tensors, error."""
    found = re.search(
        rf"^{str(dtype)[6:]}: ([\d.]+)% of ([\d,]+) updated weights in (\d+) tensors differ from "
        r"the base; relative error of the update ([\d.e+-]+)",
        printed,
        re.MULTILINE,
    )
    assert found is not None, printed
    return float(found[1]), int(found[2].replace(",", "")), int(found[3]), float(found[4])


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_the_printed_loss_of_an_update_is_the_loss(
    stored: torch.dtype, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the formula, from the files; of a run too short for bfloat16."""
    base_dir = model_dir
    if stored == torch.bfloat16:
        base_dir = to_bfloat16(model_dir, tmp_path / "base")
    model = make_run(tmp_path / "run", base_dir, size=1e-4)
    assert run_export(tmp_path / "run", tmp_path / "out") == 0
    kept = survival(printed := capsys.readouterr().out, torch.float32)
    lost = survival(printed, torch.bfloat16)
    assert run_export(tmp_path / "run", tmp_path / "short", "--dtype", "bfloat16") == 0
    assert survival(capsys.readouterr().out, torch.bfloat16) == lost
    base, exact = load_file(base_dir / "model.safetensors"), merged_weights(model)
    for directory, (share, num_updated, num_tensors, error) in (("out", kept), ("short", lost)):
        left, update = [], []
        for name, tensor in load_file(tmp_path / directory / "model.safetensors").items():
            if (delta := exact[name] - base[name].double()).any():
                old = base[name].to(tensor.dtype)
                left.append((tensor.double() - old.double()).flatten())
                update.append(delta.flatten())
        assert num_tensors == len(update) == 14
        left, update = torch.cat(left), torch.cat(update)
        assert num_updated == int((update != 0).sum())
        changed = ((left != 0) & (update != 0)).sum() / num_updated
        assert share == pytest.approx(100 * float(changed), abs=0.06)
        assert error == pytest.approx(float((left - update).norm() / update.norm()), rel=0.06)
    assert kept[0] == 100 and kept[3] < 1e-3
    assert lost[0] < 60 and lost[3] > 0.3


def test_without_an_update_nothing_is_said_to_be_lost(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "run", model_dir, size=0.0)
    assert run_export(tmp_path / "run", tmp_path / "out") == 0
    assert "float32: no weight was updated" in capsys.readouterr().out


def test_the_adapter_is_exported_as_it_is_with_the_command_that_serves_it(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "run", model_dir)
    moved = shutil.copytree(model_dir, tmp_path / "moved")
    arguments = (tmp_path / "run", tmp_path / "out", "--form", "adapter", "--model", moved)
    assert run_export(*arguments) == 0
    printed = capsys.readouterr().out
    command = f"vllm serve {moved} --enable-lora --max-lora-rank 8 --host 127.0.0.1 --lora-modules"
    key = 'VLLM_API_KEY="${VLLM_API_KEY:?}"'
    assert f"\n{key} {command} out={tmp_path / 'out'}\n" in printed
    written = tmp_path / "run/checkpoints/step-1/adapter_model.safetensors"
    assert (tmp_path / "out/adapter_model.safetensors").read_bytes() == written.read_bytes()
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert run_export(tmp_path / "run", tmp_path / "merged") == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=0, atol=1e-5)


def test_the_run_or_one_of_its_checkpoints_is_exported(model_dir: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    for step in (1, 2, 3):
        make_run(run_dir, model_dir, step=step)
    mark_best(run_dir, 2)
    directory = run_dir / "checkpoints"
    assert choose_checkpoint(run_dir, None).name == "step-3"
    assert choose_checkpoint(run_dir, "last").name == "step-3"
    assert choose_checkpoint(run_dir, "best").name == "step-2"
    assert choose_checkpoint(run_dir, "step-1").name == "step-1"
    assert choose_checkpoint(directory / "step-1", None).name == "step-1"
    assert choose_checkpoint(directory / "best", None).name == "step-2"
    assert find_base(directory / "step-1", None).name_or_path == str(model_dir)
    assert find_base(directory / "step-1", "elsewhere").name_or_path == "elsewhere"
    # An adapter that was taken out of its run says itself what it belongs to.
    alone = shutil.copytree(directory / "step-1", tmp_path / "alone")
    assert find_base(alone, None).name_or_path == str(model_dir)
    assert run_export(alone, tmp_path / "out") == 0


def test_mistakes_end_with_one_message(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, full_dir, taken = tmp_path / "run", tmp_path / "full", tmp_path / "taken"
    make_run(run_dir, model_dir)
    make_run(full_dir, model_dir, lora=False)
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    alone = shutil.copytree(full_dir / "checkpoints/step-1", tmp_path / "alone")
    damaged = shutil.copytree(run_dir, tmp_path / "damaged")
    (damaged / "checkpoints/step-1/adapter_model.safetensors").write_bytes(b"")
    out = tmp_path / "out"
    cases = [
        ((run_dir, taken), "taken exists already"),
        ((tmp_path / "nowhere", out), "nowhere: no such directory"),
        ((alone.parent, out), "has no checkpoint to choose from"),
        (
            (run_dir, out, "--checkpoint", "step-9"),
            "has no step-9; it has step-1; give one of these, last",
        ),
        (
            (run_dir, out, "--checkpoint", "best"),
            "has no best; it has step-1; give one of these, last",
        ),
        ((damaged, out), "adapter_model.safetensors is not what was written"),
        ((alone, out), "give that with --model"),
        ((run_dir, out, "--model", taken), "has no config.json"),
        ((full_dir, out, "--form", "adapter"), "has all weights of a model and no adapter"),
        ((run_dir, out, "--form", "adapter", "--dtype", "float32"), "leave one of the two out"),
    ]
    for arguments, message in cases:
        assert run_export(*arguments) == 2, message
        printed = capsys.readouterr().out
        assert printed.startswith("error: ") and message in printed, printed
        assert not out.exists()
    assert [path.name for path in taken.iterdir()] == ["notes.txt"]
    out.mkdir()
    assert run_export(run_dir, out) == 0


def test_a_full_disk_leaves_nothing_half_written(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "run", model_dir)
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        assert run_export(tmp_path / "run", disk / "out") == 1
        assert "could not be written" in capsys.readouterr().out
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("form", ["merged", "adapter"])
@pytest.mark.parametrize("place", ["find_damage", "find_base"])
def test_a_checkpoint_that_its_run_removes_meanwhile_is_one_message(
    place: str,
    form: str,
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_run(tmp_path / "run", model_dir)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-1"
    home = choose if place == "find_damage" else paint_engine.checkpoint
    original = getattr(home, place)

    def remove_first(*arguments: object, **options: object) -> object:
        result = None if place == "find_damage" else original(*arguments, **options)
        remove_at_once(checkpoint)
        return result if place == "find_base" else original(*arguments, **options)

    monkeypatch.setattr(home, place, remove_first)
    assert run_export(tmp_path / "run", tmp_path / "out", "--form", form) == 2
    printed = capsys.readouterr().out
    assert f"error: {checkpoint} was removed while it was read: its run keeps the" in printed
    assert not (tmp_path / "out").exists()
