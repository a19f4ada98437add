"""Pretraining of the tiny base: what it reads, and that two runs give the same weights."""

import hashlib
import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM

from paint_engine.config import sections as config_sections
from paint_engine.prompts import masking
from paint_engine.rewards.boxes import extract_boxed
from paint_engine.tiny import pretrain


@pytest.fixture(autouse=True)
def small_and_restored(monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerBase):
    """Two short rows a step; the process-wide switch that pretraining sets is set back."""
    monkeypatch.setattr(pretrain, "BATCH_SIZE", 4)
    monkeypatch.setattr(pretrain, "MICROBATCH_SIZE", 2)
    monkeypatch.setattr(pretrain, "_train_tiny_tokenizer", lambda: tokenizer)
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


def _text(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...]) -> str:
    text = tokenizer.decode(list(ids))
    assert isinstance(text, str)
    return text


def _documents(tokenizer: PreTrainedTokenizerBase, count: int) -> list[tuple[str, str]]:
    rng = random.Random(1)
    drawn = [pretrain.draw_document(tokenizer, rng) for _ in range(count)]
    return [(_text(tokenizer, d.prompt_ids), _text(tokenizer, d.completion_ids)) for d in drawn]


def test_the_base_reads_the_prompts_that_it_is_used_with() -> None:
    assert pretrain.INSTRUCTION == config_sections.INSTRUCTION
    assert config_sections.MaskingSection().marker == masking.OMISSION_MARKER


def test_documents_come_in_their_shares(tokenizer: PreTrainedTokenizerBase) -> None:
    kinds: Counter[str] = Counter()
    for prompt, completion in _documents(tokenizer, 300):
        if not prompt:
            kinds["drill"] += 1
            assert completion.endswith("<|endoftext|>")
            assert "boxed" not in completion and "Problem" not in completion
            continue
        assert prompt.endswith("<think>\n\n</think>\n\n")
        assert completion.endswith("<|im_end|>")
        assert extract_boxed(completion) is not None
        if "Reference Solution" not in prompt:
            kinds["unaided"] += 1
        else:
            partial = masking.OMISSION_MARKER in prompt
            assert ("a part of reference solution" in prompt) == partial
            kinds["partial" if partial else "whole"] += 1
    # Four standard deviations of a share near a third.
    assert abs(kinds["unaided"] / 300 - pretrain.UNAIDED_SHARE) < 0.11
    assert abs(kinds["drill"] / 300 - pretrain.DRILL_SHARE) < 0.11
    assert kinds["whole"] > 5 and kinds["partial"] > 70


def test_privileged_documents_are_clean_and_unaided_ones_slip(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[tuple[bool, float]] = []
    original = pretrain.render_solution

    def spy(problem, rng, *, slip_rate: float = 0.0) -> str:
        assert problem.bucket in pretrain.PRETRAIN_BUCKETS
        rates[-1] = (rates[-1][0], max(rates[-1][1], slip_rate))
        return original(problem, rng, slip_rate=slip_rate)

    monkeypatch.setattr(pretrain, "render_solution", spy)
    rng = random.Random(2)
    for _ in range(80):
        rates.append((False, 0.0))
        document = pretrain.draw_document(tokenizer, rng)
        if not document.prompt_ids:
            rates.pop()
            continue
        aided = "Reference Solution" in _text(tokenizer, document.prompt_ids)
        rates[-1] = (aided, rates[-1][1])
    assert {rate for aided, rate in rates if aided} == {0.0}
    assert {rate for aided, rate in rates if not aided} == {pretrain.SLIP_RATE}


def test_the_loss_is_that_of_each_document_whatever_shares_its_batch(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(pretrain.model_config(tokenizer)).double()
    documents = [
        pretrain.Document((5, 6, 7), (8, 9)),
        pretrain.Document((1,), (2, 3, 4, 5, 6, 7)),
    ]
    together = pretrain._batch_loss(model, documents)
    expected = 0.0
    for document in documents:
        ids = torch.tensor([document.prompt_ids + document.completion_ids])
        log_p = torch.log_softmax(model(input_ids=ids).logits[0], dim=-1)
        for place, token in enumerate(ids[0, 1:].tolist()):
            expected -= log_p[place, token].item()
    assert together.item() == pytest.approx(expected, rel=1e-10)


def test_main_writes_the_same_weights_twice_with_their_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    digests = []
    for name in ("first", "second"):
        output = tmp_path / name
        argv = ["pretrain", "--output", str(output), "--num-steps", "2"]
        monkeypatch.setattr("sys.argv", argv)
        pretrain.main()
        record = json.loads((output / "pretraining.json").read_text())
        digest = hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest()
        assert record["sha256"] == digest
        assert record["num_steps"] == 2
        assert json.loads(capsys.readouterr().out.splitlines()[-1]) == record
        assert {"config.json", "tokenizer.json", "chat_template.jinja"} <= {
            path.name for path in output.iterdir()
        }
        digests.append(digest)
    assert digests[0] == digests[1]


def test_the_architecture_is_about_a_million_parameters(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    with torch.device("meta"):
        model = Qwen3ForCausalLM(pretrain.model_config(tokenizer))
    # Four bytes each must stay within the 5 MB of a bundled file.
    assert 0.7e6 < model.num_parameters() < 1.2e6
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id
