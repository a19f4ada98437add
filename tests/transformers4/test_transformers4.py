"""Exports read by the real transformers 4.57, in an environment of its own that `make
test-transformers4` builds: the same logits as by release 5, and the same token ids."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
)

from paint_engine import export
from paint_engine.config.bundled import TINY_BASE

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-transformers4/bin/python"
TEXT = "How many kites are there?\n\n2 + 40 = ?"

pytestmark = pytest.mark.skipif(
    not PYTHON.is_file(), reason="make test-transformers4 builds the environment with 4.57"
)

BASE = json.loads((TINY_BASE / "config.json").read_text())
SHAPE = {
    "vocab_size": 768,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": BASE["eos_token_id"],
    "pad_token_id": BASE["pad_token_id"],
}
# Where all linear layers are not what peft adapts.
TARGETS: dict[str, dict[str, Any]] = {
    "moe": {
        "target_modules": ["q_proj", "o_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
    "falcon_h1": {"target_modules": ["q_proj", "up_proj"]},
}
FACTORS = [1 + 0.25 * i for i in range(8)]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
LONG = {"rope_type": "longrope", "short_factor": FACTORS, "long_factor": FACTORS[::-1]}
MODELS = {
    "llama": {"model_type": "llama", "rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
    "linear": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 123456.0},
    },
    "yarn": {
        "model_type": "qwen3",
        "head_dim": 16,
        "rope_parameters": YARN | {"rope_theta": 1e6},
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 16,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e5},
        },
    },
    "gemma2": {"model_type": "gemma2", "head_dim": 16, "sliding_window": 16},
    "phi3": {
        "model_type": "phi3",
        "original_max_position_embeddings": 512,
        "rope_parameters": LONG | {"rope_theta": 3e4},
    },
    "partial": {
        "model_type": "glm4",
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 7e4,
            "partial_rotary_factor": 0.5,
        },
    },
    "qwen2": {"model_type": "qwen2", "rope_parameters": {"rope_theta": 1e6}},
    "mistral": {"model_type": "mistral", "head_dim": 16, "rope_parameters": {"rope_theta": 1e5}},
    "moe": {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "rope_parameters": {"rope_theta": 1e6},
    },
    "granite": {"model_type": "granite", "rope_parameters": {"rope_theta": 2e4}},
    "cohere2": {
        "model_type": "cohere2",
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 16,
        "rope_parameters": {"rope_theta": 2e4},
    },
    "falcon_h1": {
        "model_type": "falcon_h1",
        "head_dim": 16,
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 16,
        "lm_head_multiplier": 0.5,
        "rope_parameters": {"rope_theta": 2e4},
    },
}


def save_base(directory: Path, settings: dict[str, object]) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**(SHAPE | settings))
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    AutoTokenizer.from_pretrained(TINY_BASE).save_pretrained(directory)


def export_trained(base: Path, root: Path) -> Tensor:
    """Exports an adapter with an update that moves the logits. Returns them, adapter on."""
    torch.manual_seed(1)
    model = load(base)
    targets = TARGETS.get(base.name, {"target_modules": "all-linear"})
    config = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **targets)
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.05 * torch.randn(parameter.shape)
    adapter = root.parent / "adapters" / base.name
    adapted.save_pretrained(adapter, save_embedding_layers=False)
    export.main([str(adapter), str(root / base.name)])
    return logits(nn.Module.to(adapted, torch.float64))


def load(directory: Path) -> PreTrainedModel:
    """In float64, so that two ways of computing one thing agree to the weights' own rounding."""
    return AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float64,
        attn_implementation="eager",
        experts_implementation="eager",
    )


@torch.no_grad()
def logits(model: PreTrainedModel | PeftModel) -> Tensor:
    return model.eval()(input_ids=torch.arange(3, 303)[None]).logits


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """The directory of the exports, each read by 4.57, and the logits of base and adapter."""
    place = tmp_path_factory.mktemp("transformers4")
    root = place / "exports"
    root.mkdir()
    for name, settings in MODELS.items():
        save_base(place / name, settings)
    shutil.copytree(TINY_BASE, place / "tiny")
    expected = {name: export_trained(place / name, root) for name in ("tiny", *MODELS)}
    script = Path(__file__).with_name("read_models.py")
    command = [str(PYTHON), str(script), str(root), TEXT]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return root, expected


@pytest.mark.parametrize("name", ["tiny", *MODELS])
def test_both_releases_read_the_same_model(
    name: str, exported: tuple[Path, dict[str, Tensor]]
) -> None:
    directory, expected = exported[0] / name, exported[1][name]
    old = load_file(directory / "read-by-4.57.safetensors")
    new = logits(load(directory))
    assert (expected - logits(load(directory.parents[1] / name))).abs().max() > 0.01
    torch.testing.assert_close(new, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(old["logits"], new, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["tiny", *MODELS])
def test_both_releases_read_the_same_tokenizer(
    name: str, exported: tuple[Path, dict[str, Tensor]]
) -> None:
    directory = exported[0] / name
    old = load_file(directory / "read-by-4.57.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert old["text"].tolist() == tokenizer(TEXT)["input_ids"]
    message = [{"role": "user", "content": TEXT}]
    chat = tokenizer.apply_chat_template(message, add_generation_prompt=True)["input_ids"]
    assert old["chat"].tolist() == chat
    assert old["stops"].tolist() == [BASE["eos_token_id"]] * 2
