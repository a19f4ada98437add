"""Pretraining of the tiny models: its loss, and that two runs give the same weights."""

import hashlib
import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM

from paint_engine.config.bundled import TINY_BASE
from paint_engine.tiny import pretrain
from paint_engine.tiny.documents import Document, Mixture


@pytest.fixture(autouse=True)
def small_and_restored(monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerBase):
    """Two short rows a step; the process-wide settings of pretraining are set back."""
    monkeypatch.setattr(pretrain, "BATCH_SIZE", 4)
    monkeypatch.setattr(pretrain, "MICROBATCH_SIZE", 2)
    monkeypatch.setattr(pretrain, "_train_tiny_tokenizer", lambda: tokenizer)
    before, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(before)
    torch.set_num_threads(threads)


def test_the_loss_is_that_of_each_document_whatever_shares_its_batch(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(pretrain.model_config(tokenizer)).double()
    documents = [
        Document((5, 6, 7), (8, 9)),
        Document((1,), (2, 3, 4, 5, 6, 7)),
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
        assert record["num_steps"] == 2 * len(pretrain.STAGES)
        assert record["command"] == "python -m paint_engine.tiny.pretrain --num-steps 2"
        # Two cores would give other sums than four.
        assert record["num_threads"] == 1
        assert json.loads(capsys.readouterr().out.splitlines()[-1]) == record
        assert {"config.json", "tokenizer.json", "chat_template.jinja"} <= {
            path.name for path in output.iterdir()
        }
        digests.append(digest)
    assert digests[0] == digests[1]


def test_the_teacher_begins_as_the_base_and_slips_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = []

    def spy(tokenizer: PreTrainedTokenizerBase, rng: random.Random, mixture: Mixture):
        rates.append((mixture.habits.slip, mixture.habits.confirmed_slip))
        return Document((1, 2), (3, 4))

    monkeypatch.setattr(pretrain, "draw_document", spy)
    argv = ["pretrain", "--teacher", "--num-steps", "1", "--output", str(tmp_path / "teacher")]
    monkeypatch.setattr("sys.argv", argv)
    pretrain.main()
    assert set(rates) == {(0.0, 0.0)}
    base, teacher = (
        load_file(path / "model.safetensors") for path in (TINY_BASE, tmp_path / "teacher")
    )
    assert base.keys() == teacher.keys()
    # One step of the warm-up.
    assert all(torch.allclose(base[name], teacher[name], atol=1e-2) for name in base)
    assert any(not torch.equal(base[name], teacher[name]) for name in base)
    record = json.loads((tmp_path / "teacher" / "pretraining.json").read_text())
    assert record["command"] == "python -m paint_engine.tiny.pretrain --teacher --num-steps 1"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num-steps", "2"], "--num-steps: got 2; needs 1 or more, and --output DIR"),
        (["--num-steps", "0", "--output", "x"], "--num-steps: got 0; needs 1 or more"),
    ],
)
def test_a_try_does_not_replace_the_bundled_base(
    argv: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["pretrain", *argv])
    with pytest.raises(SystemExit):
        pretrain.main()
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--size", "10m"], ["--size", "10m", "--teacher"]])
def test_only_the_bundled_size_has_a_place_of_its_own(
    argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["pretrain", *argv])
    with pytest.raises(SystemExit):
        pretrain.main()
    assert "needs --output DIR" in capsys.readouterr().err


def test_the_architecture_is_about_a_million_parameters(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    with torch.device("meta"):
        model = Qwen3ForCausalLM(pretrain.model_config(tokenizer))
    # Four bytes each must stay within the 5 MB of a bundled file.
    assert 0.7e6 < model.num_parameters() < 1.2e6
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id
