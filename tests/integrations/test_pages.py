"""The code blocks of docs/integrations.md, and the README's on trainers, run as they stand."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from trl.trainer.distillation_config import DistillationConfig

from paint_engine.config.bundled import TINY_BASE

ROOT = Path(__file__).parents[2]
INTEGRATION = re.compile(r"from paint_engine\.integrations\.(\w+) import")
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)

pytestmark = [
    # Raised at the module's first import, which is why that waits for the test.
    pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental':UserWarning"),
    pytest.mark.filterwarnings(
        r"ignore:`(is_)?gradient_checkpointing(_enable|_disable)?` is deprecated:FutureWarning"
    ),
]


def sections() -> list[Any]:
    """(integration, blocks) of each section of the page that has python blocks, and the README's
    blocks on integrations."""
    found = []
    for section in re.split(r"^## ", (ROOT / "docs" / "integrations.md").read_text(), flags=re.M):
        if blocks := BLOCK.findall(section):
            name = INTEGRATION.search(blocks[0])
            assert name is not None, f"which integration is this?\n{blocks[0]}"
            found.append(pytest.param(name[1], blocks, id=f"page-{name[1]}"))
    for block in BLOCK.findall((ROOT / "README.md").read_text()):
        if name := INTEGRATION.search(block):
            found.append(pytest.param(name[1], [block], id=f"readme-{name[1]}"))
    return found


def trainer_settings(tmp_path: Path) -> dict[str, Any]:
    return {
        "output_dir": str(tmp_path),
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    batch = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    for name in ("input_ids", "teacher_input_ids"):
        batch[name.replace("input_ids", "attention_mask")] = torch.ones_like(batch[name])
    return batch


def names_for_trainer(tmp_path: Path) -> dict[str, Any]:
    row = {
        "input_ids": [5, 6, 17, 30, 2],
        "labels": [-100, -100, 17, 30, 2],
        "teacher_input_ids": [5, 6, 8, 9, 17, 30, 2],
        "teacher_labels": [-100, -100, -100, -100, 17, 30, 2],
    }
    args = TrainingArguments(**trainer_settings(tmp_path), remove_unused_columns=False)
    return {"args": args, "dataset": [row] * 2, "collate": collate}


def names_for_trl(tmp_path: Path) -> dict[str, Any]:
    args = DistillationConfig(**trainer_settings(tmp_path), max_completion_length=8)
    return {"args": args, "dataset": Dataset.from_list([{"prompt": "Tom has 3 apples."}] * 2)}


def names_for_gkd(tmp_path: Path) -> dict[str, Any]:
    from trl.experimental.gkd import GKDConfig

    messages = [
        {"role": "user", "content": "Tom has 3 apples."},
        {"role": "assistant", "content": "The answer is 3."},
    ]
    args = GKDConfig(**trainer_settings(tmp_path), max_length=64, max_new_tokens=8)
    return {"args": args, "dataset": Dataset.from_list([{"messages": messages}] * 2)}


def names_for_packed(tmp_path: Path) -> dict[str, Any]:
    """Two responses of 3 and 2 tokens, after prompts of 2 and 1 tokens, of 4 and 3."""
    names: dict[str, Any] = {"num_rollouts": 2}
    for side, prompts in [("student", (2, 1)), ("teacher", (4, 3))]:
        mask = [0] * prompts[0] + [1] * 3 + [0] * prompts[1] + [1] * 2
        names[f"{side}_cu_seqlens"] = torch.tensor([0, prompts[0] + 3, len(mask)])
        names[f"{side}_response_mask"] = torch.tensor(mask).bool()
        names[f"{side}_hidden_states"] = torch.randn(
            len(mask), 128, requires_grad=side == "student"
        )
    return names


NAMES = {
    "trainer": names_for_trainer,
    "trl": names_for_trl,
    "gkd": names_for_gkd,
    "packed": names_for_packed,
    "heads": lambda tmp_path: {},
}


def test_every_integration_is_shown() -> None:
    shown = {section.values[0] for section in sections() if str(section.id).startswith("page")}
    assert shown == set(NAMES)


def test_the_readme_shows_an_integration() -> None:
    assert any(str(section.id).startswith("readme") for section in sections())


@pytest.mark.parametrize(("integration", "blocks"), sections())
def test_the_blocks_run(
    integration: str, blocks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)
    model, teacher = (AutoModelForCausalLM.from_pretrained(TINY_BASE) for _ in range(2))
    with torch.no_grad():
        teacher.lm_head.weight += 0.02 * torch.randn_like(teacher.lm_head.weight)
    tokenizer = AutoTokenizer.from_pretrained(TINY_BASE, padding_side="left")
    names = {"model": model, "teacher": teacher, "tokenizer": tokenizer}
    names |= NAMES[integration](tmp_path)
    for block in blocks:
        exec(compile(block, f"{integration} block", "exec"), names)
    result = SimpleNamespace(**names)
    if integration == "packed":
        assert result.output.loss != 0
        assert result.student_hidden_states.grad.abs().sum() > 0
    elif integration == "heads":
        assert result.weight is model.lm_head.weight
    else:
        assert result.trainer.state.global_step == 1
        assert result.trainer.state.log_history[-1]["train_loss"] != 0
