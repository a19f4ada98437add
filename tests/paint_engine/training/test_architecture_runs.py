"""Whole runs of other architectures by their commands: planned, trained, evaluated, exported."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from paint_engine import export


@pytest.mark.parametrize("name", ["Qwen3_5Text", "Qwen3Moe", "Phi3", "Gemma3", "Bamba"])
def test_a_run_of_the_architecture(
    name: str,
    small_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    command: list[str],
    run_main: Callable[[Sequence[str]], int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory, exported = tmp_path / "base", tmp_path / "exported"
    base = small_model(name)
    base.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    argv = [*command, "--model.name_or_path", str(directory), "--train.num_steps", "2"]
    assert run_main([*argv, "--dry-run"]) == 0
    planned = capsys.readouterr().out
    assert run_main(argv) == 0
    export.main([str(tmp_path / "run"), str(exported)])
    checkpoint = tmp_path / "run" / "checkpoints" / "step-2"
    adapted = PeftModel.from_pretrained(base, str(checkpoint)).eval()
    total = sum(p.numel() for p in adapted.parameters())
    assert f"# {total:,} parameters" in planned
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
        logits = AutoModelForCausalLM.from_pretrained(exported)(input_ids=ids).logits
        assert torch.allclose(logits, expected, atol=1e-5)
        with adapted.disable_adapter():
            assert not torch.allclose(adapted(input_ids=ids).logits, expected, atol=1e-4)


def test_a_plan_refuses_to_pack_recurrent_layers(
    small_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    command: list[str],
    run_main: Callable[[Sequence[str]], int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory = tmp_path / "base"
    small_model("Qwen3_5Text").save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    argv = [*command, "--model.name_or_path", str(directory), "--model.attention", "packed"]
    for run in ([*argv, "--dry-run"], argv):
        assert run_main(run) == 2
        assert "mix packed sequences; use --model.attention padded" in capsys.readouterr().out
