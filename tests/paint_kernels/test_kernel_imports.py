"""paint_kernels needs PyTorch alone, and Triton on a GPU, so that any trainer can import it."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import paint_kernels

PACKAGE = Path(paint_kernels.__file__).parent
ALLOWED = {"paint_kernels", "torch", "triton"} | set(sys.stdlib_module_names)
PROGRAM = """
import sys
import torch
from paint_kernels import (
    PaintLoss, paint_loss, paint_loss_from_logits, paint_loss_from_topk, reference, token_logprobs,
    token_stats
)
hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
inputs = (hidden, hidden.detach() + 1, weight, torch.tensor([0, 5]))
for loss in (paint_loss, PaintLoss(reduction="none"), reference.paint_loss):
    loss(*inputs).loss.sum().backward()
logits = torch.randn(5, 9, requires_grad=True)
paint_loss_from_logits(logits, torch.randn(5, 9), inputs[3]).loss.backward()
ids, logprobs = torch.tensor([[1, -1]] * 5), torch.full((5, 2), -1.0)
paint_loss_from_topk(hidden, weight, ids, logprobs, inputs[3]).loss.backward()
token_logprobs(hidden, weight, torch.arange(5)).logprobs.sum().backward()
token_stats(hidden, weight)
print(sorted({"triton", "jaxtyping", "numpy"} & sys.modules.keys()), hidden.grad.isfinite().all())
"""


def imported(tree: ast.AST) -> set[str]:
    """Top-level packages that a module imports when it runs, at its top or later."""
    if isinstance(tree, ast.If) and ast.unparse(tree.test) == "TYPE_CHECKING":
        return set()
    if isinstance(tree, ast.Import):
        return {alias.name.split(".")[0] for alias in tree.names}
    if isinstance(tree, ast.ImportFrom):
        assert tree.level == 0 and tree.module is not None
        return {tree.module.split(".")[0]}
    return {name for child in ast.iter_child_nodes(tree) for name in imported(child)}


@pytest.mark.parametrize("file", sorted(PACKAGE.glob("*.py")), ids=lambda file: file.stem)
def test_a_module_imports_torch_and_triton_alone(file):
    assert imported(ast.parse(file.read_text())) <= ALLOWED


def normalised(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def needed_by(distribution: str) -> set[str]:
    """It, and what it always requires, as far as that is installed; normalised names."""
    installed = {normalised(found.name) for found in metadata.distributions()}
    found, waiting = set(), [distribution]
    while waiting:
        name = waiting.pop()
        if name in installed - found:
            found.add(name)
            required = [line for line in metadata.requires(name) or [] if "extra ==" not in line]
            waiting += [normalised(re.split(r"[^\w.-]", line)[0]) for line in required]
    return found - {"triton"}


def test_the_losses_run_with_torch_alone(tmp_path):
    """On a path that holds paint_kernels, torch and what torch requires, without Triton."""
    kept = needed_by("torch")
    for package, distributions in metadata.packages_distributions().items():
        if kept & set(map(normalised, distributions)):
            spec = importlib.util.find_spec(package)
            if spec is not None:
                found = Path([*(spec.submodule_search_locations or ()), spec.origin][0])
                (tmp_path / found.name).symlink_to(found)
    (tmp_path / "paint_kernels").symlink_to(PACKAGE)
    done = subprocess.run(
        [sys.executable, "-S", "-c", PROGRAM],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "[] tensor(True)", done.stderr
