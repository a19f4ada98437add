"""paint_kernels needs PyTorch and nothing else, so that any trainer can import it."""

import subprocess
import sys

PROGRAM = """
import sys

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {others!r}:
            raise ImportError(name)

sys.meta_path.insert(0, Refused())
import torch
from paint_kernels import paint_loss, token_logprobs
hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4)
paint_loss(hidden, hidden.detach() + 1, weight, torch.tensor([0, 5])).loss.backward()
token_logprobs(hidden, weight, torch.arange(5)).logprobs.sum().backward()
print("done")
"""
OTHERS = ["jaxtyping", "transformers", "peft", "pydantic", "datasets", "rich", "safetensors"]


def test_only_torch_is_imported():
    program = PROGRAM.format(others=set(OTHERS))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "done", done.stderr
