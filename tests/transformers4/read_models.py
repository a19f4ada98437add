"""Run by transformers 4.57: loads each exported model of a directory, and writes its logits and the
token ids of a text and of a chat. Not a test by itself."""

import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.no_grad()
def main(root: Path, text: str) -> None:
    assert transformers.__version__.startswith("4.57."), transformers.__version__
    for directory in sorted(root.iterdir()):
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float64, attn_implementation="eager"
        ).eval()
        tokenizer = AutoTokenizer.from_pretrained(directory)
        message = [{"role": "user", "content": text}]
        chat = tokenizer.apply_chat_template(message, add_generation_prompt=True)
        ids = torch.arange(3, 303)[None]
        found = {
            "logits": model(input_ids=ids).logits.contiguous(),
            # As for `model.generate(**inputs)`.
            "from_text": model(**tokenizer(text, return_tensors="pt")).logits.contiguous(),
            "text": torch.tensor(tokenizer(text)["input_ids"]),
            "chat": torch.tensor(chat),
            "stops": torch.tensor([tokenizer.eos_token_id, model.generation_config.eos_token_id]),
        }
        save_file(found, directory / "read-by-4.57.safetensors")


main(Path(sys.argv[1]), sys.argv[2])
