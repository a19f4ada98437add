"""The rollouts kept for the report: each with its own tokens' values."""

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from paint_engine.config.schema import Config
from paint_engine.recipes import LossOutput
from paint_engine.training.record import sample_records
from paint_engine.types import Problem, TeacherView, TrainExample, Verdict

COLUMNS = ("token_loss", "token_kl", "student_entropy", "teacher_entropy", "clipped_mass")


def planted_output(num_tokens: int, columns: tuple[str, ...] = COLUMNS) -> LossOutput:
    """Values that name their own token and column."""
    rows = torch.arange(num_tokens, dtype=torch.float32)
    per_token = {name: rows + 1000 * i for i, name in enumerate(columns)}
    return LossOutput(torch.tensor(0.5), per_token | {"selected": rows % 3 == 0})


def test_each_kept_rollout_gets_its_own_slice(
    examples: Callable[..., list[TrainExample]], tokenizer: PreTrainedTokenizerBase
) -> None:
    items = examples((3, 4, 5), (6, 7, 8), (2, 5, 3))
    output = planted_output(10)
    records = sample_records(9, items, [items[1], items[2]], output, tokenizer, Config())
    assert [r["problem_id"] for r in records] == ["p:1", "p:2"]
    assert [r["step"] for r in records] == [9, 9]
    assert records[0]["token_loss"] == [2.0, 3.0, 4.0, 5.0, 6.0]
    assert records[1]["token_loss"] == [7.0, 8.0, 9.0]
    assert records[1]["token_kl"] == [1007.0, 1008.0, 1009.0]
    assert records[1]["student_entropy"] == [2007.0, 2008.0, 2009.0]
    assert records[1]["teacher_entropy"] == [3007.0, 3008.0, 3009.0]
    assert records[1]["clipped_mass"] == [4007.0, 4008.0, 4009.0]
    assert records[1]["selected"] == [False, False, True]
    for record, item in zip(records, items[1:], strict=True):
        assert record["tokens"] == [tokenizer.decode([t]) for t in item.rollout.completion_ids]
        assert record["truncated"] == item.rollout.truncated


def test_an_equal_rollout_that_was_not_kept_is_left_out(
    examples: Callable[..., list[TrainExample]], tokenizer: PreTrainedTokenizerBase
) -> None:
    (item,) = examples((3,), (6,), (2,))
    twin = replace(item)
    assert twin == item
    records = sample_records(1, [twin, item], [item], planted_output(4), tokenizer, Config())
    assert [r["token_loss"] for r in records] == [[2.0, 3.0]]
    assert sample_records(1, [twin], [item], planted_output(2), tokenizer, Config()) == []


def test_anchors_are_marked_as_found_in_the_completion(
    examples: Callable[..., list[TrainExample]], tokenizer: PreTrainedTokenizerBase
) -> None:
    (item,) = examples((3,), (6,), (2,))
    solution = "First $12 + 30 = 42$. Then $42 \\times 2 = 84$. So $\\boxed{84}$."
    rollout = replace(
        item.rollout,
        problem=Problem("p", "How many?", solution, "84"),
        text="I find $12 + 30 = 42$ and stop.",
    )
    view = TeacherView((1, 2), "First ...", mask_ratio=0.35, source="p", text=solution)
    shown = replace(item, rollout=rollout, teacher_view=view)
    (record,) = sample_records(1, [shown], [shown], planted_output(2), tokenizer, Config())
    anchors = record["anchors"]
    assert isinstance(anchors, list)
    found = {anchor["text"]: anchor["found"] for anchor in anchors}
    assert True in found.values() and False in found.values()
    assert {text for text, was in found.items() if was} and all(
        "84" not in text for text, was in found.items() if was
    )
    assert record["solution"] == solution
    assert (record["context"], record["source"]) == ("solution", "p")
    assert record["shown"] == "First ..." and record["mask_ratio"] == 0.35
    # The masked text is the solution, which is there already.
    assert "text" not in record
    assert record["answer"] == "84"
    # The teacher is the student's own model.
    assert not {"rationale", "scored_by"} & record.keys()
    assert json.loads(json.dumps(record)) == record
    reasoned = replace(shown, teacher_view=replace(view, rationale="The first step adds."))
    (record,) = sample_records(1, [reasoned], [reasoned], planted_output(2), tokenizer, Config())
    assert record["rationale"] == "The first step adds."


SERVED = {"url": "http://localhost:8000", "tail": "renormalise"}
MODELS = {"weights": "external", "models": ["a", "b", "c"]}


@pytest.mark.parametrize(
    ("teacher", "places", "names"),
    [
        ({"weights": "external", "model": "org/big"}, (0,), ["org/big"]),
        (MODELS, (0, 1, 2), ["a", "b", "c"]),
        (MODELS | {"route_column": "domain"}, (1,), ["b"]),
        (MODELS | {"route_column": "domain", "model_names": ["x", "y", "z"]}, (2,), ["z"]),
        (SERVED | {"served_model": "org/served"}, (0,), ["org/served"]),
    ],
)
def test_the_teachers_that_scored_a_rollout_are_named(
    teacher: dict[str, object],
    places: tuple[int, ...],
    names: list[str],
    examples: Callable[..., list[TrainExample]],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    (item,) = examples((3,), (6,), (2,))
    prompts = ((1,),) * (len(places) - 1)
    view = TeacherView((1,), "", 0.0, scorers=places, other_prompt_ids=prompts)
    item, config = replace(item, teacher_view=view), Config.model_validate({"teacher": teacher})
    (record,) = sample_records(1, [item], [item], planted_output(2), tokenizer, config)
    assert record["scored_by"] == names


def test_grpo_keeps_reward_and_advantage_and_nothing_of_a_teacher(
    examples: Callable[..., list[TrainExample]], tokenizer: PreTrainedTokenizerBase
) -> None:
    (item,) = examples((3,), (6,), (2,))
    item = TrainExample(item.rollout, Verdict(1.0, True), overlap=0.5, advantage=0.75)
    columns = ("token_loss", "logprobs", "ratio", "student_entropy")
    (record,) = sample_records(1, [item], [item], planted_output(2, columns), tokenizer, Config())
    assert (record["reward"], record["advantage"], record["correct"]) == (1.0, 0.75, True)
    assert record["ratio"] == [2000.0, 2001.0]
    assert record["student_entropy"] == [3000.0, 3001.0]
    absent = ("logprobs", "shown", "context", "mask_ratio", "overlap", "anchors", "token_kl")
    assert not set(absent) & record.keys()
    assert json.loads(json.dumps(record)) == record


def test_a_reference_solution_has_no_verdict(
    examples: Callable[..., list[TrainExample]], tokenizer: PreTrainedTokenizerBase
) -> None:
    (item,) = examples((3,), (6,), (2,))
    solution = replace(item.rollout, rollout_logprobs=())
    item = TrainExample(solution)
    output = planted_output(2, ("token_loss", "student_entropy"))
    (record,) = sample_records(1, [item], [item], output, tokenizer, Config())
    assert record["token_loss"] == [0.0, 1.0]
    assert not {"correct", "reward", "advantage", "overlap"} & record.keys()
