"""The documents that the tiny models are pretrained on."""

import random
from collections import Counter

import pytest
from transformers import PreTrainedTokenizerBase

from paint_engine.config import sections as config_sections
from paint_engine.prompts import masking
from paint_engine.rewards.boxes import extract_boxed
from paint_engine.tiny import documents
from paint_engine.tiny.documents import draw_document
from paint_engine.tiny.pretrain import STAGES, Stage
from paint_engine.tiny.problems import PRETRAIN_BUCKETS, WordProblem, render_reference, way_of
from paint_engine.tiny.stories import WAYS, Plan, Way
from paint_engine.tiny.writer import Habits

FIRST = STAGES[0].mixture


def _text(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...]) -> str:
    text = tokenizer.decode(list(ids))
    assert isinstance(text, str)
    return text


def _documents(tokenizer: PreTrainedTokenizerBase, count: int) -> list[tuple[str, str]]:
    rng = random.Random(1)
    drawn = [draw_document(tokenizer, rng, FIRST) for _ in range(count)]
    return [(_text(tokenizer, d.prompt_ids), _text(tokenizer, d.completion_ids)) for d in drawn]


def test_the_base_reads_the_prompts_that_it_is_used_with() -> None:
    assert documents.INSTRUCTION == config_sections.INSTRUCTION
    assert config_sections.MaskingSection().marker == masking.OMISSION_MARKER


def test_documents_come_in_their_shares(tokenizer: PreTrainedTokenizerBase) -> None:
    kinds: Counter[str] = Counter()
    drawn = _documents(tokenizer, 400)
    for prompt, completion in drawn:
        if not prompt:
            kinds["drill"] += 1
            assert completion.endswith("<|endoftext|>")
            assert "boxed" not in completion and "Problem" not in completion
            continue
        assert prompt.endswith("<think>\n\n</think>\n\n")
        assert completion.endswith("<|im_end|>")
        assert extract_boxed(completion) is not None
        kinds["terse"] += ":" not in completion
        if "Reference Solution" not in prompt:
            kinds["unaided"] += 1
        else:
            partial = masking.OMISSION_MARKER in prompt
            assert ("a part of reference solution" in prompt) == partial
            kinds["partial" if partial else "whole"] += 1
    # Four standard deviations of a share near a third.
    solutions = 400 - kinds["drill"]
    assert abs(kinds["unaided"] / solutions - FIRST.unaided) < 0.11
    assert abs(kinds["drill"] / 400 - documents.DRILL_SHARE) < 0.1
    assert kinds["whole"] > 20 and kinds["partial"] > 70
    assert 0.02 < kinds["terse"] / solutions < 0.16


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_the_writer_sees_what_his_prompt_shows(
    stage: Stage, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another problem's reference confirms nothing, and draws to its way in the last stage alone; a
    visible result of his own confirms, and draws."""
    written: list[tuple[Plan, Way, frozenset[str]]] = []
    original = documents.write_solution

    def spy(plan: Plan, way: Way, rng: random.Random, habits: Habits, visible: frozenset[str]):
        written.append((plan, way, visible))
        return original(plan, way, rng, habits, visible)

    monkeypatch.setattr(documents, "write_solution", spy)
    monkeypatch.setattr(documents, "TERSE_SHARE", 0.0)
    rng = random.Random(2)
    kinds: Counter[str] = Counter()
    followed: list[bool] = []
    together: list[bool] = []
    for _ in range(600):
        count = len(written)
        document = draw_document(tokenizer, rng, stage.mixture)
        if len(written) == count:
            continue
        plan, way, visible = written[-1]
        assert WordProblem("", plan, 0).bucket in PRETRAIN_BUCKETS
        _, fence, shown = _text(tokenizer, document.prompt_ids).partition("Begin ===\n")
        shown = shown.partition("\n===")[0]
        own = {w: render_reference(plan, w) for w in WAYS}
        if not fence:
            kinds["unaided"] += 1
            assert visible == frozenset()
        elif shown in own.values():
            kinds["whole"] += 1
            assert visible == {line[-1] for line in plan.lines["together"][1:]} | (
                {"at_a_time"} if shown == own["together"] else {"total"}
            )
            followed.append(own[way] == shown)
        elif masking.OMISSION_MARKER not in shown:
            kinds["another's"] += 1
            assert visible == frozenset()
            # Of another problem's reference, the way is told by its first formula.
            together.append((way_of(shown) == "together") == (way == "together"))
    assert min(kinds.values()) > 15 and len(kinds) == 3
    assert sum(followed) > 0.85 * len(followed)
    share = sum(together) / len(together)
    assert share > 0.85 if stage.mixture.follows_any else share < 0.8
