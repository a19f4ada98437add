"""Trains small random models of twelve architectures for two steps each.

Each model is saved with the bundled tokenizer and trained by the command
`python -m paint_engine.train`, with adapters on all linear layers. The result says which of them
train, and how far our logits with the trained adapter are from those of the model's own forward;
or why the command refuses the model. The last line of stdout is JSON.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from transformers import AutoModelForCausalLM

from paint_engine.config.bundled import TINY_BASE
from paint_engine.config.sections import ModelSection
from paint_engine.files import write_json
from paint_engine.model import load_base, load_tokenizer
from paint_engine.model.forward import LOGIT_SCALE
from paint_engine.model.probe import forward_error

_NUM_STEPS = 2
_BASE = json.loads((TINY_BASE / "config.json").read_text())
_SHAPE: dict[str, Any] = {
    "vocab_size": 768,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": _BASE["eos_token_id"],
    "pad_token_id": _BASE["pad_token_id"],
}
_HEAD = {"head_dim": 16}
# The configuration class, and what the architecture needs beside the shape. Where published models
# scale or cap their logits, so do these.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2": ("Qwen2Config", {}),
    "Qwen3": ("Qwen3Config", _HEAD),
    "Qwen3-MoE": (
        "Qwen3MoeConfig",
        _HEAD | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "Qwen3.5": (
        "Qwen3_5TextConfig",
        _HEAD
        | {"num_hidden_layers": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
        | {"linear_num_key_heads": 2, "linear_num_value_heads": 4},
    ),
    "Llama": ("LlamaConfig", {}),
    "Mistral": ("MistralConfig", {}),
    "Gemma 2": ("Gemma2Config", _HEAD | {"final_logit_softcapping": 30.0}),
    "Gemma 3": ("Gemma3TextConfig", _HEAD),
    "Phi-3": ("Phi3Config", {}),
    "Granite": ("GraniteConfig", {"logits_scaling": 8.0}),
    "Cohere 2": ("Cohere2Config", {"logit_scale": 0.0625}),
    "Falcon-H1": (
        "FalconH1Config",
        _HEAD
        | {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16}
        | {"mamba_n_groups": 1, "mamba_chunk_size": 16, "lm_head_multiplier": 0.0130208},
    ),
}


def build_model(name: str, directory: Path) -> None:
    """Saves a random model of the architecture with the bundled tokenizer."""
    config_class, own = ARCHITECTURES[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**(_SHAPE | own))
    AutoModelForCausalLM.from_config(config).save_pretrained(str(directory))
    load_tokenizer(ModelSection(name_or_path="tiny")).save_pretrained(str(directory))


def try_architecture(name: str, parent: Path) -> dict[str, Any]:
    """Trains one model and returns what came of it."""
    directory, run_dir = parent / "model", parent / "run"
    build_model(name, directory)
    options = {
        "model.name_or_path": directory,
        "model.dtype": "float32",
        "lora.target_modules": "all-linear",
        "train.num_steps": _NUM_STEPS,
        "train.batch_size": 4,
        "rollout.max_new_tokens": 32,
        "rollout.engine": "builtin",
        "eval.enabled": "false",
        "run.dir": run_dir,
    }
    command = [sys.executable, "-m", "paint_engine.train"]
    for key, value in options.items():
        command += [f"--{key}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = {"name": name, "trains": done.returncode == 0}
    if done.returncode != 0:
        said = " ".join((done.stdout + done.stderr).split()).replace(str(directory), name)
        return found | {"reason": said.rpartition("error: ")[2]}
    base = load_base(
        ModelSection(name_or_path=str(directory), dtype="float32"), torch.device("cpu")
    )
    adapter = run_dir / "checkpoints" / f"step-{_NUM_STEPS}"
    model = peft.PeftModel.from_pretrained(base, str(adapter)).eval()
    losses = [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").open()]
    return found | {
        "class": type(base).__name__,
        "logit_scale": getattr(base, LOGIT_SCALE),
        "losses": losses,
        "logit_error": forward_error(model, "padded"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.architectures", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--names", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args()
    outcomes = []
    for name in arguments.names:
        with tempfile.TemporaryDirectory() as parent:
            outcomes.append(try_architecture(name, Path(parent)))
        print(json.dumps(outcomes[-1]), file=sys.stderr)
    result = {
        "name": "architectures",
        "command": "python -m bench.architectures",
        "num_steps": _NUM_STEPS,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
        "outcomes": outcomes,
    }
    if arguments.output:
        write_json(arguments.output, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
