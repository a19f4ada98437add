"""The vocabulary of a tokenizer whose ids have gaps, and a tokenizer that cannot be read."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from paint_engine.config.sections import ModelSection, RolloutSection
from paint_engine.model.tokenizer import check_vocabulary, load_tokenizer, vocabulary_size
from paint_engine.rollout import sampling_params
from paint_engine.rollout.builtin import BuiltinEngine


def with_id_gap(model_dir: Path, directory: Path, gap: int) -> Path:
    """A copy whose added tokens have ids larger by `gap`."""
    shutil.copytree(model_dir, directory)
    path = directory / "tokenizer.json"
    state = json.loads(path.read_text())
    for added in state["added_tokens"]:
        added["id"] += gap
        state["model"]["vocab"][added["content"]] = added["id"]
    path.write_text(json.dumps(state, ensure_ascii=False))
    return directory


def test_the_vocabulary_reaches_to_the_largest_id(model_dir: Path, tmp_path: Path) -> None:
    plain = load_tokenizer(ModelSection(name_or_path=str(model_dir)))
    assert vocabulary_size(plain) == len(plain) == 340
    gapped = with_id_gap(model_dir, tmp_path / "gap", 5)
    tokenizer = load_tokenizer(ModelSection(name_or_path=str(gapped)))
    assert len(tokenizer) == 340
    assert vocabulary_size(tokenizer) == 345
    assert tokenizer.eos_token_id < vocabulary_size(tokenizer)


def test_tokens_that_were_added_since_count(model_dir: Path) -> None:
    tokenizer = load_tokenizer(ModelSection(name_or_path=str(model_dir)))
    assert vocabulary_size(tokenizer) == 340
    tokenizer.add_tokens(["<extra>"])
    assert vocabulary_size(tokenizer) == 341


def test_a_head_without_a_row_for_each_id_is_refused(
    model_dir: Path, base: PreTrainedModel, tmp_path: Path
) -> None:
    """The head has 346 rows, more than the tokenizer has tokens."""
    for gap, fits in ((6, True), (7, False)):
        directory = with_id_gap(model_dir, tmp_path / f"gap-{gap}", gap)
        tokenizer = load_tokenizer(ModelSection(name_or_path=str(directory)))
        assert len(tokenizer) == 340 < base.get_output_embeddings().weight.shape[0] == 346
        if fits:
            check_vocabulary("m", tokenizer, base)
            continue
        with pytest.raises(ValueError, match=r"of m has token ids up to 346 \('</think>'\), but"):
            check_vocabulary("m", tokenizer, base)


@pytest.mark.parametrize("content", ["{", "[]", '{"model": 3}'])
def test_a_damaged_tokenizer_is_refused(model_dir: Path, tmp_path: Path, content: str) -> None:
    directory = tmp_path / "damaged"
    shutil.copytree(model_dir, directory)
    (directory / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer of .* could not be loaded"):
        load_tokenizer(ModelSection(name_or_path=str(directory)))


def test_the_gap_s_stop_token_can_be_drawn(
    model_dir: Path, base: PreTrainedModel, tmp_path: Path
) -> None:
    gapped = with_id_gap(model_dir, tmp_path / "gap", 6)
    tokenizer = load_tokenizer(ModelSection(name_or_path=str(gapped)))
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stop == 343 > len(tokenizer)
    with torch.no_grad():
        base.get_output_embeddings().weight[stop] *= 0
    section = RolloutSection(max_new_tokens=40, temperature=50.0, top_p=1.0, top_k=-1)
    engine = BuiltinEngine(base, lambda: nullcontext(base), max_sequences=64)
    params = sampling_params(section, base, tokenizer)
    done = engine.generate([(1, 2, 3)] * 64, list(range(64)), params)
    assert any(completion.token_ids[-1] == stop for completion in done)
    assert max(max(completion.token_ids) for completion in done) < vocabulary_size(tokenizer)
